"""The method llm-int8: outlier columns of the input stay float."""

import pytest
import torch

from fewbit.errors import UnsupportedError, UsageError
from fewbit.linear import MixedInt8Linear
from fewbit.pipeline import quantize_
from tiny import probe, tiny


def test_outlier_columns_repair_the_model():
    errors = []
    for threshold in (1e9, 6.0, 1e-9):
        model = tiny("opt")
        want = model(probe()).logits
        norm = model.model.decoder.layers[0].self_attn_layer_norm
        with torch.no_grad():
            norm.weight[3] *= 30
            want = model(probe()).logits
        report = quantize_(model, "llm-int8", "w8a8", threshold=threshold, progress=False)
        assert {r.info["module"] for r in report.linears} == {"MixedInt8Linear"}
        errors.append(float((model(probe()).logits - want).norm()))
    assert isinstance(model.model.decoder.layers[0].fc1, MixedInt8Linear)
    assert errors[0] > 2 * errors[1] > 2 * errors[2]


def test_refusals():
    with pytest.raises(UnsupportedError, match="llm-int8 is w8a8"):
        quantize_(tiny("opt"), "llm-int8", "w4a16g16", progress=False)
    with pytest.raises(UsageError, match="threshold must be above 0"):
        quantize_(tiny("opt"), "llm-int8", "w8a8", threshold=-1, progress=False)
