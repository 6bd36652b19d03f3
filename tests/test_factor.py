"""The factor of a Hessian: its equation, the memory it takes, the same bits on any thread count."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fewbit import ops
from fewbit.scheme import Scheme
from fewbit.solvers.factor import RUNGS, by_rows, factorize
from fewbit.solvers.gptq import GPTQ, ORDERS
from test_solver_gptq import inputs, stats_of

THREADS = (1, 2, 3)


def on_threads(function):
    """What ``function`` returns on one, two and three threads."""
    before, results = torch.get_num_threads(), []
    try:
        for count in THREADS:
            torch.set_num_threads(count)
            results.append(function())
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    return results


def held_bytes(function):
    """The most that ``function`` holds at once of what torch allocates inside it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = function()
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del result
    return most


@pytest.mark.parametrize("columns", [1, 2, 7, 64, 129, 1100])
@pytest.mark.parametrize("ordered", [False, True])
def test_v_times_its_transpose_is_the_damped_hessian(columns, ordered):
    gram = stats_of(inputs(2 * columns, columns)).gram
    order = torch.randperm(columns) if ordered else None
    factor = factorize(gram, 0.01, order)
    v, h = factor.v, gram.double() * 2.0**-factor.exponent
    h.diagonal().add_(0.01 * h.diagonal().mean())
    h = h if order is None else h[order][:, order]
    assert not bool(v.tril(-1).any())
    # Backward error of Cholesky (N. Higham, Accuracy and Stability, theorem 10.3).
    unit = torch.finfo(factor.c.dtype).eps / 2
    bound = (columns + 4) * unit * (v.abs() @ v.abs().T)
    assert bool(((v @ v.T - h).abs() <= bound).all())


@pytest.mark.parametrize("ordered", [False, True])
def test_factor_and_solve_hold_one_and_a_half_hessians(ordered):
    size = 2560
    x = torch.randn(256, size)
    gram, weight = x.T @ x, torch.randn(size, size)
    gram.diagonal().add_(10.0)
    order = torch.randperm(size) if ordered else None

    def solve():
        c = factorize(gram, 0.01, order).c
        return ops.gptq(weight, c, 4, 128, fit="before", order=order)

    before = torch.get_num_threads()
    torch.set_num_threads(2)  # each has its own rows in work
    held = held_bytes(solve)
    torch.set_num_threads(before)
    assert held <= 1.5 * gram.numel() * gram.element_size()


@pytest.mark.parametrize("columns", [200, 1100])
def test_threads_change_no_bit_of_a_factor(columns):
    gram = stats_of(inputs(300, columns)).gram
    first, *others = on_threads(lambda: factorize(gram, 0.01).c)
    assert all(torch.equal(first, c) for c in others)


def test_threads_change_no_bit_of_raised_eigenvalues():
    noise = torch.randn(150, 150).double() / 100
    gram = noise + noise.T - 4 * torch.eye(150) + 4.1  # a mean diagonal of 0.1, eigenvalues of -4
    factors = on_threads(lambda: factorize(gram, 0.01))
    assert {f.rung for f in factors} == {RUNGS.index("floor")}
    assert all(torch.equal(factors[0].c, f.c) for f in factors[1:])


@pytest.mark.parametrize(
    "options",
    [
        *({"target": t, "order": o} for t in ("gptaq", "qronos") for o in ORDERS),
        {"clip": False, "order": "backward"}, {"sweeps": 2}, {"fit": "mse"},
    ],
    ids=lambda options: " ".join(str(v) for v in options.values()),
)
def test_threads_change_no_bit_of_a_solve(options):
    weight, x_float = torch.randn(530, 150), inputs(400, 150)
    stats = stats_of(x_float + 0.1 * torch.randn(400, 150), x_float)
    first, *others = on_threads(
        lambda: GPTQ(**options).solve(weight, Scheme(bits=3, group_size=48), stats)[0]
    )
    for codes in others:
        assert all(torch.equal(a, b) for a, b in zip(first, codes, strict=True))


def test_by_rows_is_the_function_and_hands_on_its_error():
    w, m = torch.randn(1000, 30).double(), torch.randn(30, 40).double()
    assert torch.equal(by_rows(lambda rows: rows.square(), w), w.square())
    torch.testing.assert_close(by_rows(lambda rows: rows @ m, w), w @ m)
    threads = torch.get_num_threads()

    def fails(rows):
        raise ArithmeticError("in a thread")

    with pytest.raises(ArithmeticError, match="in a thread"):
        by_rows(fails, w)
    assert torch.get_num_threads() == threads
