"""w = (q - z) s in float32, rounded once to the output type."""

import pytest
import torch

from fewbit import ops, reference
from grids import SHAPES


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rows, columns, group_size", SHAPES)
def test_matches_reference_bit_for_bit(isa, rows, columns, group_size, dtype):
    groups = -(-columns // reference.resolve_group(group_size, columns))
    q = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    z = torch.randint(0, 256, (rows, groups), dtype=torch.uint8)
    for scale in (torch.rand(rows, groups), torch.rand(rows, groups).half()):
        got = ops.dequantize(q, scale, z, group_size, dtype)
        want = reference.dequantize(q, scale, z, group_size, dtype)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_is_a_proper_torch_op():
    codes = ops.quantize(torch.randn(4, 64), 4, 32)
    torch.library.opcheck(torch.ops.fewbit.dequantize.default, (*codes, 32, "float32"))


def test_says_what_is_wrong():
    q, s, z = ops.quantize(torch.randn(4, 64), 4, 32)
    with pytest.raises(ValueError, match=r"scale must have shape \[4, 4\], got \[4, 2\]"):
        ops.dequantize(q, s, z, 16)
    with pytest.raises(ValueError, match="q must be Byte, got Int"):
        ops.dequantize(q.int(), s, z, 32)
