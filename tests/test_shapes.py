"""Every packed product on every small shape: M, N, K around each width of unit, vector and panel.

The default run draws a sample; `pytest -m slow tests/test_shapes.py` takes every combination of
shape, bits, group and type, every M on the same weight; `-k "w4a16_linear-17]"` takes one operator
and N.
"""

import itertools
import random

import pytest
import torch

from fewbit import ops, reference
from grids import DTYPES, PACKED_BITS
from test_w4a16_linear import ROUND, check_product

SIZES = [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
GROUPS = [-1, 8, 32, 5]


def random_weight(n, k, bits, group_size):
    """Any codes and zero points; scales 1 and 2, so that sums of products stay whole numbers."""
    groups = -(-k // reference.resolve_group(group_size, k))
    q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    z = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8)
    return q, torch.randint(1, 3, (n, groups)).float(), z


def weight_of(codes, group_size, k):
    q = codes[0]
    return ops.dequantize(*codes, group_size).double() if k else q.double()


def check_w4a16(ms, n, k, bits, group_size, dtype):
    biased = [m for m in ms if (m + k) % 2]
    check_product(ms, n, k, bits, group_size, dtype, biased=biased)


def check_w8a8(ms, n, k, bits, group_size, dtype):
    """Integer sums are exact; float activations give what their codes give, rounded once."""
    codes = random_weight(n, k, bits, group_size)
    packed = ops.pack(*codes, bits, group_size)
    x = torch.randn(max(ms), k).to(dtype)
    a, scale, _ = ops.quantize_per_token(x)
    exact = (a.double() @ weight_of(codes, group_size, k).T).float()
    rounded = exact * scale[:, None]
    ones = torch.ones(max(ms))
    for m in ms:
        q = a[:m], *packed, None, n, bits, group_size, True
        assert torch.equal(ops.w8a8_linear(*q, ones[:m]), exact[:m])
        assert torch.equal(ops.w8a8_linear(*q, scale[:m]), rounded[:m])
        out = ops.w8a8_linear(x[:m], *packed, None, n, bits, group_size)
        assert torch.equal(out, rounded[:m].to(dtype))


def check_mixed(ms, n, k, bits, group_size, dtype):
    """The integer part of the other columns plus the float product of the outliers."""
    if bits != 8:
        return
    codes = random_weight(n, k, 8, group_size)
    packed, w = ops.pack(*codes, 8, group_size), weight_of(codes, group_size, k)
    x = torch.randn(max(ms), k).to(dtype)
    outliers = torch.randperm(k)[: k // 3]
    inner, outer = x.clone(), torch.zeros_like(x)
    inner[:, outliers], outer[:, outliers] = 0, x[:, outliers]
    a, scale, _ = ops.quantize_per_token(inner)
    a = a.double() * scale.double()[:, None]
    want = a @ w.T + outer.double() @ w.T
    size = (a.abs() + outer.double().abs()) @ w.abs().T
    u = 2.0**-24
    bound = (k + 4) * u * size + ROUND[dtype] * (want.abs() + (k + 4) * u * size) + 2.0**-25
    for m in ms:
        out = ops.int8_mixed_linear(x[:m], *packed, None, n, group_size, 6.0, outliers)
        assert bool(((out.double() - want[:m]).abs() <= bound[:m]).all())


CHECKS = {"w4a16_linear": check_w4a16, "w8a8_linear": check_w8a8, "int8_mixed_linear": check_mixed}


@pytest.mark.parametrize("op", CHECKS)
def test_f04_a_sample_of_shapes(isa, op):
    draw = random.Random(f"{isa} {op}")
    for _ in range(150):
        m, n, k = (draw.choice(SIZES) for _ in range(3))
        bits = 8 if op == "int8_mixed_linear" else draw.choice(PACKED_BITS)
        CHECKS[op]([m], n, k, bits, draw.choice(GROUPS), draw.choice(DTYPES))


@pytest.mark.slow
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("op", CHECKS)
def test_f04_every_shape(op, n):
    for k, bits, group, dtype in itertools.product(SIZES, PACKED_BITS, GROUPS, DTYPES):
        CHECKS[op](SIZES, n, k, bits, group, dtype)
