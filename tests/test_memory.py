"""What a process holds: now, at most, and its own alone."""

import subprocess
import sys

import pytest
import torch

from fewbit.memory import peak, reset_peak, resident

MIB = 2**20

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux says what is held now"
)


def test_a_tensor_raises_both_and_a_reset_forgets_it():
    before = resident()
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    assert 60 * MIB < resident() - before < 80 * MIB
    assert peak() >= resident() - MIB
    top = peak()
    del held
    assert peak() >= top - MIB and resident() < top - 50 * MIB
    assert reset_peak() < top - 50 * MIB


def test_a_program_is_not_charged_for_what_started_it():
    held = torch.ones(512 * MIB, dtype=torch.uint8)
    code = "from fewbit.memory import peak; print(peak())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 512 * MIB == held.numel()
