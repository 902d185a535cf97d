"""Losses and the balancer over a process group: two processes of half a batch are one of the whole batch."""

import subprocess
import sys

RANKS = """
import sys
import torch
import torch.distributed as dist
from mmfast import nn
from mmfast.train.processes import leave

rank, store, seed = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(seed)
shapes = [(6, 4), (6, 1, 9)]
everyone = [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2)]
close = {"rtol": 1e-9, "atol": 1e-12}


def part(lists):
    return [[x[3 * rank : 3 * rank + 3].clone().requires_grad_() for x in tensors] for tensors in lists]


def gradients(loss, lists):
    return torch.autograd.grad(loss, [x for tensors in lists for x in tensors])


def refused(error, function):
    try:
        function()
    except error as refusal:
        assert "process_group" in str(refusal), refusal
    else:
        raise AssertionError("no refusal")


for backend in ("torch", "cpu", "cuda"):
    for mode in ("relativistic-average", "relativistic-average-hinge", "relativistic-average-lsgan"):
        alone = nn.AdversarialLoss(mode, backend="torch")
        ours = nn.AdversarialLoss(mode, process_group=dist.group.WORLD, backend=backend)
        for step in ("discriminator", "generator"):
            whole = [[x.clone().requires_grad_() for x in tensors] for tensors in everyone]
            mine = part(everyone)
            expected, loss = getattr(alone, step)(*whole), getattr(ours, step)(*mine)
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            torch.testing.assert_close(mean / 2, expected.detach(), **close)
            # each rank's gradient is of all ranks' losses, as DistributedDataParallel averages them
            wanted = [2 * g[3 * rank : 3 * rank + 3] for g in gradients(expected, whole)]
            torch.testing.assert_close(list(gradients(loss, mine)), wanted, **close)
    loss = ours.generator(*mine)
    refused(RuntimeError, lambda: torch.autograd.grad(loss, mine[0], create_graph=True))
    whole = nn.AdversarialLoss(mode, process_group=dist.group.WORLD, reduction="none")
    refused(ValueError, lambda: whole.generator(*mine))
    lecam = nn.LeCam(0.3, discriminators=2, process_group=dist.group.WORLD, backend=backend).double()
    lecam(*part(everyone))
    for buffer, tensors in zip((lecam.real_mean, lecam.fake_mean), everyone):
        torch.testing.assert_close(buffer, torch.stack([x.mean() for x in tensors]), **close)
    separate = nn.LeCam(0.3, discriminators=2, backend=backend).double()
    separate(*part(everyone))
    assert not torch.allclose(separate.real_mean, lecam.real_mean, rtol=1e-3)
# of another number of samples on each rank, a mean of norms by samples or by ranks
for per_sample in (True, False):
    balancer = nn.LossBalancer(
        {"a": 1.0, "b": 3.0}, decay=0.5, per_sample=per_sample, process_group=dist.group.WORLD
    ).double()
    total, mass = torch.zeros(2, 2, dtype=torch.float64), 0.0
    for step in range(2):
        outputs = [torch.randn(2 + other, 5, dtype=torch.float64, requires_grad=True) for other in range(2)]
        norms, counts, found = [], [], []
        for output in outputs:
            losses = {"a": output.square().sum(), "b": output.sin().mean()}
            slopes = [torch.autograd.grad(loss, output, retain_graph=True)[0] for loss in losses.values()]
            norms.append(torch.stack([g.norm(dim=1).mean() if per_sample else g.norm() for g in slopes]))
            counts.append(len(output) if per_sample else 1)
            found.append((losses, slopes))
        # the running means are each rank's own, the factors of all ranks'
        total, mass = 0.5 * total + torch.stack(norms, 1), 0.5 * mass + 1
        means = (total / mass * torch.tensor(counts)).sum(1) / sum(counts)
        losses, slopes = found[rank]
        expected = sum(share * g / mean for share, g, mean in zip((0.25, 0.75), slopes, means))
        torch.testing.assert_close(balancer.gradient(losses, outputs[rank]), expected, **close)
leave(0)
"""


def test_means_over_a_process_group(seed, tmp_path):
    """Two processes with half a batch each: means, losses and gradients are those of one with the whole batch."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-W", "ignore", str(script)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), str(seed)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
