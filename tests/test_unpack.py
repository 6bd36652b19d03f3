"""unpack is the inverse of pack: test_pack.py holds the round trips. Here: what it must refuse."""

import pytest
import torch

from fewbit import ops


def test_refuses_buffers_that_disagree_with_the_sizes():
    packed, s, z = ops.pack(*ops.quantize(torch.randn(16, 64), 4, 32), 4, 32)
    with pytest.raises(ValueError, match=r"scale must have shape \[1, 4, 16\], got \[1, 2, 16\]"):
        ops.unpack(packed, s, z, 16, 64, 4, 16)
    with pytest.raises(ValueError, match="packed must be Int, got Long"):
        ops.unpack(packed.long(), s, z, 16, 64, 4, 32)
    with pytest.raises(ValueError, match="out_features must not be negative, got -1"):
        ops.unpack(packed, s, z, -1, 64, 4, 32)
