"""torch's own database of module samples and error inputs, with mmfast's layers in the places of torch.nn's."""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import pytest
import torch
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, module_db

import mmfast

RECURRENT = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
CONVOLUTIONS = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
LAYERS = RECURRENT + CONVOLUTIONS
INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls.__name__ in LAYERS}
DTYPES = {"f32": torch.float32, "f64": torch.float64}

# of one dtype and mode; a database that shrank would test less
SAMPLES = {"RNN": 32, "GRU": 16, "LSTM": 32, "RNNCell": 3, "GRUCell": 2, "LSTMCell": 2} | dict.fromkeys(CONVOLUTIONS, 2)
ERRORS = {"RNN": 14, "GRU": 14, "LSTM": 14, "RNNCell": 6, "GRUCell": 6, "LSTMCell": 4} | dict.fromkeys(CONVOLUTIONS, 0)

per_layer = pytest.mark.parametrize("name", LAYERS)
per_dtype = pytest.mark.parametrize("dtype", DTYPES)
per_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def samples(info: ModuleInfo, dtype: str, training: bool) -> list:
    return info.module_inputs_func(info, device="cpu", dtype=DTYPES[dtype], requires_grad=True, training=training)


def errors(info: ModuleInfo, dtype: str, training: bool) -> list:
    if info.module_error_inputs_func is None:
        return []
    made = info.module_error_inputs_func(info, device="cpu", dtype=DTYPES[dtype], requires_grad=True, training=training)
    return list(made)


@per_mode
@per_dtype
@per_layer
@pytest.mark.parametrize("backend", ["torch", None], ids=["torch", "chosen"])
def test_samples(name: str, dtype: str, training: bool, backend: str | None, outcome, same) -> None:
    """Outputs and all gradients: the same bits with the torch backend, the same within rounding with the chosen one."""
    hold_to_torch(INFOS[name], name, dtype, training, backend, outcome, same)


@per_mode
@per_dtype
@per_layer
def test_samples_on_the_cpu_kernel(name: str, dtype: str, training: bool, outcome, same) -> None:
    """Forced upon samples that are so small that PyTorch's would serve them, and with its error inputs."""
    with mmfast.use_backend("cpu"):
        hold_to_torch(INFOS[name], name, dtype, training, None, outcome, same)
        test_error_inputs(name, dtype, training)


def hold_to_torch(
    info: ModuleInfo, name: str, dtype: str, training: bool, backend: str | None, outcome, same, without: str = ""
) -> None:
    """without: a constructor's keyword whose samples are left out, for the backend refuses them."""
    made = samples(info, dtype, training)
    assert len(made) == SAMPLES[name]
    for sample in made:
        if sample.constructor_input.kwargs.get(without):
            continue
        constructor = (sample.constructor_input.args, sample.constructor_input.kwargs)
        theirs = info.module_cls(*constructor[0], **constructor[1]).to(DTYPES[dtype]).train(training)
        ours = getattr(mmfast.nn, name)(*constructor[0], **constructor[1], backend=backend)
        ours.to(DTYPES[dtype]).train(training).load_state_dict(theirs.state_dict())
        inputs, keywords = sample.forward_input.args, sample.forward_input.kwargs
        assert not keywords
        expected, found = outcome(theirs, *inputs), outcome(ours, *inputs)
        assert len(expected) > len(list(theirs.parameters()))
        same(found, expected)
        if backend == "torch":
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        if sample.reference_fn is not None:
            reference = sample.reference_fn(ours, *copy.deepcopy(inputs))
            same(ours(*inputs), reference)


@per_mode
@per_dtype
@per_layer
def test_error_inputs(name: str, dtype: str, training: bool) -> None:
    """The database's exception type and message, which are torch.nn's."""
    info = INFOS[name]
    made = errors(info, dtype, training)
    assert len(made) == ERRORS[name]
    for error in made:
        sample = error.module_error_input
        constructor = (sample.constructor_input.args, sample.constructor_input.kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of dropout with one layer, before the error
            if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
                with pytest.raises(error.error_type, match=error.error_regex):
                    getattr(mmfast.nn, name)(*constructor[0], **constructor[1])
                continue
            ours = getattr(mmfast.nn, name)(*constructor[0], **constructor[1]).to(DTYPES[dtype]).train(training)
        with pytest.raises(error.error_type, match=error.error_regex):
            ours(*sample.forward_input.args, **sample.forward_input.kwargs)


def test_counts() -> None:
    """What the two tests above go through: 93 samples and 58 error inputs per dtype and mode."""
    seen = Counter()
    for info in INFOS.values():
        for dtype in DTYPES:
            for training in (True, False):
                seen["samples"] += len(samples(info, dtype, training))
                seen["errors"] += len(errors(info, dtype, training))
    assert seen == {"samples": 4 * 93, "errors": 4 * 58}
