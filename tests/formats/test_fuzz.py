"""The fuzzer on a budget; its own page says how to run more."""

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_checkpoints import run


def test_f23_a_thousand_damaged_directories():
    assert 0 < run(1000, seed=3) < 1000


@pytest.mark.timeout(1500)
def test_f23_a_hundred_thousand_damaged_directories_in_512_mebibytes():
    """In a process of its own, whose peak memory is measured and is a failure above the limit."""
    script = Path(__file__).with_name("fuzz_checkpoints.py")
    command = [sys.executable, script, "--cases", "100000", "--seed", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stderr[-2000:]
    readable, peak = done.stdout.split()[2], done.stdout.split()[-2]
    assert 0 < int(readable) < 100_000 and int(peak) < 512, done.stdout
