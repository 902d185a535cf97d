"""The Python parts of gpu_check.sh, each a subcommand. Lines that begin with "RESULT: " go into its summary.

small       each GPU backend once against float64, on a few sizes; what compute-sanitizer runs
numerics    the numerics rule for each backend, dtype and mode: errors beside PyTorch's, as a table and numerics.json
graph       a forward and backward captured in a CUDA graph and replayed on new data; the same on a side stream
speed       forward and forward + backward beside PyTorch's formula, eager and compiled, as a table and speed.json
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import mmfast
from mmfast.numerics import ENOUGH, Errors

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: The formulas as PyTorch users write them.
PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "non-saturating": lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
    "hinge": lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
    "lsgan": lambda real, fake: (real - 1).square().mean() + fake.square().mean(),
    "wasserstein": lambda real, fake: fake.mean() - real.mean(),
}


def backends(device: str) -> list[str]:
    return ["cuda", "triton"] if device == "cuda" else ["cuda"]


def draw(generator: torch.Generator, n: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(n, generator=generator) * 3).to(dtype)


def ours(real: Tensor, fake: Tensor, mode: str, backend: str) -> Tensor:
    return mmfast.functional.adversarial_discriminator_loss(real, fake, mode, backend=backend)


def gradients(loss: Callable[[Tensor, Tensor], Tensor], real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """(the loss (1,), its gradients by real and fake in a row), detached."""
    leaves = [x.detach().requires_grad_() for x in (real, fake)]
    out = loss(*leaves)
    return out.detach().reshape(1), torch.cat(torch.autograd.grad(out, leaves, torch.full_like(out, 1.5)))


def small(arguments: argparse.Namespace) -> int:
    generator = torch.Generator().manual_seed(arguments.seed)
    worst = 0.0
    for backend in backends(arguments.device):
        for mode, plain in PLAIN.items():
            for n in (1, 129, 4097, 20001):
                real, fake = (draw(generator, n, torch.float32) for _ in range(2))
                found = gradients(
                    lambda r, f, m=mode, b=backend: ours(r, f, m, b),
                    real.to(arguments.device),
                    fake.to(arguments.device),
                )
                exact = gradients(plain, real.double(), fake.double())
                for x, y in zip(found, exact, strict=True):
                    error = float((x.cpu().double() - y).abs().max() / y.abs().max())
                    worst = max(worst, error)
                    if not error < 1e-5:
                        print(f"RESULT: {backend}, {mode}, n = {n}: relative error {error:.3g}")
                        return 1
    print(f"RESULT: {', '.join(backends(arguments.device))}: relative error at most {worst:.2g}")
    return 0


def numerics(arguments: argparse.Namespace) -> int:
    rows, failures = [], 0
    n, runs = 200, 40 if arguments.device == "cpu" else ENOUGH
    print(f"{'backend':8} {'dtype':9} {'mode':15} {'output':9} {'rms':>9} {'torch':>9} {'max':>9} {'torch':>9}")
    for backend in backends(arguments.device):
        for dtype in DTYPES:
            for mode, plain in PLAIN.items():
                generator = torch.Generator().manual_seed(arguments.seed)
                errors = {"gradients": Errors("gradients"), "loss": Errors("loss")}
                # gradients have enough values after a few runs; a lone loss has only one each
                for run in range(runs if mode == "non-saturating" else 40):
                    real, fake = (draw(generator, n, dtype) for _ in range(2))
                    exact = gradients(plain, real.double(), fake.double())
                    real, fake = real.to(arguments.device), fake.to(arguments.device)
                    yardstick = gradients(plain, real, fake)
                    found = gradients(lambda r, f, m=mode, b=backend: ours(r, f, m, b), real, fake)
                    errors["loss"].add(found[0], yardstick[0], exact[0])
                    if run < 40:
                        errors["gradients"].add(found[1], yardstick[1], exact[1])
                for name, pool in errors.items():
                    c = pool.compare()
                    verdict = ("passes" if c.passes else "FAILS") if pool.enough else "too few to judge"
                    failures += verdict == "FAILS"
                    rows.append(
                        {
                            "backend": backend,
                            "dtype": str(dtype).removeprefix("torch."),
                            "mode": mode,
                            "output": name,
                            "values": c.count,
                            "rms": c.ours.rms,
                            "torch rms": c.yardstick.rms,
                            "max": c.ours.max,
                            "torch max": c.yardstick.max,
                            "verdict": verdict,
                        }
                    )
                    row = rows[-1]
                    print(
                        f"{backend:8} {row['dtype']:9} {mode:15} {name:9} {c.ours.rms:9.2e} {c.yardstick.rms:9.2e} "
                        f"{c.ours.max:9.2e} {c.yardstick.max:9.2e} {verdict}"
                    )
    write(arguments, "numerics.json", rows)
    judged = [row for row in rows if row["verdict"] != "too few to judge"]
    print(f"RESULT: the rule is kept in {len(judged) - failures} of {len(judged)} cases")
    return int(failures > 0)


def graph(arguments: argparse.Namespace) -> int:
    for backend in backends(arguments.device):
        real, fake = (torch.randn(5000, device="cuda").requires_grad_() for _ in range(2))

        def step(b: str = backend, r: Tensor = real, f: Tensor = fake) -> tuple[Tensor, ...]:
            out = ours(r, f, "non-saturating", b)
            return (out, *torch.autograd.grad(out, (r, f)))

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                on_side = step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        expected = step()
        if not all(torch.equal(x, y) for x, y in zip(on_side, expected, strict=True)):
            print(f"RESULT: {backend}: a side stream gives another result")
            return 1
        # a kernel on the wrong stream would read the data before this slow stream has written them
        with torch.cuda.stream(side), torch.no_grad():
            torch.cuda._sleep(20_000_000)
            real.mul_(0.5)
            late = ours(real, fake, "non-saturating", backend)
        side.synchronize()
        if not torch.equal(late, ours(real, fake, "non-saturating", backend).detach()):
            print(f"RESULT: {backend}: a kernel did not wait for its stream")
            return 1
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            results = step()
        for _ in range(3):
            with torch.no_grad():
                real.copy_(torch.randn_like(real))
                fake.copy_(torch.randn_like(fake))
            captured.replay()
            torch.cuda.synchronize()
            if not all(torch.equal(x, y) for x, y in zip(results, step(), strict=True)):
                print(f"RESULT: {backend}: a replayed graph gives another result")
                return 1
        print(f"RESULT: {backend}: side stream and CUDA graph give the eager bits")
    return 0


def speed(arguments: argparse.Namespace) -> int:
    sizes = [64, 4096, 262_144, 16_777_216] if arguments.device == "cuda" else [64, 4096]
    rows = []
    print(f"{'n':>9} {'dtype':9} {'contender':15} {'forward us':>11} {'both us':>9} {'GB/s':>7}")
    for dtype in DTYPES[::2]:
        for n in sizes:
            real, fake = (torch.randn(n, device=arguments.device).to(dtype).requires_grad_() for _ in range(2))
            plain = PLAIN["non-saturating"]
            contenders = {"torch": plain}
            if arguments.device == "cuda":
                contenders["torch.compile"] = torch.compile(plain)
            for backend in backends(arguments.device):
                contenders[backend] = lambda r, f, b=backend: ours(r, f, "non-saturating", b)
            for name, loss in contenders.items():

                def forward(loss: Callable = loss, r: Tensor = real, f: Tensor = fake) -> None:
                    with torch.no_grad():
                        loss(r, f)

                def both(loss: Callable = loss, r: Tensor = real, f: Tensor = fake) -> None:
                    torch.autograd.grad(loss(r, f), (r, f))

                one, two = (microseconds(run, arguments.device) for run in (forward, both))
                # logits are read twice and gradients written once
                rate = 6 * n * dtype.itemsize / two / 1e3
                rows.append({"n": n, "dtype": str(dtype), "contender": name, "forward": one, "both": two, "GB/s": rate})
                print(f"{n:9} {str(dtype)[6:]:9} {name:15} {one:11.1f} {two:9.1f} {rate:7.1f}", flush=True)
    write(arguments, "speed.json", rows)
    for n in sizes:
        line = {row["contender"]: row["both"] for row in rows if row["n"] == n and row["dtype"] == "torch.float32"}
        print(f"RESULT: n = {n}, float32, both: " + ", ".join(f"{name} {us:.1f} us" for name, us in line.items()))
    return 0


def microseconds(run: Callable[[], None], device: str) -> float:
    """The median time of a call: of 20 rounds of 10 calls, the device waited for at the end of each round."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(5):
        run()
    wait()
    rounds = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(10):
            run()
        wait()
        rounds.append((time.perf_counter() - began) / 10 * 1e6)
    return statistics.median(rounds)


def write(arguments: argparse.Namespace, name: str, rows: list[dict]) -> None:
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    facts = {"device": device, "torch": torch.__version__, "mmfast": mmfast.__version__, "rows": rows}
    (arguments.out / name).write_text(json.dumps(facts, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["small", "numerics", "graph", "speed"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path())
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    return {"small": small, "numerics": numerics, "graph": graph, "speed": speed}[arguments.part](arguments)


if __name__ == "__main__":
    sys.exit(main())
