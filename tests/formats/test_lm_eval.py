"""lm-eval's own wrapper around a quantised model, on a task made from local text.

Runs where lm_eval is installed (``pip install 'fewbit[eval]'``), and needs no network.
"""

import pytest
import torch
from shared_models import quantized

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: fewbit[eval]")
transformers = pytest.importorskip("transformers")


@pytest.mark.filterwarnings("default")
def test_hflm_scores_as_the_model_does(shared):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    source = shared / "models" / "llama-tiny"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = quantized(source, "w4a16g128sym", torch.float32)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    pairs = [("It was the best", " of times"), ("Call me", " Ishmael"), ("The", " whale")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (context, continuation), (found, _) in zip(pairs, lm.loglikelihood(requests), strict=True):
        ids = tokenizer(context + continuation, return_tensors="pt").input_ids
        start = tokenizer(context, return_tensors="pt").input_ids.shape[1]
        with torch.no_grad():
            scores = model(ids).logits.log_softmax(-1)
        want = sum(float(scores[0, i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
        assert abs(found - want) < 1e-3
    text = lm.generate_until(
        [Instance("generate_until", {}, ("It was", {"max_gen_toks": 4, "until": ["\n\n"]}), 0)]
    )
    assert isinstance(text[0], str) and text[0]
