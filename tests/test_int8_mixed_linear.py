"""LLM.int8(): outlier columns in float, the rest in int8 (arXiv 2208.07339)."""

import pytest
import torch

from fewbit import ops, reference
from grids import DTYPES
from test_w4a16_linear import ROUND


def layer(n, k, outliers, m):
    w, x = torch.randn(n, k), torch.randn(m, k).clamp(-5, 5)
    columns = torch.randperm(k)[:outliers].sort().values
    x[:, columns] = 20 * torch.randn(m, outliers).sign() + x[:, columns]
    return w, x, columns, ops.pack(*ops.quantize(w, 8, -1, True), 8, -1)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("m, outliers", [(1, 0), (1, 3), (2, 1), (6, 5), (13, 70)])
def test_against_float64(isa, m, outliers, keep):
    n, k = 37, 130
    for dtype in DTYPES:
        w, x, columns, packed = layer(n, k, outliers, m)
        x = x.to(dtype)
        kept = columns[::2] if keep else None
        kept_weight = w[:, kept].T.contiguous() if keep else None
        out = ops.int8_mixed_linear(x, *packed, None, n, kept=kept, kept_weight=kept_weight)
        found, why = ops.int8_outliers(x)
        assert torch.equal(found, columns) and bool((why >= 6).all())
        # The equation: kept columns exact, other outliers in float times the int8 weight.
        deq = ops.dequantize(*ops.unpack(*packed, n, k, 8, -1), -1).double()
        if keep:
            deq[:, kept] = w[:, kept].double()
        regular = x.float().clone()
        regular[:, columns] = 0
        q, s, _ = ops.quantize_per_token(regular)
        a = q.double() * s.double()[:, None]
        a[:, columns] = x[:, columns].double()
        want, size = a @ deq.T, a.abs() @ deq.abs().T
        # At most outliers + 5 roundings: the float chain, the integer part's three, one addition,
        # one in each dequantised weight; then the output.
        gamma = (outliers + 5) * 2.0**-24
        bound = gamma * size + ROUND[dtype] * (want.abs() + gamma * size) + 1e-30
        assert bool(((out.double() - want).abs() <= bound).all())


# Rows of one chunk, and of two.
@pytest.mark.parametrize("k, outliers, m", [(64, 5, 9), (16384, 65, 45)])
def test_fixed_outliers_make_rows_independent_of_their_batch(isa, k, outliers, m):
    w, x, columns, packed = layer(20, k, outliers, m)
    x[3, columns] = 0.1  # alone, row 3 would have no outliers
    whole = ops.int8_mixed_linear(x, *packed, None, 20, outliers=columns)
    for cut in (1, 2, 5):
        parts = [
            ops.int8_mixed_linear(p, *packed, None, 20, outliers=columns) for p in x.split(cut)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_composite_agrees():
    w, x, columns, packed = layer(20, 64, 4, 9)
    for rest in ((None, None), (columns, w[:, columns].T.contiguous())):
        arguments = (x, *packed, torch.randn(20), 20, -1, 6.0, None, *rest)
        torch.testing.assert_close(
            ops.int8_mixed_linear(*arguments), reference.int8_mixed_linear(*arguments)
        )


def test_is_a_proper_torch_op():
    w, x, columns, packed = layer(20, 64, 4, 3)
    op = torch.ops.fewbit.int8_mixed_linear.default
    kept_weight = w[:, columns].T.contiguous()
    torch.library.opcheck(op, (x, *packed, None, 20, -1, 6.0, None, None, None))
    torch.library.opcheck(op, (x, *packed, None, 20, -1, 6.0, columns, columns, kept_weight))


def test_says_what_is_wrong():
    w, x, columns, packed = layer(20, 64, 4, 3)
    for arguments, message in [
        ({"threshold": 0.0}, "threshold must be above 0, got 0"),
        ({"outliers": torch.tensor([64])}, r"outliers must hold columns in 0..63, got 64"),
        ({"kept": columns}, "kept and kept_weight come together"),
        ({"kept": columns, "kept_weight": w[:, columns]}, r"kept_weight must have shape \[4, 20\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.int8_mixed_linear(x, *packed, None, 20, **arguments)
