"""The GPTQ solver: its variants on small layers, and a factor for every Hessian."""

import pytest
import torch

from fewbit import ops, recipes
from fewbit.errors import CalibrationError, UsageError
from fewbit.scheme import Scheme
from fewbit.solvers.factor import RUNGS, factorize
from fewbit.solvers.gptq import GPTQ
from fewbit.solvers.obq import OBQ
from fewbit.solvers.rtn import RTN
from fewbit.stats import Stats


def inputs(tokens, columns):
    """Correlated inputs whose channels differ in size, as a layer of a model gets them."""
    mix = torch.eye(columns) + torch.randn(columns, columns) / columns**0.5
    return torch.randn(tokens, columns) @ mix * torch.rand(columns).exp()


def stats_of(x, x_float=None):
    gram = torch.zeros(x.shape[1], x.shape[1])
    ops.gram(x, gram)
    cross = None if x_float is None else (x_float - x).T @ x
    return Stats(len(x), x.abs().sum(0), x.abs().amax(0), gram, cross)


def loss(weight, codes, group_size, x, x_float=None):
    target = (x if x_float is None else x_float).double() @ weight.double().T
    output = x.double() @ ops.dequantize(*codes, group_size).double().T
    return float((output - target).square().sum())


def solve(solver, weight, scheme, x, x_float=None):
    codes, info = solver.solve(weight, scheme, stats_of(x, x_float))
    return loss(weight, codes, scheme.group_size, x, x_float), info


@pytest.mark.parametrize("order", ["columns", "activation", "groups"])
def test_obq_gptq_rtn_on_200_problems(order):
    """The oracle and GPTQ on the same grids, which are GPTQ's."""
    ratios = []
    for seed in range(200):
        torch.manual_seed(seed)
        rows, columns = 8, (16, 32, 48, 64)[seed % 4]
        weight, x = torch.randn(rows, columns), inputs(4 * columns, columns)
        scheme = Scheme(bits=(2, 3, 4)[seed % 3], group_size=(-1, 16)[seed % 2])
        stats = stats_of(x)
        codes, _ = GPTQ(order=order).solve(weight, scheme, stats)
        gptq, rtn = loss(weight, codes, scheme.group_size, x), solve(RTN(), weight, scheme, x)[0]
        h = stats.gram.double()
        h = h + 0.01 * h.diagonal().mean() * torch.eye(columns)
        q = OBQ(sweeps=8).round(weight, h, codes.scale, codes.zero_point, scheme)
        obq = loss(weight, codes._replace(q=q), scheme.group_size, x)
        ratios.append((obq / gptq, gptq / rtn))
    first, second = torch.tensor(ratios).T
    ordered = ((first <= 1) & (second <= 1)).float().mean()
    print(f"oracle/GPTQ {first.mean():.3f}, GPTQ/RTN {second.mean():.3f}, in order {ordered:.1%}")
    assert ordered >= 0.95


@pytest.mark.parametrize(
    "better, than",
    [
        (dict(sweeps=3), {}),
        (dict(fit="mse"), dict(fit="range")),
        (dict(fit="hessian"), dict(fit="range")),
        (dict(order="groups"), dict(order="columns")),
        (dict(order="activation"), dict(order="columns")),
    ],
)
def test_options_lower_the_loss_on_average(better, than):
    sums = [0.0, 0.0]
    for seed in range(12):
        torch.manual_seed(seed)
        weight, x = torch.randn(32, 128), inputs(512, 128)
        for i, options in enumerate((better, than)):
            sums[i] += solve(GPTQ(**options), weight, Scheme(bits=2, group_size=32), x)[0]
    assert sums[0] < sums[1]


@pytest.mark.parametrize("target", ["gptaq", "qronos"])
@pytest.mark.parametrize("order", ["columns", "activation", "groups", "backward"])
def test_targets_approach_the_float_model(order, target):
    weight, x_float = torch.randn(32, 96), inputs(600, 96)
    x = x_float + 0.1 * torch.randn(600, 96) @ torch.randn(96, 96) / 96**0.5
    scheme = Scheme(bits=4, group_size=32)
    plain = solve(GPTQ(order=order), weight, scheme, x, x_float)[0]
    assert solve(GPTQ(order=order, target=target), weight, scheme, x, x_float)[0] < plain


