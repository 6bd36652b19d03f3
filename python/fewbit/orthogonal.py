"""Orthogonal matrices for rotations, kept in the form in which they are cheap to apply.

Row vectors throughout: a rotated activation is ``x R``. The kinds are those of QuaRot (S. Ashkboos
et al., 2024): "hadamard", "random-hadamard" (random signs first), "random" (Haar), and a given
matrix. ``keeps_mean`` asks for R 1 = 1 and 1^T R = 1^T: the mean over channels passes through such
a rotation unchanged, so that LayerNorm(x R) = LayerNorm(x) R and a LayerNorm model stays one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import UsageError
from .hadamard import LARGEST, WIDEST, Plan, plan, transform
from .reproducible import one_thread
from .scheme import check_int

KINDS = ("hadamard", "random-hadamard", "random")


class Rotation:
    """An orthogonal R [n, n] in float64: ``right(w)`` is w R, ``right_t(w)`` is w R^T.

    ``signs`` [n] and ``plan`` describe diag(signs) H; otherwise ``dense`` holds the matrix. They
    stay on the CPU, where they were drawn; w may be on any device.
    """

    def __init__(
        self, n: int, plan: Plan | None = None, signs: Tensor | None = None,
        dense: Tensor | None = None,
    ) -> None:
        self.n, self.plan, self.signs, self.dense = n, plan, signs, dense

    def right(self, w: Tensor) -> Tensor:
        w = w.to(torch.float64)
        if self.dense is not None:
            return w @ self.dense.to(w.device)
        return transform(w if self.signs is None else w * self.signs.to(w.device), self.plan)

    def right_t(self, w: Tensor) -> Tensor:
        w = w.to(torch.float64)
        if self.dense is not None:
            return w @ self.dense.T.to(w.device)
        out = transform(w, self.plan, inverse=True)
        return out if self.signs is None else out * self.signs.to(w.device)

    def matrix(self) -> Tensor:
        """R, float64 [n, n]."""
        check_int("the order of a matrix", self.n, 1, LARGEST)
        return self.right(torch.eye(self.n, dtype=torch.float64))

    def keeps_mean(self) -> bool:
        """Whether R 1 = 1 and 1^T R = 1^T, to the rounding of float64."""
        one = torch.ones(1, self.n, dtype=torch.float64)
        bound = 4 * self.n * torch.finfo(torch.float64).eps
        return all(float((f(one) - one).abs().max()) <= bound for f in (self.right, self.right_t))


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """A Haar-distributed orthogonal matrix, float64 [n, n].

    QR of a Gaussian matrix with the signs of R's diagonal moved into Q (F. Mezzadri, 2007).
    """
    gauss = torch.randn(n, n, dtype=torch.float64, generator=generator)
    with one_thread():
        q, r = torch.linalg.qr(gauss)
    return q * r.diagonal().sign()


def given_rotation(matrix: Tensor, n: int) -> Rotation:
    """A user's matrix, checked: square of width n and orthogonal to the rounding of its dtype."""
    if tuple(matrix.shape) != (n, n):
        raise UsageError(f"a rotation of width {n} must be [{n}, {n}], got {list(matrix.shape)}")
    # Columns rounded to precision u leave R^T R within 2 u sqrt(n) of I; twice that is allowed, and
    # what a float64 factorisation and the product below round: 4 n units of float64.
    unit = torch.finfo(matrix.dtype).eps if matrix.is_floating_point() else 0.0
    r = matrix.detach().to(torch.float64)
    error = float((r @ r.T - torch.eye(n, dtype=torch.float64)).abs().max())
    if not error <= 4 * (unit * math.sqrt(n) + n * 2.0**-52):
        raise UsageError(f"the given matrix is not orthogonal: R R^T differs from I by {error:.3g}")
    return Rotation(n, dense=r)


def rotation(
    n: int, kind: str | Tensor = "hadamard", seed: int = 0, keeps_mean: bool = False
) -> Rotation:
    """A rotation of width n of the named kind; the same seed gives the same matrix.

    With ``keeps_mean`` and n a power of 4, "hadamard" is the regular Hadamard matrix (rows sum to
    sqrt(n)); other widths take a flat circulant. "random-hadamard" permutes rows and columns.
    """
    if isinstance(kind, Tensor):
        return given_rotation(kind, n)
    if kind not in KINDS:
        raise UsageError(f"a rotation must be one of {KINDS} or a matrix, got {kind!r}")
    dense = keeps_mean or kind == "random"
    check_int("the width of a rotation", n, 1, LARGEST if dense else WIDEST)
    generator = torch.Generator().manual_seed(seed)
    if keeps_mean:
        return Rotation(n, dense=_mean_keeping(n, kind, generator))
    if kind == "random":
        return Rotation(n, dense=random_orthogonal(n, generator))
    signs = None
    if kind == "random-hadamard":
        signs = torch.randint(0, 2, (n,), generator=generator).to(torch.float64) * 2 - 1
    return Rotation(n, plan=plan(n), signs=signs)


def _mean_keeping(n: int, kind: str, generator: torch.Generator) -> Tensor:
    power_of_4 = n & (n - 1) == 0 and n.bit_length() % 2 == 1
    if kind != "random" and power_of_4:
        r = torch.ones(1, 1, dtype=torch.float64)
        quarter = (torch.ones(4, 4) - 2 * torch.eye(4)).to(torch.float64) / 2
        for _ in range(n.bit_length() // 2):
            r = torch.kron(r, quarter)
        if kind == "random-hadamard":
            r = r[torch.randperm(n, generator=generator)][:, torch.randperm(n, generator=generator)]
        return r
    if kind != "random":
        r = _chirp(n)
        if kind == "random-hadamard":
            r = r[torch.randperm(n, generator=generator)][:, torch.randperm(n, generator=generator)]
        return r
    b = householder_to_mean(n)  # R = B diag(1, Q) B, and the first column of B is 1 / sqrt(n)
    inner = torch.eye(n, dtype=torch.float64)
    if n > 1:
        inner[1:, 1:] = random_orthogonal(n - 1, generator)
    return b @ inner @ b


def _chirp(n: int) -> Tensor:
    """The circulant matrix with spectrum exp(2 pi i k^2 / n), k = 0 .. n/2: orthogonal and real.

    A chirp is as flat in time as in frequency: no entry exceeds 1.8 / sqrt(n).
    """
    k = torch.arange(n // 2 + 1, dtype=torch.float64)
    spectrum = torch.polar(torch.ones_like(k), 2 * math.pi * (k * k % n) / n)
    if n % 2 == 0:  # the middle frequency of a real signal is real
        spectrum[-1] = 1.0 if n % 4 == 0 else -1.0
    row = torch.fft.irfft(spectrum, n=n)
    index = torch.arange(n)
    return row[(index[None, :] - index[:, None]) % n]


def householder_to_mean(n: int) -> Tensor:
    """The reflection that swaps e_1 and 1 / sqrt(n), float64 [n, n]."""
    v = -torch.full((n,), 1 / math.sqrt(n), dtype=torch.float64)
    v[0] += 1
    norm = float(v @ v)
    eye = torch.eye(n, dtype=torch.float64)
    return eye if norm == 0 else eye - 2 / norm * torch.outer(v, v)
