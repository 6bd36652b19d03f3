"""Fixtures: every instruction set of this CPU, and where the shared models and texts lie."""

import os
from pathlib import Path

import pytest
import torch

from fewbit import _C
from fewbit.reproducible import strict

strict()  # before the first product of any test

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("FEWBIT_SHARED", ROOT.parent / "shared"))


def pytest_addoption(parser):
    parser.addoption(
        "--nan-fill",
        action="store_true",
        help="torch fills fresh memory with NaN, so that a result left unset is seen",
    )


@pytest.fixture(autouse=True)
def nan_fill(request):
    if not request.config.getoption("--nan-fill"):
        yield
        return
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


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
