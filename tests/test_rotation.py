"""rotate_ and its certificate; outliers of the trained models before and after."""

import pytest
import torch
import transformers

from fewbit.errors import TransformError
from fewbit.online import OnlineHadamard
from fewbit.orthogonal import rotation
from fewbit.rotation import certificate, outlier_ratios, rotate_, rounding_bound
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
def test_outliers_spread(shared, name):
    """What a token's grid pays, max / mean of its channels: above 30 before, below 5 after."""
    ids, model = torch.arange(256)[None] * 7 % 4096, trained(shared, name)
    before = outlier_ratios(model, ids)
    rotate_(model, r1="random-hadamard", r4="random-hadamard")
    after = outlier_ratios(model, ids)
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


def test_online_hadamard_compiles_whole():
    module = OnlineHadamard(rotation(24))
    x = torch.randn(3, 24)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), module(x))
