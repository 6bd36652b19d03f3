"""q = clamp(round(x / s) + z) per token: equal to the reference bit for bit."""

import pytest
import torch

from fewbit import ops, reference
from grids import DTYPES, hard_weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 15), (8, 17), (9, 129), (3, 0), (0, 5)])
def test_equals_reference(isa, rows, columns, symmetric, dtype):
    x = hard_weight(rows, columns, dtype)
    fixed = (torch.tensor([0.05]), None if symmetric else torch.tensor([-9]).int())
    for static in ((None, None), fixed):
        ours = ops.quantize_per_token(x, symmetric, *static)
        for got, want in zip(
            ours, reference.quantize_per_token(x, symmetric, *static), strict=True
        ):
            assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_half_a_step(isa, symmetric):
    x = hard_weight(40, 200)
    q, s, z = ops.quantize_per_token(x, symmetric)
    back = (q.double() - z[:, None]) * s[:, None].double()
    # x / s rounds to float32 (|x / s| <= 255) before it rounds to a code; a rounded zero point may
    # cut up to half a step more at one end.
    slack = 0.5 + 256 * 2.0**-23 + (0 if symmetric else 0.5)
    assert bool(((back - x).abs() <= slack * s[:, None].double()).all())


@pytest.mark.parametrize("scale", [0.5, 1e-30, 3e38])
@pytest.mark.parametrize("symmetric, zero", [(True, None), (False, -128), (False, 77)])
def test_middles_of_codes_and_quotients_of_any_size(isa, symmetric, zero, scale):
    """A piece of 256 columns that holds a middle is divided; one that saturates is not wrong."""
    x = torch.randint(-511, 512, (4, 700), generator=torch.Generator().manual_seed(0)) / 4
    x[1, 300:] *= 1.0 + 2.0**-23  # next to the middles
    x[2] *= 1e36
    static = (torch.tensor([scale]), None if zero is None else torch.tensor([zero]).int())
    for fixed in (static, (None, None)):
        ours = ops.quantize_per_token(x, symmetric, *fixed)
        want = reference.quantize_per_token(x, symmetric, *fixed)
        assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))


def test_rows_that_are_not_finite(isa):
    x = torch.randn(4, 50)
    x[1, 49], x[2, 3] = float("nan"), float("inf")
    for symmetric in (True, False):
        for static in (None, torch.tensor([0.1])):
            ours = ops.quantize_per_token(x, symmetric, static)
            want = reference.quantize_per_token(x, symmetric, static, None)
            assert ours[1].isnan().tolist() == [False, True, True, False]
            assert torch.equal(ours[0][[0, 3]], want[0][[0, 3]])


@pytest.mark.parametrize("columns", [4096, 4160, 4100])  # whole lines, and not
def test_large_results_are_those_of_their_parts(isa, columns):
    """16 MiB of codes and more are written past the caches, where rows are whole lines."""
    rows = -(-(16 << 20) // columns)
    x = torch.randn(64, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    large = ops.quantize_per_token(x.repeat(-(-rows // 64), 1))
    small = ops.quantize_per_token(x)
    for got, want in zip(large, small, strict=True):
        assert torch.equal(got.view(-1, *want.shape), want.expand(len(got) // 64, *want.shape))


def test_is_a_proper_torch_op():
    op = torch.ops.fewbit.quantize_per_token.default
    torch.library.opcheck(op, (torch.randn(3, 20), True, None, None))
    static = (torch.tensor([0.1]), torch.tensor([3]).int())
    torch.library.opcheck(op, (torch.randn(3, 20).half(), False, *static))


def test_says_what_is_wrong():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"x must be \[tokens, channels\], got shape \[4\]"):
        ops.quantize_per_token(x[0])
    with pytest.raises(ValueError, match="a static x_scale must hold one element, got 2"):
        ops.quantize_per_token(x, True, torch.ones(2))
    with pytest.raises(ValueError, match="x_zero_point needs x_scale and symmetric=False"):
        ops.quantize_per_token(x, True, torch.ones(1), torch.ones(1, dtype=torch.int32))
