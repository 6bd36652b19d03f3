"""Other libraries, met when they are imported and never before.

``import fewbit`` must not cost the import of transformers, and must not depend on which of the two
comes first. So a hook waits for the module that holds transformers' quantizers.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder

AWAITED = "transformers.quantizers.auto"
SECTION = "fewbit_online"  # of config.json: what a model computes beside its weights (runtime.py)


class _Hook(MetaPathFinder):
    """Runs ``register`` right after ``AWAITED`` was imported, then is gone."""

    def find_spec(self, name, path=None, target=None):
        if name != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            register()

        spec.loader.exec_module = execute_and_register
        return spec


def install() -> None:
    """Register with transformers, now if it is loaded, else as soon as it is."""
    if AWAITED in sys.modules:
        register()
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


def register() -> None:
    """Let ``from_pretrained`` load what fewbit reads."""
    from . import hf  # noqa: F401 - registers itself


def attach(model, section: dict | None = None) -> None:
    """Make a transformers model's ``save_pretrained`` write its quantised form."""
    if AWAITED in sys.modules and hasattr(model, "save_pretrained"):
        from . import hf

        hf.attach(model, section)


def detach(model) -> None:
    """Undo ``attach``."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    if config is not None:
        config.__dict__.pop(SECTION, None)
