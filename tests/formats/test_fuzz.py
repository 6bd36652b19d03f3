"""The fuzzer on a budget; its own page says how to run more."""

import pytest
from fuzz_checkpoints import run


def test_a_thousand_damaged_directories():
    assert 0 < run(1000, seed=3) < 1000


@pytest.mark.timeout(1200)
def test_a_hundred_thousand_damaged_directories():
    assert 0 < run(100_000, seed=4) < 100_000
