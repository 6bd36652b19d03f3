"""Canonical codes -> panels (layout.h) -> canonical codes, through pack and unpack."""

import pytest
import torch

from fewbit import ops, reference
from grids import PACKED_BITS, SHAPES


def random_codes(rows, columns, group_size, bits):
    groups = -(-columns // reference.resolve_group(group_size, columns))
    q = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    z = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8)
    return q, torch.rand(rows, groups), z


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("rows, columns, group_size", SHAPES)
def test_round_trip_and_reference(isa, rows, columns, group_size, bits):
    codes = random_codes(rows, columns, group_size, bits)
    for scale in (codes[1], codes[1].half()):
        canonical = (codes[0], scale, codes[2])
        packed = ops.pack(*canonical, bits, group_size)
        for got, want in zip(
            packed, reference.pack(*canonical, bits, group_size), strict=True
        ):
            assert torch.equal(got, want)
        sizes = (rows, columns, bits, group_size)
        for back in (ops.unpack(*packed, *sizes), reference.unpack(*packed, *sizes)):
            assert all(torch.equal(a, b) for a, b in zip(back, canonical, strict=True))


def test_layout_as_documented():
    """layout.h: column i of a 4-bit unit sits at bit 8 * (i % 4) + 4 * (i / 4) of row's word."""
    q = torch.zeros(16, 8, dtype=torch.uint8)
    q[5] = torch.arange(8, dtype=torch.uint8)
    packed, _, _ = ops.pack(q, torch.ones(16, 1), torch.zeros(16, 1, dtype=torch.uint8), 4, 8)
    assert packed.shape == (16,)
    assert packed[5].item() == 0x73625140 and packed[4].item() == 0


def test_is_a_proper_torch_op():
    codes = ops.quantize(torch.randn(20, 40), 3, 10)
    packed = ops.pack(*codes, 3, 10)
    torch.library.opcheck(torch.ops.fewbit.pack.default, (*codes, 3, 10))
    torch.library.opcheck(torch.ops.fewbit.unpack.default, (*packed, 20, 40, 3, 10))


def test_says_what_is_wrong():
    q, s, z = ops.quantize(torch.randn(4, 64), 8, 32)
    with pytest.raises(ValueError, match="q holds codes above 15, the largest of 4 bits"):
        ops.pack(q, s, z, 4, 32)
    with pytest.raises(ValueError, match="bits must be 2, 3, 4 or 8 to be packed, got 5"):
        ops.pack(q, s, z, 5, 32)
    packed = ops.pack(q, s, z, 8, 32)
    with pytest.raises(ValueError, match=r"packed must have shape \[128\] for 4 x 64 weights of 4"):
        ops.unpack(*packed, 4, 64, 4, 64)
    with pytest.raises(ValueError, match="larger than 2.48 elements"):
        ops.unpack(*packed, 2**39, 2**39, 8, 32)
