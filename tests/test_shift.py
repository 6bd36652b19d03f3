"""Means moved into biases: the function stays, the inputs lose their means."""

import pytest
import torch

import fewbit
from fewbit.calibrate import Windows
from fewbit.families import decoder_layers, describe
from fewbit.linearise import linearise
from fewbit.transforms.edges import edges
from fewbit.transforms.rows import input_rows
from fewbit.transforms.shift import ROWS, shift_model, shiftable
from tiny import TWINS, probe, tiny

# Norms with biases before linears with biases, or values and output projections with biases.
BIASED = {
    "opt", "llama-mha-bias", "gpt2", "gpt-neox", "gpt-neox-serial", "bloom", "falcon-rw", "phi",
}
WINDOWS = Windows([probe(1, 24, seed=s) for s in range(4)])


@pytest.mark.parametrize("name", TWINS)
def test_the_function_stays_and_the_means_go(name):
    model = tiny(name, torch.float64)
    family = describe(model)
    linearise(model, family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    before = model(probe()).logits
    readers = {
        (index, edge.readers[0]): layer.get_submodule(edge.readers[0])
        for index, layer in enumerate(decoder_layers(model, family))
        for edge in edges(layer, family, model.config) if shiftable(layer, edge, family)
    }
    shift_model(model, family, WINDOWS.batches)
    # Bloom's attention weights are float32 whatever the model, and add up to 1 only as well.
    bound = 1e-6 if name == "bloom" else 1e-9
    assert float((model(probe()).logits - before).abs().max() / before.abs().max()) < bound
    assert bool(readers) == (name in BIASED)
    for x in input_rows(model, readers, WINDOWS.batches, ROWS).values():
        assert float(x.mean(0).abs().max() / x.square().mean().sqrt()) < bound


def test_fitted_rotations_shift_and_say_so():
    model = tiny("opt")
    report = fewbit.quantize_(
        model, "quarot+gptq", "w4a4", WINDOWS, progress=False, fit_activations=True
    )
    records = [r for r in report.transforms if r.get("transform") == "shift"]
    assert len(records) == 6 and all(0 < r["energy"] < 1 for r in records)
    for layer in model.model.decoder.layers:
        assert bool(layer.final_layer_norm.bias.any())
