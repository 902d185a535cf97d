"""What the ops' GPU backends share: Triton kernels' modules and refusals, and PyTorch's setting of precision."""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch
from torch import Tensor


@functools.cache
def kernels(package: str) -> tuple[Any, str]:
    """(an op's module triton_kernels or None, why there is none). A call that considers Triton imports it, no other:
    that takes longer than the rest of mmfast."""
    try:
        return importlib.import_module(".triton_kernels", package), ""
    except ImportError as error:
        return None, f"Triton could not be imported ({error})"


def refusals(what: str, device: str, dtype: torch.dtype, interpreted: bool) -> list[str]:
    """Why Triton's kernels cannot run on `what`, tensors of this device type and dtype, in sentences."""
    found = []
    if device == "cpu" and not interpreted:
        found.append(f"{what} on cpu, where Triton needs TRITON_INTERPRET=1, set before it is imported")
    if device not in ("cpu", "cuda"):
        found.append(f"{what} on {device} (supported: cuda, and cpu in Triton's interpreter)")
    if device == "cuda" and interpreted:
        found.append("TRITON_INTERPRET=1 is set, so Triton compiles nothing in this process")
    # arithmetic on bfloat16 is wrong in the interpreter
    dtypes = [torch.float32, torch.float16] + [torch.bfloat16] * (not interpreted)
    if dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found.append(f"{what} {dtype} (supported: {names})")
    return found


def uses_tf32() -> bool:
    """Whether PyTorch's settings let recurrent layers round float32 to TF32."""
    precision = getattr(getattr(torch.backends.cudnn, "rnn", None), "fp32_precision", None)
    return torch.backends.cudnn.allow_tf32 if precision is None else precision == "tf32"


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """In which x's device is the one that kernels are launched on."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
