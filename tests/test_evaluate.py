"""Every figure by its definition, and its protocol in the result."""

import math

import pytest
import torch

from fewbit.errors import CalibrationError, MissingExtraError, UsageError
from fewbit.evaluate import agreement, lm_eval_tasks, perplexity, speed
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
    with pytest.raises(UsageError, match="window must be at least 2"):
        perplexity(model, probe(1, 5)[0], 1)
    with pytest.raises(UsageError, match="stride in 1..window, got 4 and 9"):
        perplexity(model, torch.zeros(20, dtype=torch.long), 4, 9)


def test_agreement_by_definition():
    model, reference, tokens = tiny("opt"), tiny("opt"), probe(1, 40)[0]
    with torch.no_grad():
        model.lm_head.weight += 0.1 * torch.randn(model.lm_head.weight.shape)
    result = agreement(model, reference, tokens, 10, batch=3)
    rows = tokens[:40].view(4, 10)
    p = reference(rows).logits.double().log_softmax(-1)
    q = model(rows).logits.double().log_softmax(-1)
    want = float((p.exp() * (p - q)).sum(-1).mean())
    assert math.isclose(result.kl, want, rel_tol=1e-4) and result.positions == 40
    assert math.isclose(result.top1, float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    same = agreement(reference, reference, tokens, 10)
    assert same.kl == 0 and same.top1 == 1 and "no BOS" in str(same)
    with pytest.raises(UsageError, match="vocabularies"):
        model.resize_token_embeddings(90)
        agreement(model, reference, tokens % 90, 10)


def test_speed_and_memory():
    model = tiny("llama-gqa")
    found = speed(model, probe(1, 40)[0], prompt=16, new=4)
    held = sum(p.nbytes for p in model.parameters())
    assert found.prefill > 0 and found.decode > 0 and found.prompt == 16 and found.new == 4
    assert held <= found.weight_bytes < 1.1 * held + 1024 and found.peak_bytes > found.weight_bytes
    with pytest.raises(CalibrationError, match="text is empty"):
        speed(model, torch.empty(0, dtype=torch.long))


TASK = """
task: fewbit_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.mark.filterwarnings("default")
def test_tasks_of_lm_eval(shared, tmp_path):
    from fewbit.checkpoint import load_float, load_tokenizer

    source = shared / "models" / "llama-tiny"
    model, tokenizer = load_float(source), load_tokenizer(source)
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match="fewbit.eval"):
            lm_eval_tasks(model, tokenizer, ["x"])
        pytest.skip("lm_eval is not installed: fewbit[eval]")
    data = tmp_path / "data.jsonl"
    line = '{"text": "It was the", "choices": [" time", "zqx jvk"], "answer": 0}\n'
    data.write_text(line * 4)
    (tmp_path / "local.yaml").write_text(TASK.format(file=data))
    found = lm_eval_tasks(model, tokenizer, ["fewbit_local"], folder=str(tmp_path))
    assert found["fewbit_local"]["acc"] == 1.0
    with pytest.raises(UsageError, match="no task 'nothing'"):
        lm_eval_tasks(model, tokenizer, ["nothing"])
