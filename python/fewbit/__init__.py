"""fewbit: quantise language models after training.

>>> report = fewbit.quantize_(model, "awq", scheme="w4a16g128", calibration=texts)
>>> fewbit.save(model, "out/", tokenizer=tokenizer)
>>> model = fewbit.load("out/")
"""

from __future__ import annotations

import importlib

import torch as _torch  # the native module needs its libraries loaded

try:
    from . import _C
except ImportError as error:
    from .errors import InstallError

    raise InstallError(
        f"the native module does not load with torch {_torch.__version__}, which must be 2.10 or "
        f"newer: {error}"
    ) from error
from . import integrations as _integrations

__version__ = _C.__version__

# Public names, by the module that holds them; loaded on first use.
_NAMES = {
    "quantize_": "pipeline",
    "quantize_directory": "stream",
    "restore_": "undo",
    "sweep_": "sweep",
    "save": "checkpoint",
    "load": "checkpoint",
    "convert": "conversion",
    "perplexity": "evaluate",
    "Perplexity": "evaluate",
    "PackedLinear": "linear",
    "Scheme": "scheme",
    "Codes": "scheme",
    "Stats": "stats",
    "Recipe": "recipes",
    "Report": "report",
    "FewbitError": "errors",
}
_MODULES = ("ops", "recipes", "lab", "errors", "families", "formats", "reference")

__all__ = [*_NAMES, *_MODULES, "__version__"]


def __getattr__(name: str):
    if name in _NAMES:
        value = getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'fewbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_integrations.install()  # transformers' from_pretrained, once transformers is imported
