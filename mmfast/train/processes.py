"""One process or many (torchrun): what each shares with the others. Alone, everything here is the identity.

A training step of N processes is one step of the joined batch: each computes its rows' part of every loss, divided by
counts over all rows, and the mean of the processes' gradients is the joined batch's. So counts are summed, codes are
gathered where rows are compared with each other, and batch statistics are taken over all rows.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from mmfast.train import UserError

T = TypeVar("T")
PATIENCE = datetime.timedelta(minutes=10)  # that a process waits for another: rank 0 may be preparing the data


class _Sum(torch.autograd.Function):
    """The sum of the processes' tensors; so each has the sum of the gradients of what the processes made of it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient.contiguous())


class Processes:
    """This process among `count`, of which it is number `rank`."""

    def __init__(self, count: int = 1, rank: int = 0) -> None:
        self.count = count
        self.rank = rank

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of the rows of a batch: every count-th, as DistributedSampler deals them out."""
        return rows[self.rank :: self.count]

    def total(self, value: Tensor) -> Tensor:
        """The sum of the processes' values, without a gradient."""
        if self.count == 1:
            return value
        value = value.detach().clone()
        dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean of the processes' values, without a gradient."""
        return self.total(value) / self.count

    def portion(self, summed: Tensor, counted: Tensor) -> Tensor:
        """This process's part of a mean over all rows: `summed` over its own, `counted` how many those are.

        The mean of the processes' portions is the mean over all rows; 0 where there are none.
        """
        return self.count * summed / self.total(counted).clamp(min=1)

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all processes, which have equally many, process after process; with gradients, of one order."""
        if self.count == 1:
            return rows
        numbers = rows if rows.is_floating_point() else rows.long()
        places = [numbers if rank == self.rank else torch.zeros_like(numbers) for rank in range(self.count)]
        return _Sum.apply(torch.cat(places)).to(rows.dtype)

    def any(self, flags: list[bool], device: torch.device) -> list[bool]:
        """Each flag, whether it is true in any process."""
        if self.count == 1:
            return flags
        return [x > 0 for x in self.total(torch.tensor([float(flag) for flag in flags], device=device)).tolist()]

    def every(self, value: T) -> list[T]:
        """The values of all processes."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """The first process's value."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Work of the first process (the others have an empty body): where it fails, it reports and all end."""
        failed = True
        try:
            yield
            failed = False
        finally:
            if self.from_first(failed) and not self.first:
                raise SystemExit(2)


ALONE = Processes()


def process_count() -> int:
    """How many processes torchrun started, known before they are connected; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


@contextlib.contextmanager
def started(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun started, connected while the context lasts; ALONE without torchrun.

    A connection that breaks, because another process ended, is a UserError.
    """
    count, rank = process_count(), int(os.environ.get("RANK", "0"))
    if "RANK" not in os.environ:
        yield ALONE
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Processes(count, rank)
    except (RuntimeError, dist.DistBackendError) as error:
        if not _is_lost_connection(error):
            raise
        # torchrun tells those that are left to end, which they do, and shall say why.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise UserError(
            f"process {rank} of {count} lost another process, and all end here; "
            "the last checkpoint is kept: go on with torchrun ... -m mmfast train --resume RUN"
        ) from None
    finally:
        if dist.get_backend() != "gloo":
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def leave(code: int) -> None:
    """Ends this process where it is connected by gloo; elsewhere does nothing.

    gloo's threads free tensors under the interpreter's lock. Destroying its group waits for them and holds that lock,
    and Python's own end kills them while they wait for it: the one can hang, the other abort. So neither is done.
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _is_lost_connection(error: Exception) -> bool:
    said = str(error).lower()
    return any(word in said for word in ("connection", "gloo", "nccl", "timed out", "socket"))


class JointBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """A BatchNorm whose training statistics are over the rows of all processes, on any device.

    Equivalent to: torch.nn.BatchNorm on the joined batch, of whose state_dict it keeps the keys. torch.nn.SyncBatchNorm
    does the same on GPUs only.
    """

    processes: Processes

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.transpose(0, 1).flatten(1)
        x = x.float() if x.dtype.itemsize < 4 else x
        own = x.mean(1)
        square = (x - own[:, None]).square().sum(1)
        parts = torch.stack([torch.full_like(own, x.shape[1]), own, square])[None]
        counts, means, squares = self.processes.gathered(parts).unbind(1)
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count
        variance = (squares + counts * (means - mean).square()).sum(0) / count
        self._follow(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        shape = [1, -1] + [1] * (input.dim() - 2)
        scale = (variance + self.eps).rsqrt() * self.weight
        made = (input - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)
        return made.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum or 0.1)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum or 0.1)


def join_batch_norms(module: torch.nn.Module, processes: Processes) -> None:
    """Turns every BatchNorm in `module` into a JointBatchNorm, in place, with the same weights and buffers."""
    for part in module.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            part.__class__ = JointBatchNorm
            part.processes = processes  # type: ignore[assignment]


# Buffers follow statistics of all rows, and are equal as they are. torch 2.13 renamed the argument.
_KNOWN = inspect.signature(DistributedDataParallel).parameters
_OWN_BUFFERS: dict[str, Any] = {next(x for x in ("forward_sync_buffers", "broadcast_buffers") if x in _KNOWN): False}


def spread(net: torch.nn.Module, processes: Processes) -> torch.nn.Module:
    """What to call in place of `net`, so that the processes train it together: DistributedDataParallel."""
    if processes.count == 1:
        return net
    join_batch_norms(net, processes)
    return DistributedDataParallel(net, **_OWN_BUFFERS)


def shard(net: torch.nn.Module, processes: Processes) -> torch.nn.Module:
    """`net`, of whose weights each process now keeps a part: fully_shard of each of its parts, and of what is left."""
    if processes.count > 1:
        join_batch_norms(net, processes)
    for part in net.children():
        if any(True for _ in part.parameters()):
            fully_shard(part)
    fully_shard(net)
    return net


def whole(value: Tensor) -> Tensor:
    """A tensor of which each process has a part, put together; any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_tree(tree: Any) -> Any:
    """`whole` of every tensor in nested dicts and lists."""
    return pytree.tree_map_only(DTensor, whole, tree)


def _placed(value: Any, like: Tensor) -> Any:
    """This process's part of a whole tensor, where `like` is in parts."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        value = value.to(like.device)
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def load_weights(module: torch.nn.Module, state: dict[str, Any]) -> None:
    """Loads a whole state_dict into a module, sharded or not."""
    own = module.state_dict()
    module.load_state_dict({name: _placed(value, own[name]) if name in own else value for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a whole state_dict into an optimizer of sharded weights or others."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {i: {name: _placed(x, weights[i]) for name, x in kept.items()} for i, kept in state["state"].items()}
    optimizer.load_state_dict({**state, "state": moments})
