"""The factor of a Hessian that the second-order solvers read, and the ladder that always gives one.

H = X^T X is scaled by a power of two to a mean diagonal near 1, so that tiny and huge activations
are alike, damped by a share of its mean diagonal, and factored as H = V V^T, V upper triangular, in
solving order: one Cholesky factorisation of the reversed matrix, and no inverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import HessianError
from ..reproducible import one_thread
from ..stats import sum_type

RUNGS = ("damp", "damp x 10", "damp x 100", "damp x 1000", "floor", "rtn")
ROWS = 64  # moved at a time: a factor needs little more memory than its own
BLOCK, PIECE = 128, 128  # columns and rows of a piece of linear algebra
WIDE = 512  # columns of one product: MKL packs them all, for every thread


@dataclass
class Factor:
    """``c`` [K, K]: V_jk / V_kk (ops.gptq); ``diagonal`` [K]: V_kk, both of sum_type(K) and in
    solving order; ``order`` int64 [K] or None; ``exponent``: V V^T is 2**-exponent (H + damping).

    ``rung`` names the step of the ladder that was needed (RUNGS), ``damp`` the share of the mean
    diagonal that was added, ``dead`` the columns that no token excites: nothing is compensated into
    them, so they keep the values of plain rounding.
    """

    c: Tensor
    diagonal: Tensor
    order: Tensor | None
    exponent: int
    damp: float
    rung: int
    dead: int

    @property
    def importance(self) -> Tensor:
        """V_kk^2 in the order of the weight's columns: what a squared error of one column costs
        once the later columns have compensated it."""
        squares = self.diagonal.square()
        return squares if self.order is None else torch.empty_like(squares).scatter_(
            0, self.order, squares
        )

    @property
    def v(self) -> Tensor:
        """V itself, float64 [K, K]."""
        return self.c.to(torch.float64, copy=True).mul_(self.diagonal)

    def info(self) -> dict:
        """What the Report says about it."""
        return {
            "rung": self.rung, "ladder": RUNGS[self.rung], "damp": self.damp, "dead": self.dead
        }


def factorize(gram: Tensor, damp: float = 0.01, order: Tensor | None = None) -> Factor | None:
    """The factor of the first rung that succeeds; None where only plain rounding is left.

    Rungs: ``damp``, ten, a hundred and a thousand times that, then eigenvalues raised to ``damp``;
    None when ``gram`` [K, K] holds NaN or infinities. Raises CalibrationError when it is all zero:
    no activation has reached the layer, and rounding it plainly would hide that.
    """
    if not _finite(gram):
        return None
    diagonal = gram.diagonal().double()
    live = diagonal > 0
    if gram.numel() and not bool(live.any()):
        raise HessianError(
            "the Hessian is zero: no calibration token excites any input of this layer"
        )
    mean = float(diagonal.mean()) if gram.numel() else 1.0
    exponent = math.frexp(mean)[1]
    dead = int((~live).sum())
    for rung in range(len(RUNGS) - 1):
        floor = RUNGS[rung] == "floor"
        share = damp if rung == 0 else max(damp, 1e-3) * (1.0 if floor else 10.0**rung)
        m = _reversed_scaled(gram, order, exponent)
        level = math.ldexp(mean, -exponent)
        _raise_diagonal(m, level, 0.0 if floor else share)
        if floor:
            m = _floored(m, level * share)
        if _cholesky_(m):
            diagonal = m.diagonal().clone()
            m.div_(diagonal)
            if _finite(m) and _finite(diagonal):
                return Factor(m, diagonal, order, exponent, share, rung, dead)
        del m
    return None


def _finite(t: Tensor) -> bool:
    """No NaN (which aminmax hands on) and no infinity; isfinite would hold copies of ``t``."""
    return not t.numel() or all(math.isfinite(float(end)) for end in torch.aminmax(t))


def scaled(matrix: Tensor, exponent: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``matrix`` times 2**-exponent, a copy; in two steps, so that no factor leaves the range."""
    half = -exponent // 2
    return matrix.to(dtype, copy=True).mul_(2.0**half).mul_(2.0 ** (-exponent - half))


