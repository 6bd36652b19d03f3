"""Hadamard matrices of every order that a short construction reaches, and what stands in elsewhere.

A Hadamard matrix H [n, n] has entries +1 and -1 and H H^T = n I; orders are 1, 2 and multiples
of 4. ``base(m)`` tries, in this order: Sylvester's doubling; Paley I and II over any finite field
(R. Paley, On orthogonal matrices, 1933); the Goethals-Seidel array over four circulant rows
(J. Goethals, J. Seidel, A skew Hadamard matrix of order 36, 1970), of which Williamson's array
is the symmetric case; Kronecker products of those. ``plan(n)`` writes a width n as m * 2^k for
the fast transform. The width that no construction reaches gets a Hartley matrix, orthogonal and
flat within a factor sqrt(2), as its factor m.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .errors import UnsupportedError, UsageError
from .hadamard_rows import ROWS


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    e = 0
    while q % p == 0:
        q //= p
        e += 1
    return (p, e) if q == 1 else None


def _power_cycle(p: int, e: int, low: Sequence[int]) -> list[int] | None:
    """Powers of x in GF(p)[x] / (x^e - low) as numbers in base p, if x generates the field."""
    digits = [1] + [0] * (e - 1)
    seen: list[int] = []
    for _ in range(p**e - 1):
        seen.append(sum(d * p**i for i, d in enumerate(digits)))
        top = digits[-1]
        digits = [(d + top * c) % p for d, c in zip([0, *digits[:-1]], low, strict=True)]
        if seen[-1] == 1 and len(seen) > 1:
            return None
    # x is a generator exactly when its powers come back to 1 after all q - 1 units.
    unit = [1] + [0] * (e - 1)
    return seen if digits == unit and 0 not in seen and len(set(seen)) == len(seen) else None


@cache
def _jacobsthal(q: int) -> Tensor:
    """chi(a - b) over GF(q), int64 [q, q]: +1 for squares, -1 for other units, 0 at 0."""
    p, e = _prime_power(q)
    tails = (tuple(n // p**i % p for i in range(e)) for n in range(1, q))
    powers = next(c for low in tails if (c := _power_cycle(p, e, low)) is not None)
    chi = torch.zeros(q, dtype=torch.int64)
    chi[torch.tensor(powers)] = 1 - 2 * (torch.arange(q - 1) % 2)
    a = torch.arange(q)
    minus = sum(((a[:, None] // p**i - a[None, :] // p**i) % p) * p**i for i in range(e))
    return chi[minus]


def _bordered(q: int, sign: int) -> Tensor:
    """[[0, 1], [sign 1, Q]]: skew for q = 3 mod 4 (sign -1), symmetric for q = 1 mod 4."""
    s = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, sign, _jacobsthal(q)
    return s


def _paley_1(n: int) -> Tensor | None:
    if (n - 1) % 4 != 3 or _prime_power(n - 1) is None:
        return None
    return torch.eye(n, dtype=torch.int64) + _bordered(n - 1, -1)


def _paley_2(n: int) -> Tensor | None:
    q = n // 2 - 1
    if n % 4 or q % 4 != 1 or _prime_power(q) is None:
        return None
    plus, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    eye = torch.eye(q + 1, dtype=torch.int64)
    return torch.kron(_bordered(q, 1), plus) + torch.kron(eye, minus)


def _goethals_seidel(n: int) -> Tensor | None:
    t = n // 4
    if n % 4 or t not in ROWS:
        return None
    shift = (torch.arange(t)[None, :] - torch.arange(t)[:, None]) % t
    bits = ([int(row, 16) >> i & 1 for i in range(t)] for row in ROWS[t])
    a, b, c, d = (1 - 2 * torch.tensor(row)[shift] for row in bits)
    br, cr, dr = b.flip(1), c.flip(1), d.flip(1)
    bt, ct, dt = b.T.flip(1), c.T.flip(1), d.T.flip(1)
    blocks = ((a, br, cr, dr), (-br, a, dt, -ct), (-cr, -dt, a, bt), (-dr, ct, -bt, a))
    return torch.cat([torch.cat(row, dim=1) for row in blocks])


@cache
def _single(n: int) -> Tensor | None:
    if n & (n - 1) == 0:
        h = torch.ones(1, 1, dtype=torch.int64)
        for _ in range(n.bit_length() - 1):
            h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
        return h
    for construction in (_paley_1, _paley_2, _goethals_seidel):
        h = construction(n)
        if h is not None:
            return h
    return None


def _reachable(n: int) -> bool:
    """Whether ``_single(n)`` is not None, without building anything."""
    q = n // 2 - 1
    return (
        n & (n - 1) == 0
        or (n % 4 == 0 and _prime_power(n - 1) is not None)
        or (n % 4 == 0 and q % 4 == 1 and _prime_power(q) is not None)
        or (n % 4 == 0 and n // 4 in ROWS)
    )


def _split(n: int) -> tuple[int, ...] | None:
    """Orders of single constructions whose Kronecker product is n; the fewest that do."""
    if _reachable(n):
        return (n,)
    best: tuple[int, ...] | None = None
    for a in range(2, math.isqrt(n) + 1):
        if n % a == 0 and (a == 2 or a % 4 == 0) and _reachable(a):
            rest = _split(n // a)
            if rest is not None and (best is None or len(rest) + 1 < len(best)):
                best = (a, *rest)
    return best


def is_constructible(n: int) -> bool:
    """Whether ``hadamard_matrix(n)`` exists here."""
    return n in (1, 2) or (n > 2 and n % 4 == 0 and _split(n) is not None)


def hadamard_matrix(n: int) -> Tensor:
    """H int8 [n, n] of +1 and -1 with H H^T = n I.

    Raises UnsupportedError where n > 2 is no multiple of 4 (none exists) or no construction
    reaches it; ``plan`` covers those widths with another orthogonal factor.
    """
    if n < 1:
        raise UsageError(f"a Hadamard matrix needs an order of at least 1, got {n}")
    if not is_constructible(n):
        why = "no construction here reaches it" if n % 4 == 0 else "it is not a multiple of 4"
        raise UnsupportedError(f"there is no Hadamard matrix of order {n}: {why}")
    h = torch.ones(1, 1, dtype=torch.int64)
    for order in _split(n):
        h = torch.kron(h, _single(order))
    return h.to(torch.int8)


def hartley_matrix(m: int) -> Tensor:
    """cos + sin of 2 pi i j / m, over sqrt(m): orthogonal, symmetric, float64 [m, m].

    No entry exceeds sqrt(2 / m), so it spreads an outlier nearly as well as a Hadamard matrix.
    """
    index = torch.arange(m)
    phase = (index[:, None] * index[None, :] % m).to(torch.float64) * (2 * math.pi / m)
    return (phase.cos() + phase.sin()) / math.sqrt(m)


@dataclass(frozen=True)
class Plan:
    """A width n = m * 2^k and its orthogonal matrix ``base`` (x) H_{2^k} / sqrt(2^k).

    ``base`` float64 [m, m], orthogonal; ``exact``: base is a Hadamard matrix over sqrt(m).
    """

    n: int
    m: int
    k: int
    exact: bool

    @property
    def base(self) -> Tensor:
        """The orthogonal factor, float64 [m, m]."""
        if not self.exact:
            return hartley_matrix(self.m)
        return hadamard_matrix(self.m).to(torch.float64) / math.sqrt(self.m)

    def matrix(self) -> Tensor:
        """The whole orthogonal matrix, float64 [n, n]; x @ matrix is the transform of rows."""
        h = _single(2**self.k).to(torch.float64) / math.sqrt(2**self.k)
        return torch.kron(self.base, h)


def transform(x: Tensor, p: Plan, inverse: bool = False) -> Tensor:
    """``x @ p.matrix()`` over the last dimension, in x's dtype; the inverse with ``inverse``.

    The plain form of ``ops.hadamard``: sums over m, then k butterflies.
    """
    if x.shape[-1] != p.n:
        raise UsageError(f"the last dimension must be {p.n}, got {x.shape[-1]}")
    y = x.reshape(-1, p.m, 1 << p.k)
    if p.m > 1:
        base = p.base.to(x.device, x.dtype)
        y = torch.einsum("im,tib->tmb", base.T if inverse else base, y)
    for i in range(p.k):
        y = y.reshape(-1, 2, 1 << i)
        y = torch.stack((y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]), dim=1)
    return (y * 2.0 ** (-p.k / 2)).reshape(x.shape)


@cache
def plan(n: int) -> Plan:
    """The smallest factor m of n for which n = m * 2^k has a Hadamard base, else a Hartley base.

    The Hartley factor is the odd part of n: it never costs more than a Hadamard base would.
    """
    if n < 1:
        raise UsageError(f"a Hadamard transform needs a width of at least 1, got {n}")
    twos = (n & -n).bit_length() - 1
    odd = n >> twos
    for j in range(twos + 1):
        if is_constructible(odd << j):
            return Plan(n, odd << j, twos - j, exact=True)
    return Plan(n, odd, twos, exact=False)
