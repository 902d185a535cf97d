"""Other libraries that run the same layers, where they are installed: `mmfast bench --peers`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .cases import RnnCase
from .contenders import Bout, Contender, Inputs, Results

ONNXRUNTIME = "onnxruntime"

#: torch stacks a layer's gates in another order than ONNX: i f g o there is i o f c here, r z n is z r h
_ONNX_ORDER = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}


#: what each peer needs installed
NEEDED = {ONNXRUNTIME: ("onnx", "onnxruntime")}


def installed() -> list[str]:
    """The peers that can be called here; ValueError, with the command that installs one, where there is none."""
    found = [peer for peer, needed in NEEDED.items() if all(importlib.util.find_spec(name) for name in needed)]
    if not found:
        missing = [name for needed in NEEDED.values() for name in needed if not importlib.util.find_spec(name)]
        raise ValueError(f"--peers: no other library is ready here: pip install {' '.join(missing)}")
    return found


def joined(bout: Bout, contenders: Iterable[Contender]) -> Iterator[Contender]:
    """The contenders, then the peers that can run this case: onnxruntime, recurrent layers forward on a CPU."""
    yield from contenders
    if _serves(bout) and ONNXRUNTIME in installed():
        yield Contender(ONNXRUNTIME, _onnxruntime(bout), bout.sets)


def _serves(bout: Bout) -> bool:
    case = bout.case
    plain = isinstance(case, RnnCase) and case.steps > 0 and not case.packed
    return plain and bout.mode == "forward" and bout.device == "cpu" and bout.dtype == torch.float32


def _onnxruntime(bout: Bout) -> Callable[[Inputs], Results]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        _graph(bout.case, bout.module).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda inputs: [torch.from_numpy(session.run(["layer"], {"x": inputs[0].numpy()})[0])]


def _graph(case: RnnCase, module: torch.nn.Module) -> Any:
    """The layers as an ONNX model from x (T, B, I) to layer (T, B, directions x H)."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, source = [], [], "x"
    directions = 1 + case.bidirectional
    weights.append(numpy_helper.from_array(torch.tensor([0, 0, -1]).numpy(), "shape"))
    for layer in range(case.layers):
        for name, value in _weights(case, module, layer, directions).items():
            weights.append(numpy_helper.from_array(value.contiguous().numpy(), f"{name}{layer}"))
        direction = "bidirectional" if directions == 2 else "forward"
        attributes: dict[str, Any] = {"hidden_size": case.hidden_size, "direction": direction}
        if case.mode == "GRU":
            # torch's form: the reset gate applies after the product
            attributes["linear_before_reset"] = 1
        names = [source, f"W{layer}", f"R{layer}", f"B{layer}"]
        source = "layer" if layer == case.layers - 1 else f"layer{layer}"
        # Y: (T, directions, B, H)
        nodes.append(helper.make_node(case.mode, names, [f"Y{layer}"], **attributes))
        nodes.append(helper.make_node("Transpose", [f"Y{layer}"], [f"Z{layer}"], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [f"Z{layer}", "shape"], [source]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "B", case.input_size])
    y = helper.make_tensor_value_info("layer", TensorProto.FLOAT, ["T", "B", directions * case.hidden_size])
    graph = helper.make_graph(nodes, "layers", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)


def _weights(case: RnnCase, module: torch.nn.Module, layer: int, directions: int) -> dict[str, Tensor]:
    def stacked(kind: str) -> Tensor:
        """(directions, gates x H, ...), gates in ONNX's order."""
        rows = []
        for suffix in ("", "_reverse")[:directions]:
            gates = getattr(module, f"{kind}_l{layer}{suffix}").detach().chunk(len(_ONNX_ORDER[case.mode]))
            rows.append(torch.cat([gates[i] for i in _ONNX_ORDER[case.mode]]))
        return torch.stack(rows)

    biases = torch.cat([stacked("bias_ih"), stacked("bias_hh")], 1)
    return {"W": stacked("weight_ih"), "R": stacked("weight_hh"), "B": biases}
