"""What this installation has, and one line of fix for what it lacks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass

import torch

from . import _C, __version__, cuda, ops

TORCH = (2, 10)  # the oldest that the native module runs with
EXTRAS = {
    "transformers": ("hf", "reading and writing model directories"),
    "matplotlib": ("report", "plots"),
    "datasets": ("data", "WikiText-2, when load_demo is given a model's name"),
    "lm_eval": ("eval", "tasks of lm-eval"),
}


@dataclass(frozen=True)
class Finding:
    """One fact; ``fix`` is empty when all is well."""

    what: str
    state: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{'ok' if not self.fix else '--'}  {self.what:<14} {self.state}"
        return f"{line}\n    fix: {self.fix}" if self.fix else line


def examine() -> list[Finding]:
    """Every finding, in the order in which a person would look."""
    found = [
        Finding("fewbit", f"{__version__}, native module {_C.__version__}"),
        _torch(),
        _isa(),
        _cuda(),
        _operators(),
    ]
    for package, (extra, purpose) in EXTRAS.items():
        if importlib.util.find_spec(package) is None:
            found.append(
                Finding(package, f"missing: needed for {purpose}", f"pip install 'fewbit[{extra}]'")
            )
        else:
            found.append(Finding(package, importlib.metadata.version(package)))
    return found


def _torch() -> Finding:
    state = f"{torch.__version__}, {torch.get_num_threads()} threads"
    if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < TORCH:
        wanted = ".".join(map(str, TORCH))
        return Finding("torch", f"{state}: too old", f"pip install --upgrade 'torch>={wanted}'")
    return Finding("torch", state)


def _isa() -> Finding:
    wanted, names = os.environ.get("FEWBIT_ISA"), _C.available_isas()
    state = f"{_C.isa()} in use, {', '.join(names)} available"
    if wanted and wanted not in names:
        return Finding(
            "CPU kernels", f"{state}; FEWBIT_ISA={wanted} is ignored",
            f"set FEWBIT_ISA to one of {', '.join(names)}, or unset it",
        )
    return Finding("CPU kernels", state)


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        return Finding("CUDA", "no GPU that torch can use: everything runs on the CPU")
    name = torch.cuda.get_device_name()
    if not _C.cuda:
        return Finding("CUDA", f"{name}: operators run as plain torch compositions")
    major, minor = torch.cuda.get_device_capability()
    on = [op for op, cards in cuda.verified().items() if 10 * major + minor in cards]
    state = f"{name}, sm_{major}{minor}: verified native kernels: {', '.join(sorted(on)) or 'none'}"
    if cuda.unverified_allowed():
        return Finding("CUDA", f"{state}; FEWBIT_CUDA_UNVERIFIED runs the others too")
    return Finding("CUDA", f"{state}; the other operators run as plain torch compositions")


def _operators() -> Finding:
    """Where each operator of fewbit.ops has a kernel of its own."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    native = {key: sum(has(f"fewbit::{op}", key) for op in ops.__all__) for key in ("CPU", "CUDA")}
    return Finding(
        "operators",
        f"{native['CPU']} with native CPU kernels, {native['CUDA']} with CUDA kernels; "
        "elsewhere they run as plain torch",
    )
