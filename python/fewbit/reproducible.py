"""Sums over whole tensors, and linear algebra, with the same bits on any number of threads.

Sums over the last dimension of a matrix have them; sums over all elements have not, nor has what
LAPACK does (factors, eigenvalues, solves), nor, on some processors, a matrix product (``strict``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

BLOCK = 4096  # a sum of fewer than 32768 elements is never shared between threads
PIECE = BLOCK << 8  # elements widened at once


def strict() -> None:
    """Matrix products with the same bits on any number of threads, from MKL's own mode for it.

    Newer MKL cuts the sums of some shapes by the number of threads (seen on processors with AMX).
    It reads the mode at its first product in a process and keeps it, and products with one row
    take twice as long in it: the command line asks for it where weights are quantised, and a
    program of its own may do so by calling this first. The mode knows Intel's processors; on
    others each of its settings does the reverse (seen on Zen 4: products in float64 depend on the
    threads in it, and on none without), so there nothing is asked for.
    """
    if _intel():
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def _intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux, where torch has no MKL
        return False


def total(x: Tensor) -> float:
    """Sum of all elements of ``x``, any shape and float type, in float64.

    ``Tensor.sum()`` cuts a large tensor into as many parts as there are threads; sums over a last
    dimension are shared row by row, so that fixed blocks give the same bits everywhere. In pieces,
    because torch widens all that it sums in another type.
    """
    x = x.detach().reshape(-1)
    while len(x) > BLOCK:
        x = torch.cat([part for piece in x.split(PIECE) for part in _sums(piece)])
    return float(x.sum(dtype=torch.float64))


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of whole blocks, and what is left."""
    whole = len(x) // BLOCK * BLOCK
    return x[:whole].reshape(-1, BLOCK).sum(1, dtype=torch.float64), x[whole:].double()


def norm(x: Tensor) -> float:
    """The Euclidean norm of all elements, squared and summed in float64."""
    return total(x.detach().double().square()) ** 0.5


@contextmanager
def one_thread() -> Iterator[int]:
    """MKL cuts its sums by the number of threads: one thread gives everybody the same bits. Yields
    how many there were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
