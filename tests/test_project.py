"""The layout rules that a script can check: who may include whom, one name per op, and so on."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CPP, PYTHON = ROOT / "cpp", ROOT / "python" / "fewbit"
KERNEL_HELPERS = {"dispatch"}


def text(path):
    return path.read_text(encoding="utf-8")


def sources(folder, *suffixes):
    return sorted(p for p in folder.rglob("*") if p.suffix in suffixes)


def includes(path):
    return re.findall(r'^\s*#include\s+[<"]([^>"]+)', text(path), re.M)


def test_top_level_holds_what_the_design_lists():
    allowed = {
        "cpp", "python", "tests", "notebooks", "scripts", "pyproject.toml", "CMakeLists.txt",
        "README.md", "LICENSE", "build", "dist",
    }  # fmt: skip
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    assert found <= allowed, found - allowed


def test_kernels_and_contracts_never_see_torch_or_python():
    for path in sources(CPP / "include", ".h") + sources(CPP / "cpu", ".h", ".cpp"):
        for name in includes(path):
            assert not name.startswith(("torch/", "pybind11/", "ATen/", "c10/", "cuda")), path
            assert "bindings" not in name, path


def test_torch_only_through_the_stable_abi_and_only_in_bindings():
    for path in sources(CPP, ".h", ".cpp", ".cu"):
        torch_headers = [n for n in includes(path) if n.startswith(("torch/", "ATen/", "c10/"))]
        allowed = ("torch/csrc/stable/", "torch/headeronly/")
        assert all(n.startswith(allowed) for n in torch_headers), (path, torch_headers)
        assert not torch_headers or path.parent.name == "bindings", path
        assert ("pybind11/pybind11.h" in includes(path)) == (path.name == "module.cpp"), path


def test_kernel_files_use_no_standard_library_functions():
    """They are compiled per ISA: an inline std:: function could be linked into every ISA."""
    for path in sources(CPP / "cpu", ".h", ".cpp"):
        if path.stem in KERNEL_HELPERS:
            continue
        code = re.sub(r"//.*", "", text(path))
        assert not re.search(r"\bstd::", code), path
        for name in includes(path):
            known = name.startswith("fewbit/") or (path.parent / name).exists()
            assert known or name in ("stdint.h", "stddef.h", "immintrin.h"), (path, name)


def test_objects_hold_no_weak_functions():
    """A weak function in an ISA's object is one that the linker may share between ISAs."""
    found = sorted((ROOT / "build").glob("**/fewbit_avx*.dir/cpu/*.o"))
    objects = [p for p in found if not {"races", "sanitize"} & set(p.parts)]  # inline less
    if not objects or shutil.which("nm") is None:
        pytest.skip("no object files of a build, or no nm")
    for path in objects:
        listing = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        weak = [line for line in listing.stdout.splitlines() if re.search(r" [Wu] ", line)]
        assert not weak, (path, weak)


def registered_ops():
    found = set()
    for path in sources(CPP / "bindings", ".cpp"):
        if path.name == "module.cpp":
            continue
        definitions = re.findall(r'm\.def\((?:\s*"([^"]+)")', text(path))
        found |= {(d.split("(")[0], path.stem) for d in definitions}
    return found


def test_an_op_has_one_name_everywhere():
    from fewbit import ops, reference

    for op, binding in registered_ops():
        assert op in ops.__all__, f"{op} has no wrapper in ops.py"
        assert hasattr(reference, op), f"{op} has no plain version in reference.py"
        assert ops.__dict__[op].__doc__, f"{op} has no docstring"
        for place in (CPP / "include" / "fewbit" / f"{binding}.h", CPP / "cpu" / f"{binding}.cpp"):
            assert place.exists(), f"{op}: {place.relative_to(ROOT)} is missing"
        tests = "\n".join(text(p) for p in (ROOT / "tests").glob("test_*.py"))
        assert f"torch.ops.fewbit.{op}.default" in tests, f"{op} has no opcheck test"


def test_every_op_has_a_fake_kernel():
    import torch

    for op, _ in registered_ops():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fewbit::{op}", "Meta"), op
        composite = "CompositeExplicitAutograd"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fewbit::{op}", composite), op


def imported(path):
    for node in ast.walk(ast.parse(text(path))):
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def top_level_imports(path):
    for node in ast.parse(text(path)).body:
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_module_hides_a_public_name():
    """Importing fewbit.x sets the attribute x of the package: a function x would be gone."""
    import fewbit

    modules = {path.stem for path in PYTHON.glob("*.py")} | {p.name for p in PYTHON.iterdir()}
    assert not modules & set(fewbit._NAMES)


def test_transforms_and_solvers_do_not_know_each_other():
    for path in sources(PYTHON / "transforms", ".py"):
        assert not [n for n in imported(path) if "solvers" in n], path
    for path in sources(PYTHON / "solvers", ".py"):
        assert not [n for n in imported(path) if "transforms" in n], path


def test_optional_packages_are_imported_only_where_they_are_used():
    optional = ("transformers", "matplotlib", "datasets", "lm_eval", "gguf", "numpy")
    for path in sources(PYTHON, ".py"):
        if path.parent.name == "integrations":  # imported by their packages, lazily
            continue
        for name in top_level_imports(path):
            assert name.split(".")[0] not in optional, f"{path} imports {name} on import"


def test_no_pickle_no_remote_code_no_network():
    for path in sources(PYTHON, ".py"):
        code = text(path)
        for forbidden in ("torch.load(", "import pickle", "trust_remote_code=True", "urllib"):
            assert forbidden not in code, f"{path} has {forbidden}"


def test_only_ops_says_torch_ops():
    for path in sources(PYTHON, ".py"):
        assert path.name == "ops.py" or "torch.ops.fewbit" not in text(path), path


def test_files_are_ascii_and_end_with_a_newline():
    for folder in (CPP, PYTHON, ROOT / "tests", ROOT / "scripts"):
        for path in sources(folder, ".py", ".h", ".cpp", ".cu", ".sh", ".txt"):
            data = path.read_bytes()
            assert not data or (data.isascii() and data.endswith(b"\n")), path


@pytest.mark.parametrize("tool", ["ruff", "clang-format"])
def test_sources_are_formatted(tool):
    executable = shutil.which(tool, path=str(Path(sys.executable).parent)) or shutil.which(tool)
    if executable is None:
        pytest.skip(f"{tool} is not installed")
    if tool == "ruff":
        command = [executable, "check", "--no-cache", str(ROOT)]
    else:
        files = [str(p) for p in sources(CPP, ".h", ".cpp", ".cu")]
        command = [executable, "--dry-run", "-Werror", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
