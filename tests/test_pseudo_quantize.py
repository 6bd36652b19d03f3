"""pseudo_quantize(w) = dequantize(quantize(w)), in one pass."""

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
        got = ops.pseudo_quantize(w, bits, group_size, symmetric)
        want = reference.pseudo_quantize(w, bits, group_size, symmetric, "float32")
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_equals_the_two_steps(isa):
    w = torch.randn(20, 100)
    q, s, z = ops.quantize(w, 4, 32, False, "float16")
    assert torch.equal(
        ops.pseudo_quantize(w, 4, 32, False, "float16"), ops.dequantize(q, s, z, 32)
    )



def test_is_a_proper_torch_op():
    w = torch.randn(4, 64)
    torch.library.opcheck(torch.ops.fewbit.pseudo_quantize.default, (w, 4, 32, False, "float32"))


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="group_size must be .* got -3"):
        ops.pseudo_quantize(torch.randn(2, 8), 4, -3)


def test_in_place_is_the_same(isa):
    for dtype in DTYPES:
        w = hard_weight(9, 70, dtype)
        want = ops.pseudo_quantize(w, 3, 32)
        ops.pseudo_quantize_(w, 3, 32)
        assert torch.equal(w, want)
    with pytest.raises(ValueError, match="w must be contiguous"):
        ops.pseudo_quantize_(torch.randn(4, 6).T)
    torch.library.opcheck(
        torch.ops.fewbit.pseudo_quantize_.default, (torch.randn(3, 8), 4, 8, False, "float32")
    )
