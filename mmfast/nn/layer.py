"""What mmfast's layers share, whatever their op."""

from __future__ import annotations

from typing import Any, NoReturn

from ..dispatch import Op


class Layer:
    """A layer that one of mmfast's ops serves; comes before torch.nn's class in the bases."""

    #: The backend of this layer's calls: "torch", "cpu", "triton", "cuda", or None: mmfast chooses. Not in state_dict.
    backend: str | None = None

    #: dispatch.EPOCH when the layer asked whether PyTorch's own serves it, and when it was so, in `_left`
    _asked: object = None
    _left: object = None

    def static_case(self) -> tuple[Op, Any]:
        """The op, and the case as far as the layer alone tells: the dtype and device of its parameters, not packed."""
        raise NotImplementedError


class Twin(Layer):
    """A layer that stands in for torch.nn's of the same name."""

    def __prepare_scriptable__(self) -> NoReturn:
        # torch.jit.script asks every module for this first; its own complaints about Python code would mislead
        name = type(self).__name__
        raise RuntimeError(f"TorchScript cannot compile mmfast.nn.{name}; call mmfast.restore(model) first")
