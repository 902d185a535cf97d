"""Sequential that calls a transposed convolution, its norm and its activation as one op."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .. import functional as F
from ..dispatch import EPOCH, Op, each_call_chooses
from ..ops.conv_transpose.layers import conv_transpose_call
from .conv_transpose import MOST_NOTED, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, _Call

_CONVOLUTIONS: dict[type, tuple[int, Any, type, type]] = {
    ConvTranspose1d: (1, F.conv_transpose1d_norm_act, torch.nn.BatchNorm1d, torch.nn.InstanceNorm1d),
    ConvTranspose2d: (2, F.conv_transpose2d_norm_act, torch.nn.BatchNorm2d, torch.nn.InstanceNorm2d),
    ConvTranspose3d: (3, F.conv_transpose3d_norm_act, torch.nn.BatchNorm3d, torch.nn.InstanceNorm3d),
}

_ACTIVATIONS: dict[type, str] = {
    torch.nn.ReLU: "relu",
    torch.nn.LeakyReLU: "leaky_relu",
    torch.nn.Tanh: "tanh",
    torch.nn.Sigmoid: "sigmoid",
    torch.nn.SiLU: "silu",
    torch.nn.GELU: "gelu",
}

#: torch.nn.utils' older hooks before a forward, that compute the weight and look at nothing else
_MAKE_WEIGHT = (WeightNorm, SpectralNorm)

_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


class Sequential(torch.nn.Sequential):
    """A chain of modules, in which ConvTranspose -> BatchNorm or InstanceNorm -> activation is one op.

    Equivalent to: `torch.nn.Sequential`, of which it is a subclass; results differ by rounding.

    The norm, the activation, or both may follow an `mmfast.nn.ConvTranspose*d`: BatchNorm and InstanceNorm (without
    running statistics) of as many dimensions, ReLU, LeakyReLU, Tanh, Sigmoid, SiLU and GELU (exact), of torch.nn's own
    classes. They stay modules of their own, and are called as such where anyone listens between them (a hook, a forward
    replaced on the instance, a tracer), for unbatched input, and in a compiled graph, where the compiler fuses.
    """

    #: (dispatch.EPOCH, training, the modules) and, of inputs on a CPU while these are the same, whether PyTorch serves
    #: every chain, and by a chain's place and what is seen of its input how many modules it serves there; 0: not all
    _noted: tuple[Any, bool, dict[tuple, int]] = (None, False, {})

    def forward(self, input: Any) -> Any:
        if is_compiling():
            return super().forward(input)
        modules: list[Any] = list(self._modules.values())
        known = None
        if type(input) is Tensor and input.is_cpu:
            now = (EPOCH[0], self.training, modules)
            noted = self._noted[0] == now
            if noted and self._noted[1]:
                return super().forward(input)
            if not each_call_chooses():
                if not noted or len(self._noted[2]) > MOST_NOTED:
                    # what is lazy is of another class after its first call
                    lazy = any(isinstance(module, LazyModuleMixin) for module in modules)
                    self._noted = (None, False, {}) if lazy else (now, self._is_left(modules), {})
                known = self._noted[2]
        position = 0
        while position < len(modules):
            conv = modules[position]
            seen: tuple = ()
            if known is not None and type(conv) in _CONVOLUTIONS and type(input) is Tensor:
                seen = (position, input.shape, input.is_contiguous(), torch.is_grad_enabled())
                if (count := known.get(seen, 0)) and conv.backend is None:
                    # to call the layer, which would ask the same again, takes as long as a small one of PyTorch's
                    input = _torch_forward(conv)(input)
                    for module in modules[position + 1 : position + count]:
                        input = module(input)
                    position += count
                    continue
            count = self._fused_from(modules, position, input)
            chain = modules[position : position + max(count, 1)]
            if known is not None and seen and count and seen not in known:
                known[seen] = count if _is_left_at(chain, input) else 0
            input = _call_fused(chain, input) if count > 1 else chain[0](input)
            position += len(chain)
        return input

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # as a layer forgets what it was asked
        self._noted = (None, False, {})
        return super()._apply(*args, **kwargs)

    def _fused_from(self, modules: list[Any], position: int, input: Any) -> int:
        """How many modules from `position` on are one op for this input; 0 or 1: none."""
        row = _CONVOLUTIONS.get(type_before_parametrizations(modules[position]))
        if row is None or not isinstance(input, Tensor) or input.dim() != row[0] + 2 or _somebody_listens():
            return 0
        return _chain_from(modules, position, row)

    def _is_left(self, modules: list[Any]) -> bool:
        """Whether PyTorch serves every transposed convolution with what follows it."""
        for position, conv in enumerate(modules):
            row = _CONVOLUTIONS.get(type_before_parametrizations(conv))
            count = 1 if row is None else _chain_from(modules, position, row)
            # of what someone listens to now, and perhaps not later, nothing is known
            following = modules[position + 1 : position + count]
            if count == 0 or (following and not (conv.backend is None and conv.is_left(**_epilogue(following)))):
                return False
        return True

    def static_cases(self) -> dict[str, tuple[Op, Any]]:
        """For each transposed convolution that is one op with what follows it, by its name: that op and its case."""
        names = list(self._modules)
        modules: list[Any] = list(self._modules.values())
        cases = {}
        for position, conv in enumerate(modules):
            row = _CONVOLUTIONS.get(type_before_parametrizations(conv))
            count = 0 if row is None else _chain_from(modules, position, row)
            if count > 1:
                op, case = conv.static_case()
                cases[names[position]] = op, case._replace(**_epilogue(modules[position + 1 : position + count]))
        return cases


def _torch_forward(conv: Any) -> Any:
    """What to call where PyTorch serves this convolution: its class' forward, unless its call does more."""
    hooks = conv._forward_pre_hooks or conv._forward_hooks or conv._backward_hooks or conv._backward_pre_hooks
    if hooks or any(_GLOBAL_HOOKS) or conv._compiled_call_impl is not None or "forward" in vars(conv):
        return conv
    return super(_Call, conv).forward


