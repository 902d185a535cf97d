"""What every accelerated layer shares, whatever its op."""

from __future__ import annotations

from typing import Any, NoReturn

from ..dispatch import Op


class Layer:
    """Comes before the torch.nn class in the bases of a layer of ours."""

    #: The backend of this layer's calls: "torch", "cpu", "triton", "cuda", or None: mmfast chooses. Not in state_dict.
    backend: str | None = None

    def static_case(self) -> tuple[Op, Any]:
        """The op that serves this layer, and its case as far as the layer alone tells: its own dtype, not packed."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> NoReturn:
        # torch.jit.script asks every module for this first; its own errors about our Python code would mislead
        raise RuntimeError(
            f"torch.jit.script cannot compile mmfast.nn.{type(self).__name__}; call mmfast.restore(model) first, which "
            "turns mmfast's layers into torch.nn's"
        )
