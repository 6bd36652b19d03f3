"""Q(w s) / s - w for many s at once, bit for bit the plain version."""

import pytest
import torch

from fewbit import ops, reference
from grids import BITS, DTYPES, SHAPES, hard_weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns, group", SHAPES)
def test_matches_reference(isa, rows, columns, group, dtype):
    w, scale = hard_weight(rows, columns, dtype), torch.rand(3, columns) + 0.25
    for bits in BITS:
        arguments = bits, group, bits % 2 == 0, ("float32", "float16")[bits % 2]
        got = ops.scaled_error(w, scale, *arguments)
        torch.testing.assert_close(
            got, reference.scaled_error(w, scale, *arguments), rtol=0, atol=0, equal_nan=True
        )


def test_a_scale_of_ones_leaves_the_error_of_rounding(isa):
    w = torch.randn(20, 100)
    got = ops.scaled_error(w, torch.ones(1, 100), 4, 32)
    assert torch.equal(got[0], ops.pseudo_quantize(w, 4, 32) - w)


def test_is_a_proper_torch_op():
    w, scale = torch.randn(4, 64), torch.rand(2, 64) + 0.5
    torch.library.opcheck(
        torch.ops.fewbit.scaled_error.default, (w, scale, 4, 32, False, "float16")
    )


def test_no_candidate_no_error():
    assert ops.scaled_error(torch.randn(3, 8), torch.empty(0, 8)).shape == (0, 3, 8)


def test_says_what_is_wrong():
    w = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"scale must have shape \[3, 8\], got \[3, 7\]"):
        ops.scaled_error(w, torch.ones(3, 7))
    with pytest.raises(ValueError, match="scale must be Float"):
        ops.scaled_error(w, torch.ones(3, 8).half())
    with pytest.raises(ValueError, match="bits must be in 2..8, got 9"):
        ops.scaled_error(w, torch.ones(3, 8), bits=9)
