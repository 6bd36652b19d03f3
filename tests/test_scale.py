"""AWQ search: the race finds the grid's best, losses are true, degenerate inputs stay finite."""

import pytest
import torch
from torch import nn

import small_models
from bench_search_scale import ours, problem
from fewbit import ops
from fewbit.calibrate import Windows
from fewbit.errors import UsageError
from fewbit.families import decoder_layers, describe
from fewbit.pipeline import quantize_
from fewbit.scheme import Scheme
from fewbit.stats import Stats
from fewbit.transforms.race import Block, full_loss, race
from fewbit.transforms.scale import FORMS, SearchScale, awq_scale, closed_scale, weight_mean
from tiny import probe, tiny


def stats_of(x):
    gram = torch.zeros(x.shape[1], x.shape[1])
    ops.gram(x, gram)
    return Stats(len(x), x.abs().sum(0), x.abs().amax(0), gram)


def direct_loss(w, x, s, scheme):
    q = ops.pseudo_quantize(w * s, scheme.bits, scheme.group_size, scheme.symmetric, "float32") / s
    return float((x.double() @ (q - w).double().T).square().sum()) / len(x)


@pytest.mark.parametrize("size, tokens", [(96, 40), (300, 500)])
def test_full_loss_is_the_output_error(size, tokens):
    w, x = problem(size, tokens, 0)
    scheme = Scheme(4, 32, scale_dtype="float32")
    s = awq_scale(x.abs().mean(0), 0.4)
    got = full_loss(Block(w, stats_of(x)), s, scheme)
    # two float32 products of inner size tokens and K: their forward bound, on sums of squares
    assert got == pytest.approx(direct_loss(w, x, s, scheme), rel=2 * (tokens + size) * 2**-24)


@pytest.mark.parametrize("seed", range(2))
def test_race_equals_the_full_grid(seed):
    w, x = problem(1100, 256, seed)
    stats, scheme = stats_of(x), Scheme(4, 128, scale_dtype="float32")
    result, scales = ours(w, stats, scheme)
    full = [full_loss(Block(w, stats), s, scheme) for s in scales]
    assert full[result.best] <= min(full)
    for loss, exact, true in zip(result.losses, result.exact, full, strict=True):
        assert loss == pytest.approx(true, rel=1e-6 if exact else 0.3)
    assert sum(result.exact) < len(scales)  # it did save work


def test_race_sums_over_blocks():
    w, x = problem(64, 50, 0)
    _, y = problem(64, 50, 1)
    scheme = Scheme(3, 32, scale_dtype="float32")
    blocks = [Block(w, stats_of(x)), Block(w * 2, stats_of(y))]
    scales = [awq_scale(x.abs().mean(0), r / 5) for r in range(5)]
    result = race(scales, blocks, scheme)
    sums = [sum(full_loss(b, s, scheme) for b in blocks) for s in scales]
    assert all(result.exact) and result.losses == sums and result.best == sums.index(min(sums))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_degenerate_statistics(form, bits):
    """Dead channels, zero groups, fp16-sized inputs: scales finite and positive."""
    torch.manual_seed(0)
    w = torch.randn(8, 24)
    w[:, :8] = 0
    x = torch.randn(30, 24) * torch.logspace(-6, 4, 24)
    x[:, 3] = 0
    block = Block(w, stats_of(x))
    from fewbit.transforms.edges import Edge

    edge = Edge("norm", "n", ("l",))
    names, scales = SearchScale(5, form).candidates(edge, [block], 8)
    assert len(names) == len(scales)
    assert torch.equal(scales[0], torch.ones(24))
    for s in scales:
        assert bool((s > 0).all()) and bool(s.isfinite().all())
    result = race(scales, [block], Scheme(bits, 8, scale_dtype="float32"))
    assert torch.tensor(result.losses).isfinite().all()
    assert result.losses[result.best] <= result.losses[0]


def test_constant_and_unseen_inputs():
    w = torch.randn(4, 8)
    for stats in (stats_of(torch.ones(5, 8)), Stats(0, torch.zeros(8), torch.zeros(8),
                                                   torch.zeros(8, 8))):
        scales = [awq_scale(stats.mean_abs, r / 4) for r in range(4)]
        assert race(scales, [Block(w, stats)], Scheme(4, 8)).best == 0


def test_closed_scale_directions():
    x, w = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0])
    for direction, ratio in ((1, 4**0.5 * 2**0.5), (-1, 4**0.5 / 2**0.5)):
        s = closed_scale(x, w, 0.5, direction)
        assert float(s[1] / s[0]) == pytest.approx(ratio, rel=1e-6)


def test_weight_mean_is_per_group():
    w = torch.tensor([[1.0, 2.0, 0.0, 0.0], [4.0, 4.0, 3.0, 6.0]])
    got = weight_mean([Block(w, None)], 2)
    torch.testing.assert_close(got, torch.tensor([0.75, 1.0, 0.25, 0.5]))
    assert float(w[0, 1]) == 2.0  # the weight itself is not touched


def test_wrong_form():
    with pytest.raises(UsageError, match="form must be one of search, .* got 'best'"):
        SearchScale(form="best")


@pytest.mark.parametrize("twin", ["llama-gqa", "phi3", "falcon-11b"])
def test_grouped_query_attention_improves_the_output_projection(twin):
    """v -> o under grouped-query attention lowers the true loss of the output projection."""
    model = tiny(twin)
    path = describe(model).sublayers[0].writes
    layers = decoder_layers(model)
    for layer in layers:  # a few loud value channels, as trained models have
        v = layer.get_submodule(describe(model).sublayers[0].inner)
        v.weight[-4:] *= 20
    data = Windows([probe(4, 60, seed=s) for s in range(4)])
    report = quantize_(model, "awq", "w3a16g16", data, progress=False)
    edges = [r for r in report.transforms if str(r.get("edge", "")).endswith(f"-> {path}")]
    assert len(edges) == len(layers)
    assert all(r["loss"] < r["rtn_loss"] for r in edges)
    assert isinstance(layers[0].get_submodule(path), nn.Module)


def test_the_trained_llama_s_output_projection_improves(shared):
    """v -> o with 8 heads on 2 key-value heads: less true loss than rounding, in no layer more."""
    bench = small_models.load("llama-tiny")
    data = Windows(bench.calibration.batches[:8])
    report = quantize_(bench.model, "awq", "w3a16g128", data, keep_float=False, progress=False)
    found = [r for r in report.transforms if "v_proj -> self_attn.o_proj" in r.get("edge", "")]
    assert len(found) == 4 and all(r["loss"] <= r["rtn_loss"] for r in found)
    assert sum(r["loss"] for r in found) < 0.99 * sum(r["rtn_loss"] for r in found)
