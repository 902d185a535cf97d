"""What is installed is what the design says: one native library, imported in one place, described by one README."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmfast
from mmfast import config, info, native
from mmfast.bench.report import environment

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "mmfast").rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    """Every module that a file imports, by statement or by importlib.import_module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
            # a name of ours that is made at run time may be any library's
            made = [argument.values[0] for argument in node.args if isinstance(argument, ast.JoinedStr)]
            names |= {"mmfast._C" for part in made if str(getattr(part, "value", "")).startswith("mmfast.")}
    return names


def test_the_version_is_the_distribution_s():
    assert mmfast.__version__ == importlib.metadata.version("mmfast") == native.library().version


def test_the_wheel_holds_python_and_the_native_library_only():
    files = [str(path) for path in importlib.metadata.files("mmfast")]
    assert any(re.fullmatch(r"mmfast/_C\..*\.so", path) for path in files)
    strangers = [path for path in files if not path.startswith(("mmfast/", "mmfast-", "../../../bin/mmfast"))]
    assert strangers == []


def test_only_native_imports_the_native_libraries():
    importers = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(name.rpartition(".")[2] in ("_C", "_emulator") for name in imported_names(path))
    }
    assert importers == {"mmfast/native.py"}


def test_native_code_includes_no_torch_header():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_kernels_instantiate_no_standard_library_templates():
    """The linker keeps one copy of a template for all instruction sets: see csrc/cpu/simd.h."""
    kernels = [path for path in (ROOT / "csrc/cpu").iterdir() if path.name != "entry.cpp"]
    assert kernels
    for path in kernels:
        assert "std::" not in path.read_text(), path


def test_every_environment_variable_is_parsed_in_config_and_listed_in_readme():
    parsed = set(re.findall(r'"(MMFAST_[A-Z_]+)"', Path(config.__file__).read_text()))
    built = set(re.findall(r"ENV\{(MMFAST_[A-Z_]+)\}", (ROOT / "CMakeLists.txt").read_text()))
    listed = set(re.findall(r"^\| `(MMFAST_[A-Z_]+)`", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert parsed | built == listed
    for path in SOURCES:
        if path.name != "config.py":
            assert not re.search(r"environ.*MMFAST_", path.read_text()), path


def test_info_names_what_is_loaded(capsys):
    assert info.main(as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["native library"]["instruction set"].startswith(native.isa())
    assert report["backends"]["cpu"]["adversarial"] == "yes"
    assert set(report["backends"]["torch"].values()) == {"yes"}


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("No module named 'mmfast._C'", "what is installed is for another Python (_C."),
        ("No module named 'mmfast._D'", "with a C++ compiler on PATH: pip install --force-reinstall"),
        ("libgomp.so.1: cannot open shared object file", "apt install libgomp1"),
        ("/lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found", "build it on this one"),
    ],
)
def test_a_library_that_does_not_load_is_diagnosed_with_what_mends_it(monkeypatch, capsys, error, remedy):
    name = error.partition("mmfast.")[2].strip("'") or "_C"

    def fail(module):
        raise ImportError(error)

    with monkeypatch.context() as patched:
        patched.setattr(native.importlib, "import_module", fail)
        reason = native._load.__wrapped__(name)[1]
    assert error in reason
    assert remedy in reason
    monkeypatch.setattr(native, "_load", lambda name="_C": (None, reason))
    assert info.main() == 0
    assert error.split()[0] in capsys.readouterr().out


def test_the_commit_is_that_of_the_build_wherever_one_is(tmp_path, monkeypatch):
    monkeypatch.setattr(info, "__file__", str(tmp_path / "info.py"))
    assert info.commit() == mmfast.__version__
    (tmp_path / "commit").write_text("0123abc-dirty\n")
    assert info.commit() == info.collect()["software"]["commit"] == environment("cpu")["commit"] == "0123abc-dirty"


def test_info_fits_100_columns():
    output = subprocess.run(
        [sys.executable, "-m", "mmfast", "info"], capture_output=True, text=True, check=True, cwd="/"
    ).stdout
    assert "instruction set" in output
    assert max(len(line) for line in output.splitlines()) <= 100


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_an_instruction_set_can_be_chosen(name):
    best = native.isa()
    if name not in native.supported_isas():
        with pytest.raises(ValueError, match="instruction set"):
            native.set_isa(name)
        return
    try:
        native.set_isa(name)
        assert native.isa() == name
    finally:
        native.set_isa(best)


def test_a_wrong_MMFAST_ISA_leaves_torch_serving_and_says_why():
    code = "from mmfast import native; print(native.available(), native.load_error())"
    output = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env=os.environ | {"MMFAST_ISA": "avx1024"},
    ).stdout
    assert output.startswith("False MMFAST_ISA=avx1024 is not one of: ")


def test_an_unknown_MMFAST_BACKEND_is_refused_where_it_is_used():
    code = (
        "import torch, mmfast\n"
        "try:\n    mmfast.nn.AdversarialLoss().generator(torch.randn(3))\n"
        "except ValueError as error:\n    print(error)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env=os.environ | {"MMFAST_BACKEND": "gpu"},
    ).stdout
    assert output.startswith("unknown backend 'gpu'; mmfast has: torch, cpu, triton, cuda")
