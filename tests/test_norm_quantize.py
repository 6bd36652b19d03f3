"""RMSNorm or LayerNorm, then int8 per token, in one pass."""

import pytest
import torch
from torch.nn import functional as F

from fewbit import ops
from grids import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 17), (5, 128), (2, 301)])
def test_matches_float64(isa, rows, columns, symmetric, rms, dtype):
    x, weight = (torch.randn(rows, columns) * 3 + 1).to(dtype), torch.randn(columns).to(dtype)
    bias = None if rms else torch.randn(columns).to(dtype)
    q, s, z = ops.norm_quantize(x, weight, bias, 1e-5, rms, symmetric)
    d = x.double()
    want = (
        F.rms_norm(d, (columns,), weight.double(), 1e-5)
        if rms
        else F.layer_norm(d, (columns,), weight.double(), bias.double(), 1e-5)
    )
    y = (q.double() - z[:, None]) * s[:, None].double()
    # Half a step of the grid (a whole one where the zero point is rounded too), and the rounding
    # of the float32 norm: columns + 8 operations on terms no larger than |x|, |mean| and the bias.
    u = (columns + 8) * 2.0**-24
    spread = d.var(1, correction=0) + 1e-5 if not rms else d.square().mean(1) + 1e-5
    scale = weight.double().abs() * (d.abs() + d.abs().mean(1, keepdim=True))
    norm_error = u * 2 * scale / spread.sqrt()[:, None] * (1 + d.square().mean(1) / spread)[:, None]
    if bias is not None:
        norm_error = norm_error + u * bias.double().abs()
    step = (0.51 if symmetric else 1.01) * s[:, None].double()
    # The fitted range moves with the norm's error too.
    assert bool(((y - want).abs() <= step + norm_error + norm_error.amax(1, True)).all())


def test_is_a_proper_torch_op():
    op = torch.ops.fewbit.norm_quantize.default
    torch.library.opcheck(op, (torch.randn(3, 20), torch.randn(20), None, 1e-6, True, True))
    torch.library.opcheck(
        op, (torch.randn(3, 20).half(), torch.randn(20), torch.randn(20), 1e-6, False, False)
    )


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"weight must have shape \[4\], got \[3\]"):
        ops.norm_quantize(torch.randn(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match="an RMSNorm has no bias"):
        ops.norm_quantize(torch.randn(2, 4), torch.ones(4), torch.ones(4))
