"""Perplexity by its definition, and its protocol in the result."""

import math

import pytest
import torch

from fewbit.errors import CalibrationError
from fewbit.evaluate import perplexity
from tiny import probe, tiny


@pytest.mark.parametrize("stride", [None, 4, 7])
def test_definition(stride):
    model, window = tiny("llama-gqa"), 12
    tokens = probe(1, 60)[0]
    step = stride or window
    total, count = 0.0, 0
    for i, start in enumerate(range(0, 60 - window + 1, step)):
        ids = tokens[start : start + window]
        scores = model(ids[None]).logits[0].double().log_softmax(-1)
        first = 1 if i == 0 else window - step
        for t in range(max(first, 1), window):
            total -= float(scores[t - 1, ids[t]])
            count += 1
    result = perplexity(model, tokens, window, stride, batch=3)
    assert result.predictions == count and result.window == window and result.stride == step
    assert math.isclose(float(result), math.exp(total / count), rel_tol=1e-5)
    assert "no BOS" in str(result) and f"{count} predictions" in str(result)


def test_every_token_is_scored_once_with_a_stride():
    result = perplexity(tiny("opt"), probe(1, 40)[0], 10, 5)
    assert result.predictions == 9 + 5 * (result.windows - 1)


def test_limit_and_training_mode():
    model = tiny("opt").train()
    result = perplexity(model, probe(1, 50)[0], 10, limit=2)
    assert result.windows == 2 and model.training


def test_says_what_is_wrong():
    model = tiny("opt")
    with pytest.raises(CalibrationError, match="too short: 5 tokens, one window needs 10"):
        perplexity(model, probe(1, 5)[0], 10)
    with pytest.raises(CalibrationError, match="window must be at least 2"):
        perplexity(model, probe(1, 5)[0], 1)
    with pytest.raises(CalibrationError, match="stride in 1..window, got 4 and 9"):
        perplexity(model, torch.zeros(20, dtype=torch.long), 4, 9)
