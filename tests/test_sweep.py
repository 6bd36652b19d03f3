"""sweep_: the curve is that of its own runs, the best value is used, and held-out text stays so."""

import pytest
import torch

from fewbit import sweep_
from fewbit.calibrate import Windows
from fewbit.errors import CalibrationError, UsageError
from fewbit.pipeline import quantize_
from fewbit.sweep import held_out_perplexity
from fewbit.undo import restore_
from tiny import probe, tiny

DATA = Windows([probe(1, 16, seed=s) for s in range(6)])
ALPHAS = (0.1, 0.5, 0.9)


def test_curve_and_choice():
    model = tiny("opt")
    report = sweep_(model, "smoothquant", "w4a4", DATA, option="alpha", values=ALPHAS, held_out=2,
                    progress=False)
    seen, unseen = Windows(DATA.batches[:4]), Windows(DATA.batches[4:])
    assert report.calibration["sha256"] == seen.digest()
    again, curve = tiny("opt"), []
    for alpha in ALPHAS:
        quantize_(again, "smoothquant", "w4a4", seen, alpha=alpha, progress=False)
        curve.append(held_out_perplexity(again, unseen))
        restore_(again)
    assert report.sweep["perplexity"] == curve and len(set(curve)) == 3
    assert report.sweep["float"] == held_out_perplexity(again, unseen)
    best = ALPHAS[curve.index(min(curve))]
    assert report.sweep["best"] == best and report.to_dict()["sweep"]["values"] == list(ALPHAS)
    assert report.recipe["transforms"][0]["alpha"] == best
    assert held_out_perplexity(model, unseen) == min(curve)
    restore_(model)
    assert torch.equal(model(probe()).logits, again(probe()).logits)


def test_padding_is_not_scored():
    model, ids = tiny("llama-gqa"), probe(1, 12)
    mask = torch.arange(12)[None] < 7
    padded, short = Windows([ids], [mask]), Windows([ids[:, :7]])
    assert held_out_perplexity(model, padded) == held_out_perplexity(model, short)


def test_refusals():
    model = tiny("opt")
    for held_out in (0, 6):
        with pytest.raises(CalibrationError, match=f"got {held_out} of 6"):
            sweep_(model, "awq", "w4a16g16", DATA, option="points", values=(4,), held_out=held_out)
    with pytest.raises(UsageError, match="no values of points"):
        sweep_(model, "awq", "w4a16g16", DATA, option="points", values=())
    with pytest.raises(UsageError, match="unexpected keyword"):
        sweep_(model, "awq", "w4a16g16", DATA, option="colour", values=(4,), held_out=2)
    assert not hasattr(model, "hf_quantizer")
