"""Every order that the construction claims is exactly orthogonal, in integers."""

import math

import pytest
import torch

from fewbit import hadamard
from fewbit.errors import UnsupportedError, UsageError
from fewbit.hadamard import hadamard_matrix, hartley_matrix, is_constructible, plan, transform
from fewbit.orthogonal import KINDS, rotation

BOUND = 1024
CLAIMED = [n for n in range(1, BOUND + 1) if is_constructible(n)]
# Orders that widths of published models need: 4864 = 76 x 64, 11008 = 172 x 64, 13696 = 428 x 32,
# 18944 = 148 x 128, 10944 = 684 x 16, 29568 = 924 x 32 ...
NEEDED = [
    12, 20, 28, 36, 40, 44, 52, 60, 76, 92, 108, 116, 140, 148, 156, 172, 428, 684, 924,
]


def is_exact(h):
    # Sums of n <= 1024 products of +-1 are exact in float64.
    wide = h.to(torch.float64)
    return torch.equal(wide @ wide.T, len(h) * torch.eye(len(h), dtype=torch.float64))


@pytest.mark.parametrize("start", range(0, len(CLAIMED), 32))
def test_every_claimed_order(start):
    for n in CLAIMED[start : start + 32]:
        h = hadamard_matrix(n)
        assert h.shape == (n, n) and bool((h.abs() == 1).all()) and is_exact(h), n


@pytest.mark.parametrize("n", NEEDED)
def test_needed_order(n):
    assert is_exact(hadamard_matrix(n))


def test_what_is_claimed():
    assert set(NEEDED) <= set(CLAIMED)
    assert all(n in CLAIMED for n in range(4, 188, 4))
    missing = [n for n in range(4, BOUND + 1, 4) if n not in CLAIMED]
    assert 668 in missing  # no Hadamard matrix of this order is known
    assert len(missing) <= MISSING


MISSING = 33


def test_prime_power_fields():
    """27 = 3^3 and 343 = 7^3 (Paley I), 9 = 3^2 and 25 = 5^2 (Paley II) are not primes."""
    for n in (28, 344, 20, 52):
        assert is_exact(hadamard_matrix(n))
    q = hadamard._jacobsthal(27)
    assert torch.equal(q, -q.T) and bool((q.sum(0) == 0).all())
    q = hadamard._jacobsthal(25)
    assert torch.equal(q, q.T) and bool((q.abs().sum(0) == 24).all())


@pytest.mark.parametrize("n, message", [(6, "not a multiple of 4"), (668, "no construction")])
def test_refuses_what_it_cannot_build(n, message):
    with pytest.raises(UnsupportedError, match=message):
        hadamard_matrix(n)


def test_refuses_no_width():
    with pytest.raises(UsageError, match=r"must be in 1\.\.1048576, got 0"):
        plan(0)
    with pytest.raises(UsageError, match="must be 12, got 8"):
        transform(torch.ones(2, 8), plan(12))


@pytest.mark.parametrize("n, orders", [
    (4096, ()), (11008, (172,)), (4864, (76,)), (18944, (148,)), (13696, (428,)), (7, (7,)),
    (10944, (76, 36)), (27648, (108,)), (17920, (28, 20)), (29568, (84, 44)), (684, (684,)),
])
def test_plan_of_model_widths(n, orders):
    """The cheapest product: 10944 = 684 x 16 would be 171 additions a number, 76 x 36 x 4 is 14."""
    p = plan(n)
    assert (p.orders, p.m << p.k, p.exact) == (orders, n, n != 7)
    assert all(is_exact(b) for b in p.bases()) or not p.exact


def test_what_a_construction_costs():
    """Paley II halves the sums; nothing is claimed that cannot be built, and nothing is missed."""
    assert [hadamard._additions(n) for n in (12, 36, 44, 172, 684)] == [3, 4.5, 11, 43, 171]
    for n in range(4, 200, 4):
        built = [f(n) for f in (hadamard._paley_1, hadamard._paley_2, hadamard._goethals_seidel)]
        assert (hadamard._additions(n) < math.inf) == any(h is not None for h in built)
        assert all(is_exact(h) for h in built if h is not None)


@pytest.mark.parametrize("m", [1, 2, 3, 7, 83, 167])
def test_hartley_is_orthogonal_and_flat(m):
    h = hartley_matrix(m)
    # m products, each rounded: a standard gamma_m bound.
    assert float((h @ h.T - torch.eye(m)).abs().max()) <= 4 * m * torch.finfo(h.dtype).eps
    assert float(h.abs().max()) <= (2 / m) ** 0.5 * (1 + 1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 12, 24, 56, 137, 172, 344, 640])
def test_transform_equals_the_dense_product(n):
    p = plan(n)
    x = torch.randn(5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    bound = 4 * n * torch.finfo(x.dtype).eps * float(x.abs().sum(1).max())
    assert float((transform(x, p) - x @ p.matrix()).abs().max()) <= bound
    assert float((transform(transform(x, p), p, inverse=True) - x).abs().max()) <= bound


@pytest.mark.parametrize("keeps_mean", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 16, 20, 100, 256])
def test_rotations_are_orthogonal(n, kind, keeps_mean):
    r = rotation(n, kind, seed=2, keeps_mean=keeps_mean)
    matrix = r.matrix()
    error = (matrix @ matrix.T - torch.eye(n, dtype=torch.float64)).abs().max()
    assert float(error) <= 16 * n * torch.finfo(torch.float64).eps
    assert not keeps_mean or r.keeps_mean()
    x = torch.randn(3, n, dtype=torch.float64)
    torch.testing.assert_close(r.right_t(r.right(x)), x)
    if kind != "random":  # no channel keeps more than its share by more than a small factor
        assert float(matrix.abs().max()) * n**0.5 <= 1.8


def test_random_kinds_follow_the_seed():
    for kind in ("random", "random-hadamard"):
        a, b, c = (rotation(64, kind, seed).matrix() for seed in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)
    state = torch.get_rng_state()
    rotation(64, "random", 3)
    assert torch.equal(state, torch.get_rng_state())
