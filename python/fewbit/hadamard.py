"""Hadamard matrices of every order that a short construction reaches, and what stands in elsewhere.

A Hadamard matrix H [n, n] has entries +1 and -1 and H H^T = n I; orders are 1, 2 and multiples
of 4. There are Sylvester's doubling; Paley II and I over any finite field (R. Paley, On orthogonal
matrices, 1933); the Goethals-Seidel array over four circulant rows (J. Goethals, J. Seidel, A skew
Hadamard matrix of order 36, 1970), of which Williamson's array is the symmetric case; and Kronecker
products of those. ``plan(n)`` writes a width n as the product m_1 m_2 .. 2^k of orders that costs
the fast transform least. The width that no construction reaches gets a Hartley matrix, orthogonal
and flat within a factor sqrt(2), in their place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .errors import UnsupportedError, UsageError
from .hadamard_rows import ROWS
from .scheme import check_int

WIDEST = 1 << 20  # of a transform; a matrix of an order above LARGEST fills no machine's memory
LARGEST = 1 << 16


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
        h = torch.ones(1, 1, dtype=torch.int8)
        for _ in range(n.bit_length() - 1):
            h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
        return h
    for construction in (_paley_2, _paley_1, _goethals_seidel):  # the fastest to apply first
        h = construction(n)
        if h is not None:
            return h
    return None


def _additions(n: int) -> float:
    """What a single construction costs the fast transform for an output (hadamard.h); infinity
    where there is none. Nothing is built."""
    q = n // 2 - 1
    if q % 4 == 1 and _prime_power(q) is not None:
        return n / 8 if n >= 20 else n / 4
    if _prime_power(n - 1) is not None or n // 4 in ROWS:
        return n / 4
    return math.inf


def _factorings(odd: int, twos: int, most: int) -> Iterator[tuple[int, ...]]:
    """Orders of single constructions, odd parts falling from ``most``, whose product is
    ``odd`` 2^j for a j of at most ``twos``."""
    if odd == 1:
        yield ()
    for part in range(3, min(odd, most) + 1, 2):
        if odd % part == 0:
            for j in range(2, twos + 1):
                if _additions(part << j) < math.inf:
                    for rest in _factorings(odd // part, twos - j, part):
                        yield (part << j, *rest)


def is_constructible(n: int) -> bool:
    """Whether ``hadamard_matrix(n)`` exists here."""
    return 1 <= n <= WIDEST and plan(n).exact


def hadamard_matrix(n: int) -> Tensor:
    """H int8 [n, n] of +1 and -1 with H H^T = n I.

    Raises UnsupportedError where n > 2 is no multiple of 4 (none exists) or no construction
    reaches it; ``plan`` covers those widths with another orthogonal factor.
    """
    check_int("the order of a Hadamard matrix", n, 1, LARGEST)
    if not is_constructible(n):
        why = "no construction here reaches it" if n % 4 == 0 else "it is not a multiple of 4"
        raise UnsupportedError(f"there is no Hadamard matrix of order {n}: {why}")
    h = torch.ones(1, 1, dtype=torch.int8)
    for base in (*plan(n).bases(), _single(1 << plan(n).k).to(torch.int8)):
        h = torch.kron(h, base)
    return h


def hartley_matrix(m: int) -> Tensor:
    """cos + sin of 2 pi i j / m, over sqrt(m): orthogonal, symmetric, float64 [m, m].

    No entry exceeds sqrt(2 / m), so it spreads an outlier nearly as well as a Hadamard matrix.
    """
    check_int("the order of a Hartley matrix", m, 1, LARGEST)
    index = torch.arange(m)
    phase = index.to(torch.float64) * (2 * math.pi / m)
    # From one table, so that entries of equal phase are equal in every bit, on which the kernel
    # relies to halve its work (cpp/include/fewbit/hadamard.h).
    table = (phase.cos() + phase.sin()) / math.sqrt(m)
    return table[index[:, None] * index[None, :] % m]


@dataclass(frozen=True)
class Plan:
    """A width n = m * 2^k, m the product of ``orders``, and its orthogonal matrix B_1 (x) B_2 (x)
    .. (x) H_{2^k} / sqrt(2^k).

    ``exact``: each B is a Hadamard matrix over the root of its order; else there is one, Hartley's.
    """

    n: int
    orders: tuple[int, ...]
    k: int
    exact: bool

    @property
    def m(self) -> int:
        return math.prod(self.orders)

    def bases(self) -> list[Tensor]:
        """What ``ops.hadamard`` takes: int8 Hadamard matrices, or the float32 Hartley matrix."""
        if self.exact:
            return [_single(order).to(torch.int8) for order in self.orders]
        return [hartley_matrix(self.m).float()]

    def factors(self) -> list[Tensor]:
        """The orthogonal factors, float64 [order, order]."""
        if self.exact:
            return [_single(order).to(torch.float64) / math.sqrt(order) for order in self.orders]
        return [hartley_matrix(self.m)]

    def matrix(self) -> Tensor:
        """The whole orthogonal matrix, float64 [n, n]; x @ matrix is the transform of rows."""
        h = torch.ones(1, 1, dtype=torch.float64)
        sylvester = _single(1 << self.k).to(torch.float64) / math.sqrt(1 << self.k)
        for factor in (*self.factors(), sylvester):
            h = torch.kron(h, factor)
        return h


def transform(x: Tensor, p: Plan, inverse: bool = False) -> Tensor:
    """``x @ p.matrix()`` over the last dimension, in x's dtype; the inverse with ``inverse``.

    The plain form of ``ops.hadamard``: k butterflies, then sums over each order.
    """
    if x.shape[-1] != p.n:
        raise UsageError(f"the last dimension must be {p.n}, got {x.shape[-1]}")
    y = x
    for i in range(p.k):
        y = y.reshape(-1, 2, 1 << i)
        y = torch.stack((y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]), dim=1)
    inner = 1 << p.k
    for factor in reversed(p.factors()):
        base = factor.to(x.device, x.dtype)
        y = y.reshape(-1, len(base), inner)
        y = torch.einsum("im,tib->tmb", base.T if inverse else base, y)
        inner *= len(base)
    return (y * 2.0 ** (-p.k / 2)).reshape(x.shape)


# Bringing columns together where 2^k is short, in additions an output, by k.
_SHORT = (30, 30, 8, 6)


@cache
def plan(n: int) -> Plan:
    """The cheapest product of Hadamard matrices of order n, else a Hartley base.

    The Hartley factor is the odd part of n: it never costs more than a Hadamard base would.
    """
    check_int("the width of a Hadamard transform", n, 1, WIDEST)
    twos = (n & -n).bit_length() - 1
    odd = n >> twos
    found = []
    for orders in _factorings(odd, twos, odd):
        k = (n // math.prod(orders)).bit_length() - 1
        short = _SHORT[k] if orders and k < len(_SHORT) else 0
        cost = short + sum(_additions(order) + 8 for order in orders)  # 8: tables, load, store
        found.append((cost, Plan(n, orders, k, exact=True)))
    if found:
        return min(found, key=lambda pair: pair[0])[1]
    return Plan(n, (odd,), twos, exact=False)
