"""Fixtures: every instruction set of this CPU, and where the shared models and texts lie."""

import os
from pathlib import Path

import pytest
import torch

from fewbit import _C

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("FEWBIT_SHARED", ROOT.parent / "shared"))


@pytest.fixture(params=_C.available_isas())
def isa(request):
    """Runs the test once per instruction set that this machine has."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def shared():
    """The folder with real text and small trained models; the test is skipped without it."""
    if not (SHARED / "models").is_dir():
        pytest.skip(f"shared models and texts are not at {SHARED} (set FEWBIT_SHARED)")
    return SHARED
