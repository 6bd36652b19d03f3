"""Certificates: right transforms pass with room, wrong ones are caught and named."""

import pytest
import torch

from fewbit import certificate
from fewbit.errors import TransformError
from fewbit.pipeline import quantize_
from fewbit.recipes import Recipe
from fewbit.scheme import Scheme
from fewbit.transforms import edges, scale
from fewbit.transforms.fold import FoldNorm
from fewbit.transforms.rotate import Rotate
from test_smooth import DATA
from tiny import TWINS, tiny


def run(twin, *transforms, dtype=torch.float32):
    recipe = Recipe("test", Scheme.parse("w8a16g16"), transforms)
    return quantize_(tiny(twin).to(dtype), recipe, calibration=DATA, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("twin", TWINS)
def test_f20_scales_are_certified_in_every_family(twin, dtype):
    records = run(twin, scale.SearchScale(4), dtype=dtype).certificates
    parts = [r["path"].rpartition(".")[2] for r in records]
    assert parts[2:] == ["0", "1", "logits"]  # behind embedding and head
    assert all(r["error"] <= r["bound"] / 2 for r in records)
    assert all(r["bound"] < (2e-2 if dtype == torch.float32 else 60) for r in records)


@pytest.mark.parametrize("transform", [
    Rotate(), Rotate("random", keeps_mean=False), Rotate(r4="hadamard"), FoldNorm(True),
    FoldNorm(False),
])
@pytest.mark.parametrize("twin", ["opt", "llama-gqa", "phi", "gemma", "mixtral"])
def test_f20_rotations_are_certified(twin, transform):
    records = run(twin, transform, scale.SearchScale(4)).certificates
    assert all(r["error"] <= r["bound"] / 2 for r in records)


@pytest.mark.parametrize("twin", ["gemma", "opt"])
def test_f20_a_wrong_fold_names_its_layer(twin, monkeypatch):
    """A unit-offset norm taken for a plain one, and a norm whose bias is forgotten."""
    def wrong(layer, edge, s, family):
        source = layer.get_submodule(edge.source)
        source.weight.div_(s if edge.kind == "norm" else s[:, None])
        for path in edge.readers:
            layer.get_submodule(path).weight.mul_(edge.to_readers(s))

    monkeypatch.setattr(scale, "apply_scale", wrong)
    with pytest.raises(TransformError, match=r"layers.0 computes something else after SearchScale"):
        run(twin, scale.SearchScale(4))
    assert edges.apply_scale is not wrong


def test_a_wrong_fold_shows_in_the_logits_too(monkeypatch):
    """With bounds that no layer exceeds, the logits of both models still tell."""
    room, move = 1e9, scale.apply_scale

    def wrong(layer, edge, s, family):
        move(layer, edge, s, family)
        layer.get_submodule(edge.source).weight.mul_(1.01)

    monkeypatch.setattr(scale, "apply_scale", wrong)
    monkeypatch.setattr(certificate, "FACTOR", room * certificate.FACTOR)
    last = run("opt", scale.SearchScale(4)).certificates[-1]
    assert last["path"] == "logits" and last["error"] > last["bound"] / room


class ForgetsOneFold(FoldNorm):
    def layer(self, layer, context):
        if context.index != 1:
            super().layer(layer, context)


@pytest.mark.parametrize("twin", ["llama-gqa", "opt"])
def test_a_rotation_with_a_broken_fold_names_its_layer(twin, monkeypatch):
    monkeypatch.setattr(Rotate, "_fold", lambda self, family: ForgetsOneFold(False))
    with pytest.raises(TransformError, match=r"layers.1 computes something else after Rotate"):
        run(twin, Rotate())


def test_a_wrong_head_is_named():
    class Bad(FoldNorm):
        def outside(self, model, family):
            records = super().outside(model, family)
            model.lm_head.weight.mul_(1.01)
            return records

    with pytest.raises(TransformError, match="lm_head computes something else after Bad"):
        run("llama-gqa", Bad())


def test_no_scale_crosses_an_online_rotation_or_enters_a_norm_without_gain():
    report = run("llama-gqa", Rotate(r4="hadamard"), scale.SearchScale(4))
    assert not any("down_proj" in r.get("edge", "") for r in report.transforms)
    report = run("opt", FoldNorm(True), scale.SearchScale(4))
    assert {r["edge"].split(" ")[0] for r in report.transforms if "edge" in r} == {
        "self_attn.v_proj", "fc1"
    }


def test_plain_rounding_has_none():
    assert run("opt").certificates == []
