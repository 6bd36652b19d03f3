"""x W^T + bias with W = (q - z) s, float32 accumulation, against float64."""

import pytest
import torch

from fewbit import _C, ops
from grids import DTYPES, PACKED_BITS

SIZES = [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129]
ROUND = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def check_product(ms, n, k, bits, group_size, dtype, scale_dtype="float16", biased=None):
    """One weight with the first m rows of x for every m, with bias where m is in `biased`."""
    codes = ops.quantize(torch.randn(n, k), bits, group_size, False, scale_dtype)
    packed = ops.pack(*codes, bits, group_size)
    x = torch.randn(max(ms), k).to(dtype)
    b = torch.randn(n).to(dtype)
    q, s, z = codes
    group = max(k if group_size == -1 else min(group_size, k), 1)
    s = s.double().repeat_interleave(group, 1)[:, :k]
    z = z.double().repeat_interleave(group, 1)[:, :k]
    w, exact_x = (q.double() - z) * s, x.double()
    exact = exact_x @ w.T
    # Forward bound of the sum: gamma_(K+3) (|x| (q + z) s); q and z are summed apart in the direct
    # path, so it is their sum, not their difference, that bounds. Then one rounding of the output.
    u = 2.0**-24
    gamma = (k + 3) * u / (1 - (k + 3) * u)
    size = (q.double() + z) * s
    plain = gamma * (exact_x.abs() @ size.T)
    # Up to two rows, with AMX any number, run in 24-bit fixed point: every x moves by at most 2^-23
    # of its group's largest (w8a8_linear.h); twice that covers the rounding of the digits' sum.
    top = [g.abs().amax(1, keepdim=True).expand_as(g) for g in exact_x.split(group, 1) if k]
    fixed = plain + 2.0**-22 * ((torch.cat(top, 1) if k else exact_x) @ size.T)
    for m in ms:
        bias = b if biased is None or m in biased else None
        out = ops.w4a16_linear(x[:m], *packed, bias, n, bits, group_size)
        assert out.dtype == dtype and out.shape == (m, n)
        want, bound = exact[:m], (fixed if m <= 2 or _C.isa() == "avx512amx" else plain)[:m]
        if bias is not None:
            want = want + b.double()
            bound = bound + u * (want.abs() + b.double().abs())
        bound = bound + ROUND[dtype] * (want.abs() + bound) + 1e-30
        if dtype == torch.float16:
            bound = bound + 2.0**-25  # half an ulp of a subnormal
        assert bool(((out.double() - want).abs() <= bound).all())


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("m", [0, 1, 2, 3, 5, 12, 16, 17, 33])
def test_shapes_against_float64(isa, m, bits):
    for n in SIZES if isa != "scalar" else SIZES[::3]:
        for k in SIZES if isa != "scalar" else SIZES[1::3]:
            group_size = [-1, 8, 32, 5][(n + k) % 4]
            dtype = DTYPES[(n + m) % 3]
            check_product([m], n, k, bits, group_size, dtype, biased=[m] if k % 2 else [])


@pytest.mark.parametrize("m", [1, 2, 4, 8, 16, 24, 28, 70])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
def test_a_real_layer(isa, m, scale_dtype):
    if isa == "scalar" and m > 4:
        pytest.skip("minutes without SIMD; the small shapes cover this path")
    check_product([m], 512, 1376, 4, 128, torch.float32, scale_dtype)


def test_large_activations_do_not_overflow_in_between(isa):
    """Codes times 6e4 pass float16's range; scaling before narrowing keeps the result finite."""
    w = torch.randn(32, 64) * 1e-4
    packed = ops.pack(*ops.quantize(w, 4, 32, False, "float32"), 4, 32)
    for m in (1, 40):
        x = torch.full((m, 64), 6e4, dtype=torch.float16)
        assert bool(ops.w4a16_linear(x, *packed, None, 32, 4, 32).isfinite().all())


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_activations_of_any_size(isa, bits):
    """Fixed point follows the group: outliers, denormals, zeros and values that are not finite."""
    packed = ops.pack(*ops.quantize(torch.randn(20, 64), bits, 16), bits, 16)
    w = ops.dequantize(*ops.unpack(*packed, 20, 64, bits, 16), 16).double()
    for factor in (1e-44, 1e-38, 1e-20, 1e30):
        x = torch.randn(1, 64) * factor
        x[:, 16:32] *= 1e-3
        x[:, 40] *= 100
        want, top = x.double() @ w.T, x.double().abs().amax()
        error = (ops.w4a16_linear(x, *packed, None, 20, bits, 16).double() - want).abs()
        assert bool((error <= 64 * 2.0**-20 * top * w.abs().amax() + 1e-36).all())
    for bad in (float("nan"), float("inf")):
        for m in (1, 2, 6, 30):
            x = torch.randn(m, 64)
            x[m - 1, 20] = bad
            out = ops.w4a16_linear(x, *packed, None, 20, bits, 16)
            assert not bool(out[m - 1].isfinite().any()) and bool(out[: m - 1].isfinite().all())


def test_same_bits_on_any_number_of_threads(isa):
    packed = ops.pack(*ops.quantize(torch.randn(200, 96), 4, 32), 4, 32)
    before = torch.get_num_threads()
    for m in (1, 3, 40):
        x, results = torch.randn(m, 96), []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.w4a16_linear(x, *packed, None, 200, 4, 32))
        torch.set_num_threads(before)
        assert all(torch.equal(results[0], other) for other in results)


def test_accepts_non_contiguous():
    packed = ops.pack(*ops.quantize(torch.randn(20, 64), 4, 32), 4, 32)
    x = torch.randn(64, 6).T
    assert torch.equal(
        ops.w4a16_linear(x, *packed, None, 20, 4, 32),
        ops.w4a16_linear(x.contiguous(), *packed, None, 20, 4, 32),
    )


def test_writes_every_element_it_returns():
    """Under torch's deterministic fill, fresh memory is NaN: none may be left or read."""
    packed = ops.pack(*ops.quantize(torch.randn(37, 50), 4, 16), 4, 16)
    torch.use_deterministic_algorithms(True)
    try:
        for m in (1, 2, 6, 30):
            out = ops.w4a16_linear(torch.randn(m, 50), *packed, None, 37, 4, 16)
            assert bool(out.isfinite().all())
    finally:
        torch.use_deterministic_algorithms(False)


def test_is_a_proper_torch_op():
    packed = ops.pack(*ops.quantize(torch.randn(20, 64), 4, 32), 4, 32)
    for bias in (None, torch.randn(20)):
        arguments = (torch.randn(3, 64), *packed, bias, 20, 4, 32)
        torch.library.opcheck(torch.ops.fewbit.w4a16_linear.default, arguments)


def test_says_what_is_wrong():
    packed = ops.pack(*ops.quantize(torch.randn(20, 64), 4, 32), 4, 32)
    x = torch.randn(3, 64)
    for arguments, message in [
        ((x[:, :50], *packed, None, 20, 4, 32), "packed must have shape"),
        ((x, *packed, torch.randn(3), 20, 4, 32), r"bias must have shape \[20\], got \[3\]"),
        ((x[0], *packed, None, 20, 4, 32), r"x must be \[tokens, in_features\], got shape \[64\]"),
        ((x.double(), *packed, None, 20, 4, 32), "x must be float32, float16 or bfloat16"),
        ((x, *packed, None, 20, 6, 32), "bits must be 2, 3, 4 or 8 to be packed, got 6"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.w4a16_linear(*arguments)
