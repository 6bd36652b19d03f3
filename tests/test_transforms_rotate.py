"""Rotations leave the model's function alone: float64 logits, every twin, every combination."""

import copy

import pytest
import torch
import transformers

from fewbit.checkpoint import save
from fewbit.errors import AlreadyQuantizedError, UnsupportedError, UsageError
from fewbit.families import decoder_layers, describe
from fewbit.online import online_paths
from fewbit.orthogonal import KINDS, rotation
from fewbit.pipeline import quantize_
from fewbit.rotation import apply_
from fewbit.transforms.fold import FoldNorm, RMSNorm
from fewbit.transforms.rotate import Rotate
from tiny import TWINS, probe, tiny


def apply(model, transform):
    apply_(model, transform)
    return model


@torch.no_grad()
def change(model, transform):
    before = model(probe()).logits
    after = apply(model, transform)(probe()).logits
    return float((after - before).abs().max() / before.abs().max())


COMBINATIONS = {
    "r1": dict(r2=None),
    "r1 r2": {},
    "r1 r2 r4": dict(r4="random-hadamard"),
    "all": dict(r3="hadamard", r4="hadamard"),
    "r2 only": dict(r1=None),
}


BASE = ["opt", "llama-gqa", "llama-mha-bias", "llama-tied-64"]
UNROTATABLE = ["bloom", "gemma2", "gemma3"]
NO_R3 = {twin: "attention interface" for twin in TWINS if twin.startswith("falcon")}
NO_R3["gpt2"] = "query and key projections are fused"
ROTATABLE = [twin for twin in TWINS if twin not in UNROTATABLE]


@pytest.mark.parametrize("keeps_mean", [True, False])
@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("twin", ROTATABLE)
def test_logits_stay(twin, combination, keeps_mean):
    model = tiny(twin, torch.float64)
    if combination == "all" and twin in NO_R3:
        with pytest.raises(UnsupportedError, match=NO_R3[twin]):
            change(model, Rotate(**COMBINATIONS[combination]))
        return
    assert change(model, Rotate(**COMBINATIONS[combination], keeps_mean=keeps_mean)) < 1e-9


@pytest.mark.parametrize("twin", UNROTATABLE)
def test_unrotatable_is_refused_with_its_reason(twin):
    with pytest.raises(UnsupportedError, match="gains do not commute with a rotation"):
        apply(tiny(twin), Rotate())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("twin", BASE)
def test_every_kind(twin, kind):
    assert change(tiny(twin, torch.float64), Rotate(kind, kind, seed=5)) < 1e-9


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("twin", ROTATABLE)
def test_fold_alone(twin, centre):
    model = tiny(twin, torch.float64)
    assert change(model, FoldNorm(centre)) < 1e-9
    if describe(model).norm == "layer":
        norm = describe(model).sublayers[1].norm
        assert isinstance(decoder_layers(model)[0].get_submodule(norm), RMSNorm) == centre


def test_weights_change_and_gains_are_one():
    model = tiny("llama-gqa", torch.float64)
    before = copy.deepcopy(model)
    apply(model, Rotate())
    for (name, a), (_, b) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert not torch.equal(a, b), name
    assert torch.equal(model.model.norm.weight, torch.ones(48, dtype=torch.float64))


def test_matches_the_equations():
    """Embedding W R1, readers W R1, writers R1^T W, against dense float64 products."""
    model = tiny("llama-gqa", torch.float64)
    old = copy.deepcopy(model)
    apply(model, Rotate("random", None, seed=3))
    r1 = rotation(48, "random", 3).matrix()
    layer, was = model.model.layers[1], old.model.layers[1]
    torch.testing.assert_close(model.model.embed_tokens.weight, old.model.embed_tokens.weight @ r1)
    gained = was.mlp.up_proj.weight * was.post_attention_layernorm.weight
    torch.testing.assert_close(layer.mlp.up_proj.weight, gained @ r1)
    torch.testing.assert_close(layer.mlp.down_proj.weight, r1.T @ was.mlp.down_proj.weight)
    torch.testing.assert_close(
        model.lm_head.weight, (old.lm_head.weight * old.model.norm.weight) @ r1
    )


