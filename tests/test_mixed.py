"""Salient columns kept float, and clipped ranges."""

import pytest
import torch
from torch import nn

from fewbit import formats, ops
from fewbit.checkpoint import load, save
from fewbit.conversion import convert
from fewbit.errors import CheckpointError, UnsupportedError, UsageError
from fewbit.pipeline import quantize_
from fewbit.recipes import build
from fewbit.scheme import Scheme
from fewbit.solvers.clip import Clip, clamp_groups, clip_range
from fewbit.solvers.gptq import GPTQ
from fewbit.solvers.llm_int8 import LLMInt8
from fewbit.solvers.mixed import CHOICES, Mixed, MixedLinear
from fewbit.solvers.rtn import RTN
from fewbit.stats import Stats
from fewbit.stream import quantize_directory
from test_scale import stats_of
from test_smooth import DATA
from tiny import probe, tiny


def problem(rows=12, columns=40, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(60, columns)
    x[:, 7] *= 50
    x[:, 31] *= 30
    return nn.Linear(columns, rows), x


@pytest.mark.parametrize("by", CHOICES)
def test_kept_columns_are_exact(by):
    linear, x = problem()
    stats, scheme = stats_of(x), Scheme(3, 16)
    module, info = Mixed(0.05, by).build(linear, "l", scheme, stats, False)
    assert isinstance(module, MixedLinear) and len(info["kept"]) == 2
    if by in ("activation", "hessian"):
        assert info["kept"] == [7, 31]
    assert torch.equal(module.weight[:, module.kept], linear.weight[:, module.kept])
    with torch.no_grad():
        want = x.double() @ module.weight.double().T + linear.bias.double()
        bound = 45 * 2**-24 * (x.abs() @ module.weight.abs().T + linear.bias.abs())
        assert bool(((module(x).double() - want).abs() <= bound).all())
    plain = RTN().build(linear, "l", scheme, stats, False)[0]
    assert module.nbytes() == plain.nbytes() + 2 * 8 + 2 * 12 * 4


def test_activation_beats_random():
    linear, x = problem(64, 300)
    stats, scheme = stats_of(x), Scheme(3, 64)
    loss = {}
    for by in CHOICES:
        module, _ = Mixed(0.01, by).build(linear, "l", scheme, stats, False)
        loss[by] = stats.output_loss(module.weight - linear.weight.detach())
    rtn = RTN().build(linear, "l", scheme, stats, False)[0]
    loss["rtn"] = stats.output_loss(rtn.weight - linear.weight.detach())
    assert loss["activation"] < 0.2 * loss["rtn"] and loss["random"] > 0.7 * loss["rtn"]


@pytest.mark.parametrize("fraction, count", [(0.001, 1), (0.01, 3), (1.0, 300)])
def test_counts(fraction, count):
    linear, x = problem(4, 300)
    assert len(Mixed(fraction).salient(linear.weight, stats_of(x))) == count


def test_over_gptq_and_in_the_pipeline():
    linear, x = problem()
    scheme, stats, weight = Scheme(3, 16), stats_of(x), linear.weight.detach()
    exact = RTN().solve(weight, scheme, stats)[0], GPTQ().solve(weight, scheme, stats)[0]
    module, info = Mixed(0.05, base=GPTQ()).build(linear, "l", scheme, stats, False)
    losses = [
        stats.output_loss(ops.dequantize(*codes, 16) - weight) for codes in exact
    ] + [stats.output_loss(module.weight - weight)]
    assert info["kept"] == [7, 31] and losses == sorted(losses, reverse=True)
    assert losses[2] < 0.9 * losses[1]
    # no other float columns are better: the gradient of the loss by them is zero
    slope = (module.weight - weight).to(stats.gram.dtype) @ stats.gram[:, [7, 31]]
    size = (module.weight - weight).abs().to(slope.dtype) @ stats.gram[:, [7, 31]].abs()
    assert bool((slope.abs() <= 1e-5 * size).all())
    model = tiny("llama-gqa")
    report = quantize_(model, "mixed", "w3a16g16", DATA, progress=False, fraction=0.05)
    assert all(len(r.info["kept"]) >= 2 for r in report.linears)
    assert bool(model(input_ids=probe()).logits.isfinite().all())


@pytest.mark.parametrize("fraction", [0.05, 1.0])
def test_columns_that_nothing_excites_or_all_columns_stay_as_they_are(fraction):
    linear, x = problem()
    solver = Mixed(fraction, "random", base=GPTQ())
    kept = solver.salient(linear.weight, None)
    if fraction < 1:
        x[:, kept] = 0
    module, _ = solver.build(linear, "l", Scheme(3, 16), stats_of(x), False)
    assert torch.equal(module.kept_weight, linear.weight.detach()[:, kept])


@torch.no_grad()
def test_a_float_column_leads_to_the_float_model_s_output():
    """With "qronos" the kept columns aim at what the float model's inputs give."""
    linear, x = problem()
    drift = x + 0.05 * torch.randn_like(x)
    stats, scheme = stats_of(drift), Scheme(3, 16)
    stats.gram = drift.double().T @ drift.double()
    stats.cross = (x - drift).double().T @ drift.double()
    loss = {}
    for name, base in (("clip", Clip()), ("qronos", GPTQ(target="qronos", strength=1.0))):
        module, _ = Mixed(0.05, base=base).build(linear, "l", scheme, stats, False)
        loss[name] = float((x @ linear.weight.T - drift @ module.weight.T).square().sum())
    assert loss["qronos"] < 0.8 * loss["clip"]


@pytest.mark.parametrize("method, base", [
    ("mixed+gptq", GPTQ), ("gptq+mixed", GPTQ), ("awq+mixed", Clip), ("mixed", RTN),
])
def test_in_a_stack_the_other_solver_does_the_rest(method, base):
    solver = build(method, "w3a16g16", fraction=0.05).solver
    assert type(solver) is Mixed and type(solver.base) is base and solver.fraction == 0.05


def test_llm_int8_stacks_with_transforms_and_no_solver():
    assert isinstance(build("smoothquant+llm-int8", "w8a8").solver, LLMInt8)
    with pytest.raises(UsageError, match="llm-int8 rounds by itself"):
        build("llm-int8+gptq", "w8a8")


@pytest.mark.parametrize("twin", ["opt", "llama-gqa", "gpt2", "mixtral"])
def test_saved_and_loaded(twin, tmp_path):
    """Codes, columns and logits, bit for bit; from memory and from a directory."""
    model = tiny(twin)
    quantize_(model, "mixed", "w4a16g8", DATA, progress=False, fraction=0.05)
    save(model, tmp_path / "a", "fewbit")
    with torch.no_grad():
        want = model(input_ids=probe()).logits
        again = load(tmp_path / "a")
        assert torch.equal(again(input_ids=probe()).logits, want)
        assert sum(isinstance(m, MixedLinear) for m in again.modules()) == sum(
            isinstance(m, MixedLinear) for m in model.modules()
        )
        convert(tmp_path / "a", tmp_path / "b", "fewbit")
        assert torch.equal(load(tmp_path / "b")(input_ids=probe()).logits, want)
    for refused in (lambda: save(model, tmp_path / "c"),
                    lambda: convert(tmp_path / "a", tmp_path / "c", "compressed-tensors")):
        with pytest.raises(UnsupportedError, match="columns that stay float"):
            refused()


def test_a_directory_is_refused_before_the_work_or_written_whole(tmp_path):
    tiny("llama-gqa").half().save_pretrained(tmp_path / "model")
    run = (tmp_path / "model", tmp_path / "out", "mixed", "w3a16g16", DATA)
    with pytest.raises(UnsupportedError, match="leaves columns that stay float, for which format"):
        quantize_directory(*run, progress=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.fewbit").exists()
    quantize_directory(*run, progress=False, format="fewbit", fraction=0.05)
    linear = load(tmp_path / "out").model.layers[1].self_attn.q_proj
    float_ = tiny("llama-gqa").half().model.layers[1].self_attn.q_proj.weight
    assert linear.kept_weight.dtype == torch.float16
    assert torch.equal(linear.kept_weight, float_[:, linear.kept])


def test_damaged_columns_are_refused():
    linear, x = problem()
    scheme, own = Scheme(3, 16), formats.get("fewbit")
    module, _ = Mixed(0.05).build(linear, "l", scheme, stats_of(x), False)
    good = own.pack(module.codes(), scheme, kept=module.kept, kept_weight=module.kept_weight)
    own.check(good, scheme, 12, 40)
    for change, message in (
        ({"kept": torch.tensor([31, 7])}, "ascending columns in 0..39"),
        ({"kept": torch.tensor([7, 7])}, "ascending columns"),
        ({"kept": torch.tensor([7, 40])}, "ascending columns"),
        ({"kept": torch.tensor([7])}, "kept names 1 columns, kept_weight has 2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            own.extras({**good, **change}, scheme)
    with pytest.raises(CheckpointError, match="belong together"):
        own.extras({k: v for k, v in good.items() if k != "kept"}, scheme)
    with pytest.raises(CheckpointError, match="kept_weight is torch.float32"):
        own.check({**good, "kept_weight": torch.ones(11, 2)}, scheme, 12, 40)


def test_refusals():
    with pytest.raises(UsageError, match="by must be one of activation"):
        Mixed(by="size")
    with pytest.raises(UsageError, match="fraction must be above 0"):
        Mixed(0)
    with pytest.raises(UnsupportedError, match="mixed keeps float columns"):
        quantize_(tiny("opt"), "mixed", "w8a8", DATA, progress=False)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns, group", [(64, 16), (40, 16), (24, -1)])
def test_clip_never_loses_on_its_own_loss(columns, group, symmetric):
    torch.manual_seed(0)
    w, x = torch.randn(9, columns), torch.randn(80, columns)
    w[torch.rand_like(w) < 0.05] *= 4
    stats, scheme = stats_of(x), Scheme(3, group, symmetric, "float32")

    def group_losses(v):
        q = ops.pseudo_quantize(v, 3, group, symmetric, "float32") - w
        size = scheme.group_of(columns)
        parts = [
            ((q[:, i : i + size] @ stats.gram[i : i + size, i : i + size]) * q[:, i : i + size])
            for i in range(0, columns, size)
        ]
        return torch.stack([p.sum(1) for p in parts], 1)

    low, high = clip_range(w, scheme, stats.gram, 10, 0.5)
    clipped = clamp_groups(w, low, high, scheme)
    assert bool((group_losses(clipped) <= group_losses(w) * (1 + 1e-5)).all())
    assert float(group_losses(clipped).sum()) < 0.98 * float(group_losses(w).sum())
    assert bool((low <= 0).all()) and bool((high >= 0).all())


def test_asymmetric_ends_move_alone():
    """One outlier on the low side: only that end is cut."""
    w = torch.cat([torch.tensor([-8.0]), torch.linspace(0, 1, 15)])[None]
    eye = torch.eye(16)
    eye[0, 0] = 1e-3  # the outlier's input hardly ever speaks
    low, high = clip_range(w, Scheme(3, 16, scale_dtype="float32"), eye, 10, 0.9)
    assert float(low) > -2 and float(high) > 0.9  # cut to a fifth, and hardly


@pytest.mark.parametrize("twin, skipped", [("opt", 4), ("gpt2", 2), ("phi3", 2), ("bloom", 2)])
def test_queries_and_keys_keep_their_range_on_request(twin, skipped):
    for option, count in ((True, 0), (False, skipped)):
        report = quantize_(tiny(twin), "awq", "w3a16g16", DATA, progress=False, clip_qk=option)
        assert sum(not r.info["clipped"] for r in report.linears) == count


def test_skip_and_pipeline():
    linear, x = problem()
    stats, scheme = stats_of(x), Scheme(3, 16)
    solver = Clip(skip=("q_proj",))
    assert not solver.build(linear, "attn.q_proj", scheme, stats, False)[1]["clipped"]
    assert solver.build(linear, "attn.v_proj", scheme, stats, False)[1]["clipped"]
    report = quantize_(tiny("opt"), "awq", "w3a16g16", DATA, progress=False, clip=True)
    assert all(r.info["clipped"] for r in report.linears)


def test_clip_of_unseen_inputs_is_rounding():
    linear, _ = problem()
    nothing = Stats(0, torch.zeros(40), torch.zeros(40), torch.zeros(40, 40))
    codes, _ = Clip().solve(linear.weight.detach(), Scheme(3, 16), nothing)
    plain, _ = RTN().solve(linear.weight.detach(), Scheme(3, 16), None)
    assert all(torch.equal(a, b) for a, b in zip(codes, plain, strict=True))
