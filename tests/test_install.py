"""What an installation brings, and what an import does not do."""

import importlib.metadata
import json
import subprocess
import sys
import tarfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT
from fewbit import doctor

IMPORT = """
import json, os, sys, threading, torch

def threads():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0

WATCHED = {"socket.connect", "subprocess.Popen", "os.system", "os.exec", "shutil.rmtree"}
seen, before, started = [], set(sys.modules), threads()

def watch(event, args):
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if event in WATCHED or writes and "__pycache__" not in str(args[0]):
        seen.append(f"{event} {args[:1]}")

sys.addaudithook(watch)
import fewbit
seen = list(seen)
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(json.dumps({"seen": seen, "new": sorted(new), "threads": threads() - started}))
"""


def needs(package, found=None):
    """Every distribution that ``package`` needs here, with extras of nothing, itself included."""
    found = set() if found is None else found
    name = canonicalize_name(package)
    if name not in found:
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needs(requirement.name, found)
    return found


def test_the_core_adds_two_distributions_to_torch():
    text = (ROOT / "pyproject.toml").read_text()
    line = next(t for t in text.splitlines() if t.startswith("dependencies = "))
    own = [Requirement(r).name for r in json.loads(line.removeprefix("dependencies = "))]
    added = set().union(*(needs(name) for name in own)) - needs("torch")
    assert "torch" in own and added == {"safetensors", "tqdm"}


def test_an_import_loads_nothing_else_starts_nothing_and_says_nothing():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.loads(done.stdout) == {"seen": [], "new": ["fewbit"], "threads": 0}


def test_the_command_line_starts_without_transformers():
    code = (
        "import sys; from fewbit.cli import main; main(['doctor']); "
        "sys.exit('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_the_source_archive_builds(tmp_path):
    """It holds all that a build reads, so that a machine without a wheel for it can make one."""
    build = pytest.importorskip("scikit_build_core.build")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        archive = tmp_path / build.build_sdist(str(tmp_path))
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "cpp", "python", "CMakeLists.txt", "pyproject.toml", "README.md",
         "LICENSE"], cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if tracked.returncode == 0:
        assert set(tracked.stdout.split()) <= names
    assert not [n for n in names if n.startswith(("build", "notebooks", "dist"))]
    assert archive.stat().st_size < 5e6


def test_doctor_has_one_fix_line_for_every_problem(monkeypatch):
    found = {f.what: f for f in doctor.examine()}
    assert {"fewbit", "torch", "CPU kernels", "CUDA", "operators", "transformers"} <= set(found)
    assert "in use" in found["CPU kernels"].state and found["operators"].fix == ""
    monkeypatch.setenv("FEWBIT_ISA", "sse9")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.torch, "__version__", "2.9.1")
    problems = [f for f in doctor.examine() if f.fix]
    assert {"torch", "CPU kernels", "transformers", "matplotlib"} <= {f.what for f in problems}
    for finding in problems:
        assert "\n" not in finding.fix and str(finding).count("\n    fix: ") == 1