def test_given_matrices():
    r1 = rotation(48, "random", 7).matrix()
    r2 = [rotation(12, "random", i).matrix() for i in range(2)]
    assert change(tiny("llama-gqa", torch.float64), Rotate(r1, r2)) < 1e-9
    named = Rotate(r1, r2).to_dict()
    assert named["r1"] == named["r2"] == "given"


def test_rounds_once():
    """A half-precision model gets the float64 result rounded, not a chain of roundings."""
    half = tiny("opt").to(torch.float16)
    wide = copy.deepcopy(half).to(torch.float64)
    apply(half, Rotate(r4="hadamard"))
    apply(wide, Rotate(r4="hadamard"))
    for (name, a), (_, b) in zip(half.named_parameters(), wide.named_parameters(), strict=True):
        assert torch.equal(a, b.to(torch.float16)), name


def test_same_seed_same_bytes():
    a, b = (apply(tiny("opt"), Rotate("random", "random", seed=4)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("twin", BASE)
def test_r1_r2_reload_in_plain_transformers(twin, tmp_path):
    model = tiny(twin)
    apply(model, Rotate())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(probe()).logits, model(probe()).logits, rtol=0, atol=0)
    with pytest.raises(UsageError, match="rotated already"):
        apply(again, Rotate())


@pytest.mark.parametrize("options", [{"r4": "random-hadamard"}, {"keeps_mean": False}])
@pytest.mark.parametrize("twin", BASE)
def test_plain_transformers_refuses_what_it_would_compute_otherwise(twin, options, tmp_path):
    """By the class and by Auto, in a process that has never seen fewbit."""
    model = tiny(twin)
    if "keeps_mean" in options and describe(model).norm == "rms":
        pytest.skip("an RMSNorm needs no other")
    apply(model, Rotate(**options)).save_pretrained(tmp_path)
    for loader in (type(model), transformers.AutoModelForCausalLM):
        with pytest.raises((KeyError, ValueError), match="by fewbit"):
            loader.from_pretrained(tmp_path)


def test_what_cannot_be_saved_says_so(tmp_path):
    for options, message in [({"keeps_mean": False}, "is an RMSNorm"), ({"online": True}, "R4")]:
        model = tiny("opt")
        quantize_(model, "quarot", "w4a16g16", progress=False, **options)
        with pytest.raises(UnsupportedError, match=message):
            save(model, tmp_path / message)


def test_online_transforms_are_listed():
    model = apply(tiny("llama-gqa"), Rotate(r4="hadamard"))
    assert online_paths(model) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


def test_refusals():
    model = tiny("opt")
    with pytest.raises(UsageError, match="keep the mean"):
        apply(model, Rotate(rotation(48).matrix()))
    with pytest.raises(UsageError, match="not orthogonal"):
        apply(model, Rotate(torch.ones(48, 48), keeps_mean=False))
    with pytest.raises(UsageError, match=r"must be \[48, 48\], got \[4, 4\]"):
        apply(model, Rotate(torch.eye(4)))
    with pytest.raises(UsageError, match="r2 has 1 matrices"):
        apply(model, Rotate(None, [torch.eye(12)]))
    with pytest.raises(UsageError, match="r4 must be"):
        Rotate(r4="random")


def test_refuses_projected_embeddings_and_post_norm():
    import transformers

    fields = dict(vocab_size=9, hidden_size=16, ffn_dim=8, num_hidden_layers=1,
                  num_attention_heads=2, max_position_embeddings=8)
    config = transformers.OPTConfig(**fields, word_embed_proj_dim=8)
    with pytest.raises(UnsupportedError, match="projections stand between its residual stream"):
        apply(transformers.OPTForCausalLM(config), Rotate())
    config = transformers.OPTConfig(**fields, word_embed_proj_dim=16, do_layer_norm_before=False)
    with pytest.raises(UnsupportedError, match="norms follow the residual sum"):
        apply(transformers.OPTForCausalLM(config), Rotate())


def test_r4_after_quantising_is_refused():
    model = tiny("llama-gqa")
    model.model.layers[0].mlp.down_proj = torch.nn.Identity()
    with pytest.raises(AlreadyQuantizedError, match="come before quantisation"):
        apply(model, Rotate())