def test_targets_by_their_definitions():
    """Against dense algebra: least squares for qronos, one system per column for gptaq."""
    torch.manual_seed(3)
    weight, x_float = torch.randn(5, 20), inputs(200, 20)
    x = x_float + 0.1 * torch.randn(200, 20)
    stats = stats_of(x, x_float)
    order = torch.randperm(20)
    factor = factorize(stats.gram, 0.01, order)
    h = stats.gram.double() + 0.01 * stats.gram.diagonal().double().mean() * torch.eye(20)
    d, w = stats.cross.double(), weight.double()
    least_squares = w + w @ d @ torch.linalg.inv(h)
    goal = GPTQ(target="qronos", strength=1.0)._goal(weight, stats, factor)
    torch.testing.assert_close(goal.double(), least_squares, rtol=1e-5, atol=1e-5)
    shifted = w.clone()
    for i, column in enumerate(order[:-1]):
        rest = order[i + 1 :]
        part = torch.linalg.solve(h[rest][:, rest], d[column, rest])
        shifted[:, rest] += w[:, column, None] * part
    goal = GPTQ(target="gptaq", strength=1.0)._goal(weight, stats, factor)
    torch.testing.assert_close(goal.double(), shifted, rtol=1e-5, atol=1e-5)


def test_without_clipping_every_target_is_inside_its_grid():
    weight, x = torch.randn(40, 96), inputs(400, 96)
    scheme = Scheme(bits=3, group_size=32)
    solver = GPTQ(order="backward", clip=False)
    codes, info = solver.solve(weight, scheme, stats_of(x))
    assert info["widened"] > 0
    # Babai's bound: every term (V_kk (t_k - w'_k))^2 is at most (V_kk s / 2)^2.
    factor = factorize(stats_of(x).gram, solver.damp, torch.arange(95, -1, -1))
    d = (weight.double() - ops.dequantize(*codes, 32).double())[:, factor.order]
    terms = (d @ factor.v).square()
    step = codes.scale.double()[:, factor.order // 32]
    assert bool((terms <= (factor.diagonal.double() * step / 2).square() * (1 + 1e-4)).all())


def test_sweeps_never_raise_the_error_of_a_row():
    weight, x = torch.randn(40, 96), inputs(400, 96)
    stats, scheme = stats_of(x), Scheme(bits=2, group_size=32)
    h = stats.gram.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(96)
    before = None
    for sweeps in range(4):
        codes, _ = GPTQ(sweeps=sweeps).solve(weight, scheme, stats)
        d = weight.double() - ops.dequantize(*codes, 32).double()
        after = ((d @ h) * d).sum(1)
        assert before is None or bool((after <= before * (1 + 1e-12)).all())
        before = after


def spectra():
    """Eight Hessians: (name, gram, rung that must be reached, or the error)."""
    n = 96
    x = torch.randn(400, n)
    outliers, dead, nan, inf = x.clone(), x.clone(), x.clone(), x.clone()
    outliers[:, :5] *= torch.tensor([1e3, 3e3, 1e4, 3e4, 1e5])
    dead[:, 7], dead[:, 50] = 0.0, 0.0
    nan[3, 4], inf[3, 4] = float("nan"), float("inf")
    indefinite = x.T @ x / 400
    indefinite -= 0.5 * torch.eye(n)
    return {
        "well conditioned": (x.T @ x, 0),
        "rank deficient": (x[:12].T @ x[:12], 0),
        "dead columns": (dead.T @ dead, 0),
        "outliers": (outliers.T @ outliers, 0),
        "tiny": (stats_of(x * 1e-20).gram, 0),
        "indefinite": (indefinite, RUNGS.index("damp x 100")),
        "nan": (nan.T @ nan, RUNGS.index("rtn")),
        "inf": (inf.T @ inf, RUNGS.index("rtn")),
    }


@pytest.mark.parametrize("name", spectra())
def test_f01_every_spectrum_finishes_on_its_rung(name):
    gram, rung = spectra()[name]
    weight, scheme = torch.randn(24, 96), Scheme(group_size=32)
    stats = Stats(400, torch.ones(96), torch.ones(96), gram)
    codes, info = GPTQ().solve(weight, scheme, stats)
    assert info["rung"] == rung and info["ladder"] == RUNGS[rung]
    back = ops.dequantize(*codes, 32)
    assert bool(back.isfinite().all())
    if rung:
        with pytest.raises(CalibrationError, match=f"strict: the Hessian needs rung {rung}"):
            GPTQ(strict=True).solve(weight, scheme, stats)
    else:
        GPTQ(strict=True).solve(weight, scheme, stats)
    if name == "dead columns":  # they get no updates, so they stay as near as rounding puts them
        step = codes.scale.float().repeat_interleave(32, 1)
        for column in (7, 50):
            assert bool(((back - weight).abs() <= step)[:, column].all())
        assert info["dead"] == 2


def test_floor_is_the_rung_below_rounding():
    gram = -torch.eye(8) * 4 + torch.ones(8, 8) * 4.1  # a mean diagonal of 0.1, eigenvalues of -4
    assert factorize(gram, 0.01).rung == RUNGS.index("floor")


def test_zero_hessian_is_an_error():
    stats = Stats(10, torch.zeros(8), torch.zeros(8), torch.zeros(8, 8))
    with pytest.raises(CalibrationError, match="the Hessian is zero"):
        GPTQ().solve(torch.randn(4, 8), Scheme(), stats)


def test_an_expert_without_tokens_is_rounded_and_reported():
    stats = Stats(0, torch.zeros(8), torch.zeros(8), torch.zeros(8, 8), routed=True)
    weight = torch.randn(4, 8)
    codes, info = GPTQ().solve(weight, Scheme(), stats)
    assert info["ladder"] == "rtn" and "no token" in info["reason"]
    rounded = RTN().solve(weight, Scheme(), None)[0]
    assert all(torch.equal(a, b) for a, b in zip(codes, rounded, strict=True))
    with pytest.raises(CalibrationError, match="strict"):
        GPTQ(strict=True).solve(weight, Scheme(), stats)


@pytest.mark.parametrize("sweeps", [0, 2])
def test_power_of_two_inputs_and_threads_change_no_bit(sweeps):
    weight, x = torch.randn(33, 200), inputs(500, 200)
    want = GPTQ(sweeps=sweeps).solve(weight, Scheme(group_size=48), stats_of(x))[0]
    threads = torch.get_num_threads()
    for factor, count in ((2.0**-40, 1), (2.0**20, 3)):
        torch.set_num_threads(count)
        got = GPTQ(sweeps=sweeps).solve(weight, Scheme(group_size=48), stats_of(x * factor))[0]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    torch.set_num_threads(threads)


def test_one_factor_serves_all_readers_of_an_input(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "fewbit.solvers.gptq.factorize", lambda *a: calls.append(1) or factorize(*a)
    )
    stats, solver = stats_of(inputs(100, 16)), GPTQ()
    same, other = stats.scaled(torch.ones(16)), stats.scaled(torch.full((16,), 2.0))
    for seen in (stats, stats, same, other):
        solver.solve(torch.randn(3, 16), Scheme(), seen)
    assert len(calls) == 2


def test_recipe_and_stack():
    recipe = recipes.build("awq+gptq", "w3a16g64", points=10, sweeps=2, order="groups")
    assert recipe.solver.sweeps == 2 and recipe.transforms[0].points == 10
    assert recipe.to_dict()["solver"]["order"] == "groups"
    with pytest.raises(UsageError, match="order must be one of"):
        recipes.build("gptq", order="random")
    with pytest.raises(UsageError, match="damp must be in 0..1, got 2"):
        recipes.build("gptq", damp=2)
