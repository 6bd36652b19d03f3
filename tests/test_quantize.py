"""s = (hi - lo) / (2^b - 1), z = clamp(round(-lo / s)), q = clamp(round(w / s) + z); 0 in range."""

import pytest
import torch

from fewbit import ops, reference
from grids import BITS, DTYPES, SHAPES, hard_weight


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows, columns, group_size", SHAPES)
def test_matches_reference_bit_for_bit(isa, rows, columns, group_size, bits, symmetric):
    for dtype in DTYPES:
        w = hard_weight(rows, columns, dtype)
        for scale_dtype in ("float32", "float16", "bfloat16"):
            got = ops.quantize(w, bits, group_size, symmetric, scale_dtype)
            want = reference.quantize(w, bits, group_size, symmetric, scale_dtype)
            for g, r in zip(got, want, strict=True):
                assert g.dtype == r.dtype
                torch.testing.assert_close(g, r, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
def test_groups_that_are_unlike_their_neighbours(isa, scale_dtype, symmetric):
    """Steps are made for several groups at once: one that is zero, huge, tiny, infinite or no
    number changes nothing for the others; 1 to 40 groups of a row, the last of them shorter."""
    factors = [1.0, 0.0, 1e-30, 1e38, 1e-6, 5e5, float("inf"), float("nan"), 2.0**-14, 65504.0 * 7]
    for groups in (1, 7, 15, 16, 17, 40):
        for odd in range(groups if groups < 17 else 1):
            w = torch.rand(len(factors), groups * 20 - 3) * 2 - 1
            w[:, 20 * odd : 20 * odd + 20] *= torch.tensor(factors)[:, None]
            w[:, 20 * odd + 1] = torch.tensor(factors)  # the range's end
            got = ops.quantize(w, 4, 20, symmetric, scale_dtype)
            want = reference.quantize(w, 4, 20, symmetric, scale_dtype)
            for g, r in zip(got, want, strict=True):
                torch.testing.assert_close(g, r, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", BITS)
def test_weights_between_two_codes(isa, bits):
    """In the middle of two codes, and one and two floats beside it: the quotient decides."""
    ends = torch.rand(300, 2) + torch.tensor([[-1.0, 0.5]])
    grid = (bits, -1, False, "float32")
    step = reference.quantize(ends, *grid)[1]
    w = step * (torch.randint(-(2**bits), 2**bits, (300, 62)) + 0.5)
    w.view(torch.int32).add_(torch.randint(-2, 3, w.shape, dtype=torch.int32))
    w = torch.cat((ends, w.clamp(ends[:, :1], ends[:, 1:])), 1)
    got, want = ops.quantize(w, *grid), reference.quantize(w, *grid)
    assert torch.equal(got[1], step) and all(map(torch.equal, got, want))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
def test_ranges_that_want_one_code_too_many(isa, bits, scale_dtype):
    """Both ends in the middle of two codes, or a scale that was rounded down: the clamp decides, in
    groups whose neighbours need none."""
    top = 2**bits - 1
    low = torch.randint(0, top, (300, 1)) + 0.5
    w = torch.cat((-low, top - low, (torch.rand(300, 62) * top - low).clamp(-low, top - low)), 1)
    w *= torch.rand(300, 1) + 0.5
    grid = (bits, -1, False, scale_dtype)
    want = reference.quantize(w, *grid)
    more = (w[:, 1:2] / want[1].float()).round() + want[2] > top
    assert 0 < int(more.sum()) < 300
    for columns in (64, 60):
        part = w[:, :columns].contiguous()
        got, want = ops.quantize(part, *grid), reference.quantize(part, *grid)
        assert all(map(torch.equal, got, want))
    grid = (bits, 64, False, scale_dtype)
    row = w.flatten()[None]  # the same ranges as groups of one row
    got, want = ops.quantize(row, *grid), reference.quantize(row, *grid)
    assert all(map(torch.equal, got, want))


def test_oracle_in_plain_python():
    """Codes by the textbook, one number at a time: no tensor code in common."""
    w = torch.randn(4, 24)
    q, s, z = ops.quantize(w, 3, 8, False)
    for r in range(4):
        for g in range(3):
            group = [float(v) for v in w[r, 8 * g : 8 * g + 8]]
            lo, hi = min(0.0, *group), max(0.0, *group)
            step = float((torch.tensor(hi) - torch.tensor(lo)) / 7)
            zero = min(max(round(float(torch.tensor(-lo) / torch.tensor(step))), 0), 7)
            assert float(s[r, g]) == step and int(z[r, g]) == zero
            for i, v in enumerate(group):
                code = round(float(torch.tensor(v) / torch.tensor(step))) + zero
                assert int(q[r, 8 * g + i]) == min(max(code, 0), 7)


@pytest.mark.parametrize("symmetric", [False, True])
def test_error_is_at_most_half_a_step(isa, symmetric):
    w = torch.randn(32, 512)
    q, s, z = ops.quantize(w, 4, 128, symmetric)
    back = ops.dequantize(q, s, z, 128)
    step = s.repeat_interleave(128, 1)
    # The zero point is itself rounded: at the ends of an asymmetric range another half step. Step,
    # quotient, product and difference round by u = 2^-24 each, relative to the weight.
    bound = (0.5 if symmetric else 1.0) * step + 4 * 2.0**-24 * (w.abs() + step)
    assert bool(((w - back).abs() <= bound).all())


def test_scale_follows_a_power_of_two():
    w = torch.randn(8, 64)
    q, s, z = ops.quantize(w, 4, 32)
    q2, s2, z2 = ops.quantize(w * 8, 4, 32)
    assert torch.equal(q, q2) and torch.equal(z, z2) and torch.equal(s * 8, s2)


def test_defined_for_groups_without_range_and_for_non_finite_input(isa):
    q, s, z = ops.quantize(torch.zeros(2, 8), 4, 4)
    assert torch.equal(s, torch.ones(2, 2)) and torch.equal(q, torch.zeros_like(q))
    q, s, z = ops.quantize(torch.zeros(2, 8), 4, 4, True)
    assert torch.equal(s, torch.ones(2, 2)) and bool((q == 8).all()) and bool((z == 8).all())
    w = torch.randn(4, 64)
    w[0, 3], w[1, 5], w[2, 7] = float("nan"), float("inf"), float("-inf")
    q, _, z = ops.quantize(w, 4, 32)
    assert int(q.max()) <= 15 and int(z.max()) <= 15  # some code in range, no crash


def test_accepts_non_contiguous():
    w = torch.randn(40, 24).T
    for got, want in zip(ops.quantize(w, 4, 8), ops.quantize(w.contiguous(), 4, 8), strict=True):
        assert torch.equal(got, want)


def test_same_bits_on_any_number_of_threads():
    w = torch.randn(300, 1000)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.quantize(w, 4, 128))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_is_a_proper_torch_op():
    w = torch.randn(4, 64)
    torch.library.opcheck(torch.ops.fewbit.quantize.default, (w, 4, 32, False, "float16"))


def test_says_what_is_wrong():
    w = torch.randn(2, 8)
    for arguments, message in [
        ((w, 9), "bits must be in 2..8, got 9"),
        ((w, 4, 0), "group_size must be -1 .whole row. or at least 1, got 0"),
        ((w[0], 4), r"w must be \[out_features, in_features\], got shape \[8\]"),
        ((w.int(), 4), "w must be float32, float16 or bfloat16, got Int"),
        ((w, 4, 8, False, "int8"), 'scale_dtype must be .* got "int8"'),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.quantize(*arguments)
