"""Kernels are written in the primitives of device.h alone, so that the emulator runs what the GPU runs."""

import pathlib
import re

import pytest

CSRC = pathlib.Path(__file__).resolve().parent.parent / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
#: what several kernels share
HEADERS = sorted(path for path in (CSRC / "cuda").glob("*.h") if path.name != "device.h")

FORBIDDEN = {
    "a launch": r"<<<|>>>\s*\(",
    "a qualifier": r"__(global|device|host|shared|constant|managed|launch_bounds|grid_constant|forceinline|restrict)__",
    "extern": r"\bextern\b",
    "inline PTX": r"\basm\b|__asm",
    "an intrinsic": r"\b__(?!COUNTER__)[a-z]\w*\s*\(",
    "a built-in index": r"\b(threadIdx|blockIdx|blockDim|gridDim|warpSize)\b",
    "the runtime": r"\bcuda[A-Z]\w*|\bcu[A-Z]\w*\(",
    "a CUDA header": r"#include\s*[<\"](cuda(?!/\w+\.h\")|cooperative_groups|mma|nv|cub|thrust)",
    "a CUDA type": r"\b(__half|__nv_bfloat16|nv_bfloat16|half2?|float[234]|int[234]|uint[234])\b",
    "cooperative groups": r"cooperative_groups|\bcg::",
    "the standard library": r"#include\s*<(vector|string|memory|algorithm|map)>",
}


def violations(source: str) -> list[str]:
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)
    return [f"{what}: {match.group()}" for what, rule in FORBIDDEN.items() for match in re.finditer(rule, code)]


def test_there_are_kernels():
    assert KERNELS


@pytest.mark.parametrize("path", [*KERNELS, *HEADERS], ids=lambda path: path.name)
def test_kernels_use_device_h_alone(path):
    source = path.read_text()
    assert '#include "cuda/device.h"' in source
    assert violations(source) == []


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_are_emulated(path):
    """csrc/emulator/<op>.cpp includes cuda/<op>.cu."""
    assert f'#include "cuda/{path.name}"' in (CSRC / "emulator" / f"{path.stem}.cpp").read_text()


@pytest.mark.parametrize(
    "planted",
    [
        "run<<<1, 32>>>(x);",
        "__shared__ float x[32];",
        "extern float y;",
        'asm("ex2.approx.ftz.f32 %0, %1;");',
        "y = __shfl_sync(mask, x, 0);",
        "int i = threadIdx.x;",
        "cudaMemcpy(a, b, n, k);",
        "#include <cuda_bf16.h>",
        "__nv_bfloat16 x;",
        "namespace cg = cooperative_groups;",
        "#include <vector>",
    ],
)
def test_each_rule_sees_what_it_forbids(planted):
    assert violations(planted)
    assert not violations(f"// {planted}")