def _reversed_scaled(gram: Tensor, order: Tensor | None, exponent: int) -> Tensor:
    """A scaled copy of ``gram`` with the column that is solved last first."""
    size = gram.shape[0]
    last = torch.arange(size - 1, -1, -1, device=gram.device) if order is None else order.flip(0)
    m = gram.new_empty(gram.shape, dtype=sum_type(size, gram.device))
    for start in range(0, size, ROWS):
        rows = last[start : start + ROWS]
        m[start : start + ROWS] = gram.index_select(0, rows).index_select(1, last)
    half = -exponent // 2
    return m.mul_(2.0**half).mul_(2.0 ** (-exponent - half))


def _raise_diagonal(m: Tensor, level: float, share: float) -> None:
    """Add ``share`` of the mean diagonal ``level``; a column without any energy gets the mean."""
    diagonal = m.diagonal()
    diagonal.copy_(torch.where(diagonal > 0, diagonal + share * level, level * (1 + share)))


def _floored(m: Tensor, least: float) -> Tensor:
    """``m`` with its eigenvalues raised to at least ``least``, in float64."""
    with one_thread():
        values, vectors = torch.linalg.eigh(m.double())
        return ((vectors * values.clamp(min=least)) @ vectors.T).to(m.dtype)


def _cholesky_(m: Tensor) -> bool:
    """Turn ``m``, the reversal of H, into V in place; False when it is not positive definite."""
    if not (_lower_(m) if m.device.type == "cpu" else _lower_at_once_(m)):
        return False
    for rows in _halves(m.shape[0]):  # the reversal of the lower factor is V
        upper, lower = m[rows], m[m.shape[0] - rows.stop : m.shape[0] - rows.start]
        swap = upper.flip(0, 1)
        upper.copy_(lower.flip(0, 1))
        lower.copy_(swap)
    middle = m.shape[0] // 2
    if m.shape[0] % 2:
        m[middle] = m[middle].flip(0)
    return True


def _lower_at_once_(m: Tensor) -> bool:
    columns, info = m.mT, torch.empty((), dtype=torch.int32, device=m.device)
    torch.linalg.cholesky_ex(columns, upper=True, out=(columns, info))  # in place
    return int(info) == 0


def _lower_(m: Tensor) -> bool:
    """The lower Cholesky factor in place of ``m``, BLOCK columns at a time, their rows in pieces:
    LAPACK's own bits depend on the number of threads."""
    size = m.shape[0]
    with pieces_of_one_thread() as run:
        for begin in range(0, size, BLOCK):
            end = min(begin + BLOCK, size)
            diagonal, panel = m[begin:end, begin:end], m[end:, begin:end]
            factor, info = torch.linalg.cholesky_ex(diagonal)
            if int(info) != 0:
                return False
            diagonal.copy_(factor)
            if end == size:
                break

            def solve(rows: Tensor, factor: Tensor = factor) -> None:
                rows.copy_(torch.linalg.solve_triangular(factor.mT, rows, upper=True, left=False))

            def update(start: int, panel: Tensor = panel, end: int = end) -> None:
                stop = min(start + PIECE, size)
                for left in range(end, stop, WIDE):
                    right = min(left + WIDE, stop)
                    a, b = panel[start - end : stop - end], panel[left - end : right - end]
                    m[start:stop, left:right].addmm_(a, b.mT, alpha=-1)

            run(solve, panel.split(PIECE))
            run(update, range(end, size, PIECE))
    m.tril_()
    return True


def _halves(size: int) -> Iterator[slice]:
    """Slices of the upper half of the rows."""
    for start in range(0, size // 2, ROWS):
        yield slice(start, min(start + ROWS, size // 2))


@contextmanager
def pieces_of_one_thread() -> Iterator[Callable[[Callable, Sequence], list]]:
    """A map over pieces of work that run side by side, each in one thread: the same bits on any
    number of threads, where the pieces do not depend on it."""
    with one_thread() as threads:
        if threads == 1:
            yield lambda function, pieces: [function(piece) for piece in pieces]
            return
        one_each = {"initializer": torch.set_num_threads, "initargs": (1,)}
        with ThreadPoolExecutor(threads, **one_each) as pool:
            yield lambda function, pieces: list(pool.map(torch.no_grad()(function), pieces))


def by_rows(function: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """``function(w)``, for one that treats the rows of ``w`` alone, in pieces of PIECE rows."""
    if w.device.type != "cpu":
        return function(w)
    with pieces_of_one_thread() as run:
        return torch.cat(run(function, w.split(PIECE)))
