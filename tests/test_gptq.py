"""t_k = w_k + sum_{j<k} (w_j - w'_j) V_jk / V_kk, H = V V^T; each t_k to its nearest grid point."""

import pytest
import torch

import published
from fewbit import _C, ops, reference
from grids import DTYPES


def hessian(columns, tokens=None, dtype=torch.float64):
    """A damped X^T X of correlated inputs, as calibration gives it."""
    x = torch.randn(tokens or 2 * columns, columns, dtype=dtype)
    mix = torch.randn(columns, columns, dtype=dtype) / columns**0.5
    mix += torch.eye(columns, dtype=dtype)
    x = x @ mix * torch.rand(columns, dtype=dtype).exp()
    h = x.T @ x
    return h + 0.01 * h.diagonal().mean() * torch.eye(columns, dtype=dtype)


def coefficients(h, order=None, dtype=torch.float32):
    """C of the op: V_jk / V_kk with V upper and V V^T = h in solving order."""
    h = h.double() if order is None else h.double()[order][:, order]
    v = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    return (v / v.diagonal()).to(dtype)


@pytest.mark.parametrize("given", ["no order", "act-order"])
def test_equals_the_published_algorithm_in_float64(given):
    """Any seed, width, grid and shape up to 64 x 64: the same codes on every instruction set."""
    shapes = [(1, 1, -1), (3, 7, 5), (16, 32, 8), (17, 33, 16), (64, 64, -1), (64, 64, 16),
              (40, 63, 24), (2, 64, 64), (64, 5, 2)]
    before = _C.isa()
    for seed in range(126):  # 7 widths x 2 grids x 9 shapes, each once
        torch.manual_seed(seed)
        bits, symmetric, (rows, columns, group) = 2 + seed % 7, seed % 2 == 1, shapes[seed % 9]
        w, h = torch.randn(rows, columns).to(DTYPES[seed % 3]), hessian(columns)
        order = h.diagonal().argsort(descending=True) if given == "act-order" else None
        want = published.gptq(w, h, bits, group, symmetric, order=order)
        c = coefficients(h, order, torch.float64)
        fit = "before" if given == "act-order" else "in_order"
        for isa in _C.available_isas():
            _C.set_isa(isa)
            got = ops.gptq(w, c, bits, group, symmetric, "float16", fit, order=order)
            assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2]), (seed, isa)
            assert got[1].dtype == torch.float16 and torch.equal(got[1].double(), want[1]), seed
    _C.set_isa(before)


ORDERS = {
    "left to right": lambda columns, group: None,
    "back to front": lambda columns, group: torch.arange(columns - 1, -1, -1),
    "any": lambda columns, group: torch.randperm(columns),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("points", [0, 12])
@pytest.mark.parametrize("fit", ["in_order", "before", "given"])
def test_options_equal_the_reference(isa, fit, points, order):
    rows, columns, group = 35, 200, 48
    at = ORDERS[order](columns, group)
    if order == "any" and fit == "in_order":  # whole groups change places, their columns inside too
        runs = [g * 48 + torch.randperm(min(48, columns - g * 48)) for g in (2, 0, 4, 3, 1)]
        at = torch.cat(runs)
    h, importance = hessian(columns), torch.rand(columns, dtype=torch.float64) + 0.1
    for dtype in DTYPES:
        w = torch.randn(rows, columns).to(dtype)
        given = (None, None) if fit != "given" else ops.quantize(w, 4, group)[1:]
        arguments = (4, group, False, "float32", "before" if fit == "given" else fit, points)
        for real in (torch.float64, torch.float32):
            c, weights = coefficients(h, at, real), importance.to(real)
            got = ops.gptq(w, c, *arguments, weights, at, *given)
            want = reference.gptq(w, c, *arguments, weights, at, *given, 128)
            same = (got[0] == want[0]).float().mean()
            if real == torch.float64 or points == 0:
                assert same == 1.0
                torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=0)
            else:
                assert same > 0.999  # two ranges may lose the same


@pytest.mark.parametrize("real", [torch.float32, torch.float64])
@pytest.mark.parametrize("group_size", [-1, 32, 48, 128, 200])
def test_block_threads_and_isa_change_no_bit(group_size, real):
    w, c = torch.randn(300, 333), coefficients(hessian(333), None, real)
    results, isa, threads = [], _C.isa(), torch.get_num_threads()
    for name in _C.available_isas():
        _C.set_isa(name)
        for block in (1, 7, 128, 256):
            torch.set_num_threads(1 + block % 3)
            results.append(ops.gptq(w, c, 3, group_size, points=5, block=block))
    _C.set_isa(isa)
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_diagonal_hessian_is_rounding(isa):
    w = torch.randn(20, 130)
    got = ops.gptq(w, torch.eye(130), 4, 64, scale_dtype="float16")
    for a, b in zip(got, ops.quantize(w, 4, 64, scale_dtype="float16"), strict=True):
        assert torch.equal(a, b)


def test_empty_and_non_contiguous(isa):
    for rows, columns in ((0, 5), (5, 0)):
        q, s, z = ops.gptq(torch.randn(rows, columns), torch.eye(columns), 4, 4)
        assert q.shape == (rows, columns) and s.shape == z.shape == (rows, -(-columns // 4))
    w, c = torch.randn(40, 24).T, coefficients(hessian(40))
    for a, b in zip(ops.gptq(w, c, 4, 8), ops.gptq(w.contiguous(), c, 4, 8), strict=True):
        assert torch.equal(a, b)


def test_is_a_proper_torch_op():
    w, c = torch.randn(4, 12), coefficients(hessian(12))
    arguments = (w, c, 4, 8, False, "float16", "in_order", 3, torch.rand(12), None, None, None, 128)
    torch.library.opcheck(torch.ops.fewbit.gptq.default, arguments)


def test_says_what_is_wrong():
    w, c = torch.randn(2, 8), torch.eye(8)
    mixed = torch.tensor([0, 4, 1, 2, 3, 5, 6, 7])
    for arguments, options, message in [
        ((w, torch.eye(7)), {}, r"c must have shape \[8, 8\], got \[7, 7\]"),
        ((w, c.half()), {}, "c must be float32 or float64, got Half"),
        ((w, c), {"importance": torch.ones(8).double()}, "importance must be Float, got Double"),
        ((w, c), {"bits": 1}, "bits must be in 2..8, got 1"),
        ((w, c), {"block": 0}, "block must be in 1..256, got 0"),
        ((w, c), {"points": -1}, r"points must be in 0\.\.1000, got -1"),
        ((w, c), {"points": 1001}, r"points must be in 0\.\.1000, got 1001"),
        ((w, c), {"fit": "later"}, 'fit must be in_order or before, got "later"'),
        ((w, c), {"order": torch.zeros(8, dtype=torch.long)}, "every column 0..7 once, got 0 at 1"),
        ((w, c), {"order": mixed, "group_size": 4}, "order leaves and re-enters group 0"),
        ((w, c), {"scale": torch.ones(2, 1)}, "scale and zero_point must be given together"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.gptq(*arguments, **options)
