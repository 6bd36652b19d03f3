"""out = sum_g s_g sx sum_{k in g} (q - z)(a - za) + bias: integer sums exact, on every path."""

import pytest
import torch

from fewbit import ops, reference
from grids import DTYPES, PACKED_BITS
from test_w4a16_linear import ROUND, SIZES


def random_weight(n, k, bits, group_size, extreme=False):
    groups = -(-k // reference.resolve_group(group_size, k))
    q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    z = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8)
    if extreme:  # the largest products: all codes at the top, zero points at the bottom
        q.fill_(2**bits - 1)
        z.zero_()
    return q, torch.ones(n, groups), z


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("m", [0, 1, 2, 3, 5, 8, 9, 20, 33, 101])
def test_integer_sums_are_exact(isa, m, bits):
    for n in SIZES[::2] if isa != "scalar" else SIZES[::4]:
        for k in [1, 3, 8, 31, 64, 129, 700]:
            codes = random_weight(n, k, bits, -1, extreme=bool(n % 2))
            a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
            if m:
                a[0] = -128 if n % 3 else 127
            za = torch.randint(-128, 128, (m,), dtype=torch.int32)
            packed = ops.pack(*codes, bits, -1)
            out = ops.w8a8_linear(
                a, *packed, None, n, bits, -1, False, torch.ones(m), za, ops.code_sums(*codes[::2])
            )
            exact = (a.long() - za[:, None]) @ (codes[0].long() - codes[2].long()).T
            assert torch.equal(out, exact.float())
            out = ops.w8a8_linear(a, *packed, None, n, bits, -1, True, torch.ones(m))
            exact = a.long() @ (codes[0].long() - codes[2].long()).T
            assert torch.equal(out, exact.float())


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_float_activations_against_float64(isa, bits, symmetric, static):
    m, n, k = 5, 37, 300
    for dtype in DTYPES:
        for group_size in (-1, 32, 5):
            codes = ops.quantize(torch.randn(n, k), bits, group_size)
            packed = ops.pack(*codes, bits, group_size)
            x, b = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
            fixed = (torch.tensor([0.03]), None if symmetric else torch.tensor([7]).int())
            fixed = fixed if static else (None, None)
            sums = None if symmetric else ops.code_sums(codes[0], codes[2], group_size)
            arguments = (*packed, b, n, bits, group_size, symmetric, *fixed, sums)
            out = ops.w8a8_linear(x, *arguments)
            q, sx, z = ops.quantize_per_token(x, symmetric, *fixed)
            assert out.dtype == dtype
            a = (q.double() - z[:, None]) * sx.double()[:, None]
            w = ops.dequantize(*codes, group_size).double()
            exact = a @ w.T + b.double()
            # Integers are exact; what rounds is one conversion and product per group, their sum,
            # sx, the bias (groups + 4 roundings in all), then the output.
            terms = codes[1].shape[1] + 4
            gamma = terms * 2.0**-24 / (1 - terms * 2.0**-24)
            bound = gamma * (a.abs() @ w.abs().T + b.double().abs())
            # dequantize rounds (q - z) s to float32, once per weight.
            bound = bound + 2.0**-24 * (a.abs() @ w.abs().T)
            bound = bound + ROUND[dtype] * (exact.abs() + bound) + 1e-30
            assert bool(((out.double() - exact).abs() <= bound).all())


def test_same_bits_on_any_number_of_threads_and_any_batch(isa):
    codes = ops.quantize(torch.randn(200, 96), 4, 32)
    packed = ops.pack(*codes, 4, 32)
    x, before = torch.randn(21, 96), torch.get_num_threads()
    whole = ops.w8a8_linear(x, *packed, None, 200, 4, 32)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for cut in (1, 2, 4, 13):
            parts = [ops.w8a8_linear(p, *packed, None, 200, 4, 32) for p in x.split(cut)]
            assert torch.equal(torch.cat(parts), whole)
    torch.set_num_threads(before)


def test_same_bits_on_every_isa():
    from fewbit import _C

    packed = ops.pack(*ops.quantize(torch.randn(40, 96), 4, 32), 4, 32)
    before = _C.isa()
    for m in (7, 40):  # and as tiles, where there are any
        x, results = torch.randn(m, 96), []
        for name in _C.available_isas():
            _C.set_isa(name)
            results.append(ops.w8a8_linear(x, *packed, None, 40, 4, 32))
        _C.set_isa(before)
        assert all(torch.equal(results[0], other) for other in results)


def test_not_finite_stays_not_finite(isa):
    packed = ops.pack(*ops.quantize(torch.randn(20, 64), 8, -1), 8, -1)
    for bad in (float("nan"), float("inf")):
        x = torch.randn(3, 64)
        x[1, 5] = bad
        for scale in (None, torch.tensor([0.1])):
            out = ops.w8a8_linear(x, *packed, None, 20, x_scale=scale)
            assert bool(out[1].isnan().all()) and bool(out[0].isfinite().all())


def test_is_a_proper_torch_op():
    codes = ops.quantize(torch.randn(20, 64), 4, 32)
    packed, sums = ops.pack(*codes, 4, 32), ops.code_sums(codes[0], codes[2], 32)
    op = torch.ops.fewbit.w8a8_linear.default
    x, b = torch.randn(3, 64), torch.randn(20)
    torch.library.opcheck(op, (x, *packed, b, 20, 4, 32, True, None, None, None))
    torch.library.opcheck(op, (x.half(), *packed, None, 20, 4, 32, False, None, None, sums))
    q, s, z = ops.quantize_per_token(x, False)
    torch.library.opcheck(op, (q, *packed, None, 20, 4, 32, False, s, z, sums))


def test_composite_agrees():
    codes = ops.quantize(torch.randn(20, 64), 4, 32)
    packed, sums = ops.pack(*codes, 4, 32), ops.code_sums(codes[0], codes[2], 32)
    x, b = torch.randn(3, 64), torch.randn(20)
    for rest in ((True, None, None, None), (False, None, None, sums)):
        arguments = (x, *packed, b, 20, 4, 32, *rest)
        torch.testing.assert_close(ops.w8a8_linear(*arguments), reference.w8a8_linear(*arguments))


def test_says_what_is_wrong():
    packed = ops.pack(*ops.quantize(torch.randn(20, 64), 4, 32), 4, 32)
    x, codes = torch.randn(3, 64), torch.zeros(3, 64, dtype=torch.int8)
    for arguments, message in [
        ((x, *packed, None, 20, 4, 32, False), "symmetric=False needs code_sum"),
        ((codes, *packed, None, 20, 4, 32), "x of int8 codes needs x_scale"),
        ((x, *packed, None, 20, 4, 32, True, torch.ones(3)), "one element, got 3"),
        ((x.int(), *packed, None, 20, 4, 32), "x must be float32, float16 or bfloat16"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.w8a8_linear(*arguments)
    wide = torch.zeros(1, 70000)
    packed = ops.pack(*ops.quantize(wide, 8, -1), 8, -1)
    with pytest.raises(ValueError, match="at most 65536 columns, got 70000"):
        ops.w8a8_linear(wide, *packed, None, 1)
