"""rotate_ and its certificate; the lab's steps; outliers of the trained models."""

import pytest
import torch
import transformers

from bench_rotation import ratios, rotated
from fewbit.errors import TransformError, UsageError
from fewbit.families import describe
from fewbit.online import OnlineHadamard
from fewbit.orthogonal import rotation
from fewbit.rotation import (
    certificate,
    fuse_layer_norms,
    fuse_ln_linear,
    get_orthogonal_matrix,
    plot_2d_layer_comparison,
    rotate_,
    rotate_model_weight,
    rounding_bound,
)
from fewbit.transforms.fold import RMSNorm
from tiny import probe, tiny

MODELS = ["opt-tiny", "llama-tiny", "opt-tiny-outliers", "llama-tiny-outliers"]


def trained(shared, name):
    path = shared / "models" / name
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("keeps_mean", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_trained_models_stay_within_rounding(shared, name, keeps_mean):
    model = trained(shared, name)
    result = rotate_(model, r3="hadamard", r4="random-hadamard", keeps_mean=keeps_mean)
    assert 0 < result["change"] <= result["bound"] < 1e-3


@pytest.mark.parametrize("name", ["opt-tiny-outliers", "llama-tiny-outliers"])
def test_outliers_spread(shared, name, monkeypatch):
    """What a token's grid pays, max / mean of its channels: above 30 before, below 5 after."""
    monkeypatch.setattr("bench_rotation.SHARED", shared)
    ids = torch.arange(256)[None] * 7 % 4096
    before, after = ratios(trained(shared, name), ids), ratios(rotated(name), ids)
    reads = [p for p in before if not p.endswith(("o_proj", "out_proj", "down_proj", "fc2"))]
    for path in reads:
        assert before[path][0] > 50 and after[path][0] < 10
        assert before[path][1] > 30 and after[path][1] < 5


def test_certificate_sees_a_wrong_rotation():
    model = tiny("llama-gqa")
    before = model(probe()).logits
    model.model.layers[0].self_attn.q_proj.weight[0] *= 1.01
    with pytest.raises(TransformError, match="logits differ by"):
        certificate(model, before, probe())
    assert rounding_bound(model) < 1e-3 < rounding_bound(model.to(torch.bfloat16))


@pytest.mark.parametrize("mode", ["random", "hadamard"])
@pytest.mark.parametrize("twin", ["opt", "llama-tied-64"])
@torch.no_grad()
def test_lab_steps(twin, mode):
    model = tiny(twin, torch.float64)
    before = model(probe()).logits
    fuse_layer_norms(model)
    assert float((model(probe()).logits - before).abs().max()) < 1e-9
    r1 = get_orthogonal_matrix(model.config.hidden_size, mode, torch.float64)
    embed = model.get_input_embeddings().weight.clone()
    rotate_model_weight(model, r1)
    torch.testing.assert_close(model.get_input_embeddings().weight, embed @ r1)
    assert float((model(probe()).logits - before).abs().max()) < 1e-9
    if describe(model).norm == "layer":
        assert isinstance(model.model.decoder.layers[0].self_attn_layer_norm, RMSNorm)


@torch.no_grad()
def test_fuse_ln_linear():
    norm, linear = torch.nn.LayerNorm(8), torch.nn.Linear(8, 3, bias=False)
    norm.weight.copy_(torch.randn(8)), norm.bias.copy_(torch.randn(8))
    x = torch.randn(5, 8)
    before = linear(norm(x))
    fuse_ln_linear(norm, [linear])
    assert torch.equal(norm.weight, torch.ones(8)) and not norm.bias.any()
    torch.testing.assert_close(linear(norm(x)), before)


def test_plot():
    pytest.importorskip("matplotlib")
    states = [torch.randn(1, 20, 16) for _ in range(3)]
    figure = plot_2d_layer_comparison(states, states, "before", "after", (1, 3))
    assert len(figure.axes) == 2 * 2 + 2
    with pytest.raises(UsageError, match="2 and 3 layers"):
        plot_2d_layer_comparison(states[:2], states, "a", "b")


def test_online_hadamard_compiles_whole():
    module = OnlineHadamard(rotation(24))
    x = torch.randn(3, 24)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), module(x))
