"""method="auto": a knapsack that is exact, costs that predict, a choice that holds up."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

import fewbit
from fewbit import auto, evaluate
from fewbit.calibrate import Windows, cut, read_text, tokenize
from fewbit.checkpoint import load_float, load_tokenizer
from fewbit.cli import main
from fewbit.errors import CalibrationError, UsageError
from fewbit.families import describe, linear_names
from fewbit.kv import OnlineKV
from fewbit.recipes import build
from fewbit.scheme import Scheme
from fewbit.solvers.auto import WIDTHS
from tiny import probe, tiny


def problem(items=6, choices=4):
    sizes = torch.randint(1, 40, (items, choices)).sort(1).values * 8
    costs = torch.rand(items, choices, dtype=torch.float64).sort(1, descending=True).values
    return sizes, costs


def every(sizes, costs):
    """(size, cost) of all ways to choose."""
    for choice in itertools.product(range(sizes.shape[1]), repeat=len(sizes)):
        at = torch.arange(len(sizes)), torch.tensor(choice)
        yield int(sizes[at].sum()), float(costs[at].sum())


def test_knapsack_against_every_choice():
    for seed in range(20):
        torch.manual_seed(seed)
        sizes, costs = problem()
        ways = list(every(sizes, costs))
        budget = int(sizes.double().mean(1).sum())
        at = torch.arange(len(sizes)), torch.tensor(auto.knapsack(sizes, costs, budget))
        assert int(sizes[at].sum()) <= budget
        assert float(costs[at].sum()) == pytest.approx(min(c for s, c in ways if s <= budget))
        limit = float(costs.mean(1).sum())
        at = torch.arange(len(sizes)), torch.tensor(auto.smallest(sizes, costs, limit))
        assert float(costs[at].sum()) <= limit
        assert int(sizes[at].sum()) == min(s for s, c in ways if c <= limit)
    with pytest.raises(UsageError, match="too small: the narrowest weights need"):
        auto.knapsack(sizes, costs, int(sizes.amin(1).sum()) - 1)
    with pytest.raises(UsageError, match="out of reach"):
        auto.smallest(sizes, costs, float(costs.amin(1).sum()) * 0.99)


def test_fisher_is_the_mean_squared_gradient():
    model, windows = tiny("llama-gqa"), Windows(list(probe(3, 9).split(1)))
    model.get_input_embeddings().weight.requires_grad_(True)
    flags = [p.requires_grad for p in model.parameters()]
    got = auto.fisher(model, describe(model), windows)
    assert list(got) == list(linear_names(model))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    name, total, kept = "model.layers.1.mlp.up_proj", 0.0, []
    model.get_submodule(name).register_forward_hook(lambda m, a, y: kept.append(y))
    generator = torch.Generator().manual_seed(0)
    for ids in windows.batches:
        kept.clear()
        scores = model(ids).logits[0].log_softmax(-1)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        g = torch.autograd.grad(scores.gather(1, drawn).sum(), kept[0])[0]
        total = total + g[0].double().square().sum(0)
    torch.testing.assert_close(got[name], total / 27, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rows, columns, group_size", [(16, 128, 64), (48, 192, -1)])
def test_sizes_are_those_of_packed_linears(rows, columns, group_size, bits):
    scheme = Scheme(bits=bits, group_size=group_size)
    packed = fewbit.PackedLinear.from_linear(torch.nn.Linear(columns, rows, bias=False), scheme)
    assert packed.nbytes() == auto.size_of((rows, columns), scheme)


@pytest.mark.parametrize("scheme", ["w4a16g64", "w4a16kv4", "w8a8", "w4a4", "w4a4kv4"])
def test_candidates_can_do_their_scheme(scheme):
    """Each is a stack of one width that quantises what the scheme says."""
    scheme = Scheme.parse(scheme)
    found = auto.candidates(scheme)
    assert len({r.name for r in found}) == len(found) >= 1
    for recipe in found:
        assert recipe.scheme == scheme and not recipe.schemes
        quantized = recipe.integer or recipe.quantizes_activations
        assert quantized == (scheme.activation_bits < 16 or scheme.kv_bits < 16)
        assert recipe.quantizes_activations or scheme.kv_bits == 16


def test_auto_and_then_tune():
    """What is learned comes after the choice, on all windows; the choice sees WINDOWS of them."""
    model, data = tiny("llama-tied-64"), Windows(list(probe(4, 24).split(1)))
    report = fewbit.quantize_(
        model, "auto+tune", "w3a16g64", data, progress=False, epochs=1, batch=2
    )
    assert report.recipe["name"].startswith("auto: ") and report.recipe["schemes"]
    assert report.recipe["tune"]["epochs"] == 1 and report.tune["steps"] == 2


def test_auto_quantises_the_cache():
    model, data = tiny("llama-gqa"), Windows(list(probe(4, 24).split(1)))
    report = fewbit.quantize_(model, "auto", "w4a16kv4g16", data, progress=False)
    assert "quarot+qronos" in report.recipe["name"]
    assert {m.bits for m in model.modules() if isinstance(m, OnlineKV)} == {4}


def test_auto_keeps_to_its_size():
    model, data = tiny("llama-tied-64"), Windows(list(probe(8, 24).split(1)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    shapes = [tuple(model.get_submodule(n).weight.shape) for n in linear_names(model)]

    def bytes_of(bits):
        return sum(auto.size_of(shape, Scheme(bits=bits, group_size=64)) for shape in shapes)

    weights = sum(rows * columns for rows, columns in shapes)
    cases = [({}, bytes_of(4)), ({"bits": 3.5}, 3.5 / 8 * weights), ({"kl": 4e-3}, bytes_of(8))]
    for options, most in cases:
        report = fewbit.quantize_(model, "auto", "w4a16g64", data, progress=False, **options)
        packed = [model.get_submodule(r.name) for r in report.linears]
        size = sum(auto.size_of(tuple(m.weight.shape), m.scheme) for m in packed)
        assert 0.9 * bytes_of(2) < size <= most
        assert {str(m.scheme) for m in packed} == {r.scheme for r in report.linears}
        fewbit.restore_(model)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.slow
def test_auto_beats_the_best_single_width_on_unseen_text(shared):
    path = shared / "models" / "llama-tiny"
    model, tokenizer = load_float(path), load_tokenizer(path)
    ids = tokenize(read_text(shared / "data" / "books_calibration.txt"), tokenizer)
    data, held = cut(ids, 128, 8, "books"), cut(ids[-4 * 256:], 256, 4, "held out")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reference = evaluate.log_probabilities(model, held)
    losses, sizes = {}, {}
    for method in ("auto", "awq+qronos"):
        report = fewbit.quantize_(model, method, "w3a16g128", data, progress=False)
        losses[method] = evaluate.compare(model, held, reference).kl
        sizes[method] = report.bytes_after
        widths = {r.scheme for r in report.linears}
        assert (len(widths) > 1) == (method == "auto")
        fewbit.restore_(model)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert sizes["auto"] <= sizes["awq+qronos"] and losses["auto"] < losses["awq+qronos"]


def test_mixed_widths_survive_saving(tmp_path):
    model, ids = tiny("llama-gqa"), probe()
    names = list(linear_names(model))
    mixed = {name: Scheme(bits=WIDTHS[i % 4], group_size=32) for i, name in enumerate(names)}
    recipe = replace(build("rtn", "w4a16g32"), schemes=mixed)
    report = fewbit.quantize_(model, recipe, progress=False)
    assert {r.name: r.scheme for r in report.linears} == {n: str(s) for n, s in mixed.items()}
    before = model(ids).logits
    fewbit.save(model, tmp_path, "fewbit")
    assert torch.equal(fewbit.load(tmp_path)(ids).logits, before)


def test_command_line(shared, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        "quantize", str(shared / "models" / "llama-tiny"), "-o", str(out), "--method", "auto",
        "--bits", "3", "--calibration", str(shared / "data" / "books_calibration.txt"),
        "--window", "32", "--samples", "4", "--quiet",
    ]
    assert main([*arguments, "--format", "awq"]) == 4  # it has one width only
    assert main(arguments) == 0 and main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["linears"] == 28


def test_says_what_is_wrong():
    model, data = tiny("opt"), Windows(list(probe(4, 12).split(1)))
    for options, message in [
        (dict(bits=3.0, kl=0.1), "a size .bits. or a quality .kl., not both"),
        (dict(bits=1.0), "too small: the narrowest weights need"),
        (dict(depth=3), "method 'auto': .*unexpected keyword argument 'depth'"),
    ]:
        with pytest.raises(UsageError, match=message):
            fewbit.quantize_(model, "auto", "w4a16g16", data, progress=False, **options)
    with pytest.raises(UsageError, match="'auto' chooses the stack itself, got 'awq.auto'"):
        fewbit.quantize_(model, "awq+auto", "w4a16g16", data, progress=False)
    with pytest.raises(CalibrationError, match="at least 4 calibration windows .* got 2"):
        fewbit.quantize_(model, "auto", "w4a16g16", probe(2, 12), progress=False)
