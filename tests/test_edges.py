"""Scales on every edge leave the function of every twin alone; unknown models are refused."""

import pytest
import torch
import transformers

from fewbit.calibrate import Windows
from fewbit.errors import UnsupportedError
from fewbit.families import decoder_layers, describe, families
from fewbit.linearise import Experts, linearise
from fewbit.pipeline import quantize_
from fewbit.transforms import scale, smooth
from fewbit.transforms.edges import apply_scale, edges
from tiny import TWINS, probe, tiny


def logits(model):
    with torch.no_grad():
        return model(input_ids=probe(), use_cache=False).logits


@pytest.mark.parametrize("twin", TWINS)
def test_logits_stay(twin):
    model = tiny(twin, torch.float64)
    before = logits(model)
    family = describe(model)
    linearise(model, family)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-9 * float(before.abs().max()))
    for layer in decoder_layers(model, family):
        found = edges(layer, family, model.config)
        assert [e.kind for e in found].count("norm") == len({s.norm for s in family.sublayers})
        for edge in found:
            stat = torch.rand(layer.get_submodule(edge.readers[0]).in_features).double() + 0.1
            s = edge.to_source(stat) * 3
            apply_scale(layer, edge, s, family)
    after = logits(model)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-9


@pytest.mark.parametrize("twin", TWINS)
def test_inner_edge_reaches_the_writer(twin):
    """The writer's inputs are divided by exactly what its columns are multiplied by."""
    model = tiny(twin, torch.float64)
    family = describe(model)
    linearise(model, family)
    layer = decoder_layers(model, family)[0]
    seen = {}
    inner = [e for e in edges(layer, family, model.config) if e.kind == "inner"]
    for edge in inner:
        layer.get_submodule(edge.readers[0]).register_forward_pre_hook(
            lambda m, args, key=edge.readers[0]: seen.__setitem__(key, args[0])
        )
    logits(model)
    before = dict(seen)
    for edge in inner:
        width = layer.get_submodule(edge.readers[0]).in_features
        s = edge.to_source(torch.rand(width).double() + 0.5)
        apply_scale(layer, edge, s, family)
        seen.clear()
        logits(model)
        if edge.readers[0] in before:  # an expert may have no tokens
            scaled = seen[edge.readers[0]] * edge.to_readers(s)
            torch.testing.assert_close(scaled, before[edge.readers[0]], rtol=1e-6, atol=1e-9)
    assert inner


@pytest.mark.parametrize("method, options", [
    ("awq", {"form": "both", "points": 4}), ("smoothquant", {}), ("smoothquant", {"alpha": "auto"}),
])
@pytest.mark.parametrize("twin", TWINS)
def test_logits_stay_under_what_the_methods_choose(twin, method, options, monkeypatch):
    """The scales of a float32 run, moved in the float64 twin."""
    chosen = []

    def keep(layer, edge, s, family):
        chosen.append((layer, edge, s))
        apply_scale(layer, edge, s, family)

    monkeypatch.setattr(scale, "apply_scale", keep)
    monkeypatch.setattr(smooth, "apply_scale", keep)
    model, exact = tiny(twin), tiny(twin, torch.float64)
    data = Windows([probe(2, 40, seed=s) for s in range(2)])
    scheme = "w3a16g16" if method == "awq" else "w8a8"
    quantize_(model, method, scheme, data, keep_float=False, progress=False, **options)
    before, family = logits(exact), describe(exact)
    linearise(exact, family)
    layers = list(decoder_layers(model, family))
    for layer, edge, s in chosen:
        apply_scale(decoder_layers(exact, family)[layers.index(layer)], edge, s.double(), family)
    assert any(float((s - 1).abs().max()) > 0.01 for _, _, s in chosen)
    after = logits(exact)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-9


def test_linearise_shares_storage_and_undoes():
    model = tiny("mixtral")
    fused = model.model.layers[0].mlp.experts
    undo = linearise(model, describe(model))
    made = model.model.layers[0].mlp.experts
    assert isinstance(made, Experts)
    assert made[1].down_proj.weight.data_ptr() == fused.down_proj[1].data_ptr()
    undo()
    assert model.model.layers[0].mlp.experts is fused


def test_unknown_architecture_is_refused_by_name():
    config = transformers.GPTJConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=2, rotary_dim=4)
    with pytest.raises(UnsupportedError, match="no family describes GPTJForCausalLM; .*Llama"):
        describe(transformers.GPTJForCausalLM(config))


def test_refused_configurations():
    for post_norm, reason in (
        (True, "do_layer_norm_before=False is not supported: its norms follow the residual sum"),
        (False, "word_embed_proj_dim=32 is not supported: projections stand between"),
    ):  # OPT-350m, and its projections alone
        config = transformers.OPTConfig(
            vocab_size=97, hidden_size=48, ffn_dim=80, num_hidden_layers=1, num_attention_heads=4,
            word_embed_proj_dim=32, do_layer_norm_before=not post_norm,
        )
        model = transformers.OPTForCausalLM(config)
        assert model.model.decoder.project_in is not None
        for method in ("rtn", "awq"):
            with pytest.raises(UnsupportedError, match=reason):
                quantize_(model, method, "w4a16g16", [[5] * 40] * 2, progress=False)
    model = tiny("qwen3-moe")
    model.config.decoder_sparse_step = 2
    with pytest.raises(UnsupportedError, match="decoder_sparse_step=2 .* experts"):
        describe(model)


def test_every_family_has_a_twin():
    served = {type(tiny(twin)).__name__ for twin in TWINS}
    assert served == set(families())
