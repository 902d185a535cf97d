"""A model of every layer that mmfast stands in for, to be accelerated."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Net(torch.nn.Module):
    """Every layer that mmfast stands in for, between others, from sequences (T, B, 7) with lengths to (B, 3, 2, 16)."""

    def __init__(self, nn=torch.nn) -> None:
        super().__init__()
        self.encoder = nn.GRU(7, 6, 2, bidirectional=True)
        self.middle = nn.Sequential(OrderedDict(rnn=nn.RNN(12, 10, nonlinearity="relu", batch_first=True)))
        self.lstm = nn.LSTM(10, 8, proj_size=5)
        self.cells = nn.ModuleList([nn.RNNCell(5, 5), nn.GRUCell(5, 5), nn.LSTMCell(5, 5)])
        self.up = nn.ModuleDict(
            {
                # without a bias: before a norm its gradient is 0, of which every kernel has its own rounding
                "1d": nn.ConvTranspose1d(5, 4, 4, 2, 1, bias=False),
                "2d": nn.ConvTranspose2d(4, 4, 2, 2),
                "3d": nn.ConvTranspose3d(4, 3, (1, 1, 2), (1, 1, 2), groups=1),
            }
        )
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, [3, 4][: x.shape[1]], enforce_sorted=False)
        y, _ = pad_packed_sequence(self.encoder(packed)[0])
        y, _ = self.middle(y.transpose(0, 1))
        y, _ = self.lstm(y.transpose(0, 1))
        h = self.cells[1](self.cells[0](y[-1]))
        h, _ = self.cells[2](h)
        y = self.norm(self.up["1d"]((y + h).permute(1, 2, 0))).relu()
        y = self.up["2d"](y[:, :, None])
        return self.up["3d"](y[:, :, None])[:, :, 0]


LAYERS = {
    "encoder": "GRU",
    "middle.rnn": "RNN",
    "lstm": "LSTM",
    "cells.0": "RNNCell",
    "cells.1": "GRUCell",
    "cells.2": "LSTMCell",
    "up.1d": "ConvTranspose1d",
    "up.2d": "ConvTranspose2d",
    "up.3d": "ConvTranspose3d",
}


def classes(model: torch.nn.Module, package=torch.nn) -> dict[str, type]:
    return {path: getattr(package, name) for path, name in LAYERS.items()}


def types(model: torch.nn.Module) -> dict[str, type]:
    return {path: type(model.get_submodule(path)) for path in LAYERS}


def clear(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        parameter.grad = None
    return model


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
