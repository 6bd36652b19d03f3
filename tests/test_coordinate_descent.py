"""Each code in turn to round(t / s) + z, t_k = w'_k + ((w - w') H)_k / H_kk."""

import pytest
import torch

from fewbit import _C, ops, reference
from grids import DTYPES


def problem(rows, columns, group_size, bits=3, dtype=torch.float32):
    x = torch.randn(2 * columns, columns, dtype=torch.float64)
    x = x @ (torch.eye(columns) + torch.randn(columns, columns) / columns**0.5).double()
    w = torch.randn(rows, columns).to(dtype)
    return w, (x.T @ x).float(), *ops.quantize(w, bits, group_size)


def losses(w, h, q, scale, zero_point, group_size):
    d = w.double() - ops.dequantize(q, scale, zero_point, group_size).double()
    return ((d @ h.double()) * d).sum(1)


@pytest.mark.parametrize("rows, columns, group_size", [(1, 1, -1), (17, 33, 16), (40, 150, 48)])
def test_matches_reference(isa, rows, columns, group_size):
    for dtype in DTYPES:
        arguments = (*problem(rows, columns, group_size, dtype=dtype), 3, group_size, 2)
        want = reference.coordinate_descent(*arguments)
        assert (ops.coordinate_descent(*arguments) == want).float().mean() > 0.999  # float32 ties
        w, h, *rest = arguments
        assert torch.equal(ops.coordinate_descent(w, h.double(), *rest), want)


def test_every_sweep_lowers_the_error_of_every_row(isa):
    w, h, *codes = problem(30, 200, 64)
    before = losses(w, h, *codes, 64)
    for sweeps in (1, 2, 4):
        q = ops.coordinate_descent(w, h, *codes, 3, 64, sweeps)
        after = losses(w, h, q, *codes[1:], 64)
        # float32 chains over k columns move a target by at most k u of its terms: a tie's worth.
        assert bool((after <= before * (1 + 200 * 2.0**-23)).all())
        before = after
    assert float(after.sum()) < 0.8 * float(losses(w, h, *codes, 64).sum())


def test_a_code_that_is_best_alone_stays():
    w, _, *codes = problem(20, 64, 16)
    assert torch.equal(ops.coordinate_descent(w, torch.eye(64), *codes, 3, 16, 2), codes[0])


@pytest.mark.parametrize("real", [torch.float32, torch.float64])
def test_threads_and_isa_change_no_bit(real):
    w, h, *codes = problem(300, 333, 48)
    arguments = (w, h.to(real), *codes, 3, 48, 2)
    results, isa, threads = [], _C.isa(), torch.get_num_threads()
    for name in _C.available_isas():
        _C.set_isa(name)
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(ops.coordinate_descent(*arguments))
    _C.set_isa(isa)
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_is_a_proper_torch_op():
    arguments = (*problem(4, 12, 8), 3, 8, 1)
    torch.library.opcheck(torch.ops.fewbit.coordinate_descent.default, arguments)


def test_says_what_is_wrong():
    w, h, *codes = problem(2, 8, 4)
    with pytest.raises(ValueError, match=r"h must have shape \[8, 8\], got \[7, 7\]"):
        ops.coordinate_descent(w, h[:7, :7], *codes, 3, 4)
    for sweeps in (-1, 1001, 2**63 - 1):
        with pytest.raises(ValueError, match=rf"sweeps must be in 0\.\.1000, got {sweeps}"):
            ops.coordinate_descent(w, h, *codes, 3, 4, sweeps)
    with pytest.raises(ValueError, match="bits must be in 2..8, got 1"):
        ops.coordinate_descent(w, h, *codes, 1, 4)
