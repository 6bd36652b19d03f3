"""out = sx sum_g s_g sum_{k in g} a (q - z) + bias, a and q of 4 bits: integer sums exact."""

import pytest
import torch

from fewbit import ops, reference
from grids import DTYPES
from test_w4a16_linear import ROUND
from test_w8a8_linear import random_weight


@pytest.mark.parametrize("m", [0, 1, 2, 3, 9, 33])
def test_integer_sums_are_exact(isa, m):
    for n in (1, 17, 40):
        for k in (8, 64, 136, 704):
            codes = random_weight(n, k, 4, -1, extreme=bool(n % 2))
            a = torch.randint(-8, 8, (m, k), dtype=torch.int8)
            words = reference.words_of_fours(a)
            assert torch.equal(reference.fours_of_words(words), a)
            out = ops.w4a4_linear(words, *ops.pack(*codes, 4, -1), None, n, -1, torch.ones(m))
            exact = a.long() @ (codes[0].long() - codes[2].long()).T
            assert torch.equal(out, exact.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [-1, 32, 5])
@pytest.mark.parametrize("clip", [None, 1.0, 0.9])
def test_float_activations_against_float64(isa, dtype, group_size, clip):
    m, n, k = 5, 37, 300
    codes = ops.quantize(torch.randn(n, k), 4, group_size)
    x, b = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    out = ops.w4a4_linear(x, *ops.pack(*codes, 4, group_size), b, n, group_size, None, clip)
    assert out.dtype == dtype
    most = x.float().abs().amax(1, keepdim=True)
    s, least = (most / 7, -7) if clip is None else (most * clip / 7.5, -8)
    a = (x.float() / s).round().clamp(least, 7).double() * s.double()
    w = ops.dequantize(*codes, group_size).double()
    exact = a @ w.T + b.double()
    size = a.abs() @ w.abs().T + b.double().abs()
    # One conversion and product per group, their sum, s, the bias; dequantize rounds once.
    bound = (codes[1].shape[1] + 6) * 2.0**-24 * size
    bound = bound + ROUND[dtype] * (exact.abs() + bound) + 1e-30
    assert bool(((out.double() - exact).abs() <= bound).all())


def test_takes_what_the_fused_transform_gives(isa):
    x = torch.randn(6, 128)
    codes = ops.quantize(torch.randn(20, 128), 4, -1)
    packed = ops.pack(*codes, 4, -1)
    q, s = ops.hadamard_quantize(x, bits=4)
    whole = ops.w4a4_linear(ops.hadamard(x), *packed, None, 20)
    assert torch.equal(ops.w4a4_linear(q, *packed, None, 20, -1, s), whole)


def test_a_token_that_is_not_finite_is_seen(isa):
    x = torch.randn(3, 64)
    x[1, 5] = float("inf")
    codes = ops.quantize(torch.randn(20, 64), 4, -1)
    out = ops.w4a4_linear(x, *ops.pack(*codes, 4, -1), None, 20)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_is_a_proper_torch_op():
    codes = ops.quantize(torch.randn(20, 64), 4, 32)
    packed = ops.pack(*codes, 4, 32)
    call = torch.ops.fewbit.w4a4_linear.default
    for clip in (None, 0.9):
        x, bias = torch.randn(3, 64).half(), torch.randn(20)
        torch.library.opcheck(call, (x, *packed, bias, 20, 32, None, clip))
    q, s = ops.hadamard_quantize(torch.randn(3, 64), bits=4)
    torch.library.opcheck(call, (q, *packed, None, 20, 32, s, None))


def test_says_what_is_wrong():
    packed = ops.pack(*ops.quantize(torch.randn(20, 64), 4, 32), 4, 32)
    with pytest.raises(ValueError, match="x_scale, one per token, comes with x of 4-bit codes"):
        ops.w4a4_linear(torch.randn(3, 64), *packed, None, 20, 32, torch.ones(3))
    with pytest.raises(ValueError, match=r"x_scale must have shape \[3\], got \[2\]"):
        ops.w4a4_linear(torch.zeros(3, 8, dtype=torch.int32), *packed, None, 20, 32, torch.ones(2))
    with pytest.raises(ValueError, match="clip belongs to float x"):
        words = torch.zeros(3, 8, dtype=torch.int32)
        ops.w4a4_linear(words, *packed, None, 20, 32, torch.ones(3), 0.9)
    with pytest.raises(ValueError, match="clip must be above 0 and at most 1, got 1.5"):
        ops.w4a4_linear(torch.randn(3, 64), *packed, None, 20, 32, clip=1.5)
    with pytest.raises(ValueError, match="packed must have shape"):
        ops.w4a4_linear(torch.randn(3, 32), *packed, None, 20, 32)
