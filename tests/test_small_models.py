"""The outliers that tests put in: as asked for, and the function stays."""

import torch

import small_models
from fewbit.calibrate import Windows
from fewbit.families import decoder_layers
from tiny import probe, tiny

DATA = Windows([probe(2, 30)])


def test_outliers_keep_the_function_and_differ_by_seed():
    for twin in ("opt", "llama-gqa", "gemma"):
        model = tiny(twin, torch.float64)
        before = model(probe()).logits
        chosen = small_models.add_outliers(model, DATA, seed=1, channels=2, pool=8)
        assert len(chosen) == 4 and all(len(c) == 2 for c in chosen.values())
        change = (model(probe()).logits - before).abs().max() / before.abs().max()
        assert float(change) < 1e-9
        other = small_models.add_outliers(tiny(twin, torch.float64), DATA, 2, channels=2, pool=8)
        assert other != chosen and other.keys() == chosen.keys()


def test_gains():
    model, same = tiny("llama-gqa"), tiny("llama-gqa")
    chosen = small_models.add_outliers(model, DATA, seed=1, channels=2, pool=8, gain=(3.0, 5.0))
    ratio = decoder_layers(model)[0].input_layernorm.weight / (
        decoder_layers(same)[0].input_layernorm.weight)
    where = torch.isin(torch.arange(48), torch.tensor(chosen["model.layers.0.input_layernorm"]))
    assert bool((ratio[where] >= 3).all() and (ratio[where] <= 5.0001).all())
    torch.testing.assert_close(ratio[~where], torch.ones(46))


def test_results_go_on(tmp_path):
    path = str(tmp_path / "r.json")
    first, second = small_models.Results(path), small_models.Results(path)
    assert first.get("a", lambda: 1.5) == 1.5 and second.get("b", lambda: 2) == 2
    again = small_models.Results(path)
    assert again.get("a", lambda: 0) == 1.5 and again.get("b", lambda: 0) == 2
    assert small_models.Results(None).get("a", lambda: 3) == 3