def _is_left_at(chain: list[Any], input: Tensor) -> bool:
    """Whether PyTorch serves a transposed convolution and what follows it for this input."""
    conv, *following = chain
    op, case = conv.static_case()
    call = conv_transpose_call(input, conv.out_channels, conv.stride)
    return conv.backend is None and op.leaves([case.of_this_call(*call)._replace(**_epilogue(following))])


def has_chain(module: torch.nn.Sequential) -> bool:
    """Whether a transposed convolution of mmfast is followed, in this Sequential, by what can be fused with it."""
    modules = list(module)
    for conv, following in itertools.pairwise(modules):
        row = _CONVOLUTIONS.get(type_before_parametrizations(conv))
        if row is not None and (_activation_of(following) or _is_norm(following, *row[2:])):
            return True
    return False


def _activation_of(module: Any) -> str | None:
    """The activation that this module is, where the op has it."""
    if type(module) is torch.nn.GELU and module.approximate != "none":
        return None
    return _ACTIVATIONS.get(type(module))


def _chain_from(modules: list[Any], position: int, row: tuple[int, Any, type, type]) -> int:
    """How many modules from the convolution at `position` on may be one op."""
    following = modules[position + 1 : position + 3]
    count = 1
    if following and _is_norm(following[0], *row[2:]):
        count = 2
    if len(following) >= count and _activation_of(following[count - 1]):
        count += 1
    return count if all(_is_unwatched(module) for module in modules[position : position + count]) else 0


def _epilogue(following: list[Any]) -> dict[str, Any]:
    """What a case says of the modules that follow its convolution."""
    facts: dict[str, Any] = {}
    for module in following:
        if activation := _activation_of(module):
            facts["activation"] = activation
            facts["negative_slope"] = getattr(module, "negative_slope", 0.01)
        elif isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            facts["norm"] = "batch" if module.training or module.running_mean is None else "given"
        else:
            facts["norm"] = "instance"
    return facts


def _somebody_listens() -> bool:
    return torch.jit.is_tracing() or any(_GLOBAL_HOOKS)


def _is_unwatched(module: torch.nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if "forward" in vars(module):
        return False
    # mmfast.explain's own hooks note who runs, and shall not change what runs
    return not any(hooks) or all(
        isinstance(hook, _MAKE_WEIGHT) or hasattr(hook, "of_explain") for kind in hooks for hook in kind.values()
    )


def _is_norm(module: Any, batch_norm: type, instance_norm: type) -> bool:
    cls: type = type(module)
    if cls is instance_norm:
        return module.running_mean is None
    return cls is batch_norm


def _call_fused(modules: list[Any], input: Tensor) -> Tensor:
    conv, *following = modules
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _MAKE_WEIGHT):
                hook(module, (input,))
    _, function, batch_norm, _ = _CONVOLUTIONS[type_before_parametrizations(conv)]
    options: dict[str, Any] = {}
    if not _activation_of(following[0]):
        norm = following.pop(0)
        options = {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
        options |= _batch_norm_options(norm) if type(norm) is batch_norm else {"norm": "instance"}
    if following:
        options["activation"] = _activation_of(following[0])
        options["negative_slope"] = getattr(following[0], "negative_slope", 0.01)
    geometry = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
    return function(input, conv.weight, conv.bias, *geometry, backend=conv.backend, **options)


def _batch_norm_options(norm: Any) -> dict[str, Any]:
    """What torch.nn's batch norms pass on, after they counted the batch."""
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    tracked = not norm.training or norm.track_running_stats
    return {
        "norm": "batch",
        "running_mean": norm.running_mean if tracked else None,
        "running_var": norm.running_var if tracked else None,
        "training": norm.training,
        "momentum": momentum,
    }
