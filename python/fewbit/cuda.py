"""On which cards which CUDA kernels run: those that were verified there, on a real one.

``verified.json`` beside this file lists, per op, the compute capabilities (75 is a T4) on which
``scripts/gpu_check.py`` compared the kernel with reference.py and found it right. Everywhere else
an op runs as its plain twin. ``FEWBIT_CUDA_UNVERIFIED=1`` lets every kernel run on every card.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from . import _C

VERIFIED = Path(__file__).with_name("verified.json")


def verified() -> dict[str, list[int]]:
    """Op to the compute capabilities on which its kernel was checked."""
    return json.loads(VERIFIED.read_text(encoding="utf-8"))["verified"]


def unverified_allowed() -> bool:
    """Whether FEWBIT_CUDA_UNVERIFIED asks for kernels that no card has confirmed."""
    return os.environ.get("FEWBIT_CUDA_UNVERIFIED", "0") not in ("", "0")


def hand_over() -> None:
    """Tell the native module; done once, when the operators are imported."""
    for op, architectures in verified().items():
        for architecture in architectures:
            _C.set_verified(op, architecture)
    _C.allow_unverified(unverified_allowed())
