"""What a process holds: now, at most, and its own alone."""

import ctypes
import subprocess
import sys

import pytest
import torch

from fewbit.memory import peak, reset_peak, resident, trim
from fewbit.stats import Stats

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


def test_what_was_freed_in_small_pieces_goes_back_to_the_system():
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this C library returns no memory on demand")
    pieces = [bytes(4000) for _ in range(20000)]
    last = bytes(4000)  # above them: the heap cannot shrink from its end
    held = resident()
    del pieces
    trim()
    assert resident() < held - 60 * 1000**2 and len(last) == 4000


def test_scaled_statistics_take_one_copy_of_a_gram_matrix():
    gram, one = torch.ones(2048, 2048), torch.ones(2048)  # 16 MiB
    held, start = Stats(8, one, one, gram), reset_peak()
    made = held.scaled(2 * one)
    assert float(made.gram.sum()) == 2048**2 / 4 and peak() - start < 24 * MIB


APART = """
import sys, torch
from fewbit.memory import keep_apart, resident
if sys.argv[1] == "apart":
    keep_apart()
torch.ones(32 << 20, dtype=torch.uint8)  # freed: the C library takes what is smaller into its heap
before, small = resident(), []
for _ in range(2):
    large = [torch.ones(8 << 20, dtype=torch.uint8) for _ in range(8)]
    small.append(torch.ones(4096, dtype=torch.uint8))
    del large
print(resident() - before)
"""


def test_what_is_freed_between_small_pieces_goes_back_at_once():
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("this C library always decides by itself")
    left = {}
    for how in ("heap", "apart"):
        command = [sys.executable, "-c", APART, how]
        left[how] = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert left["apart"] < 8 * MIB < left["heap"]
