"""Activation grids chosen by the output's error, and R4 only where it helps."""

import pytest
import torch

import fewbit
from fewbit.calibrate import Windows
from fewbit.families import describe
from fewbit.online import ActivationQuant, OnlineHadamard
from fewbit.scheme import Scheme
from fewbit.transforms.grids import CLIPS, fit_grid
from fewbit.transforms.rotate import Rotate
from fewbit.transforms.rows import input_rows
from tiny import probe, tiny

WINDOWS = Windows([probe(1, 24, seed=s) for s in range(4)])


@pytest.mark.parametrize("per", ["token", "tensor"])
def test_fit_grid_is_the_best_of_all(per):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 32, generator=generator).relu() + 0.1
    weights = [torch.randn(n, 32, generator=generator) for n in (5, 9)]
    got = fit_grid(x, weights, 4, per)
    errors = {}
    for symmetric in (True, False):
        for clip in CLIPS:
            dx = (ActivationQuant(4, symmetric, clip, per)(x) - x).double()
            error = sum((dx @ w.double().T).square().sum() for w in weights) / len(x)
            errors[symmetric, clip] = float(error)
    best = min(errors, key=errors.get)
    assert (got.symmetric, got.clip) == best and not got.symmetric  # no value is negative
    assert got.error == pytest.approx(errors[best], rel=1e-5)


def test_rows_are_taken_at_even_distances():
    model, seen = tiny("llama-gqa"), []
    linears = {i: layer.mlp.down_proj for i, layer in enumerate(model.model.layers)}
    linears[1].register_forward_pre_hook(lambda m, a: seen.append(a[0][0]))
    rows = input_rows(model, linears, WINDOWS.batches, rows=32)
    assert list(rows) == [0, 1]
    want = torch.cat([x[::3] for x in seen])  # 96 tokens, 32 of them
    assert torch.equal(rows[1], want)
    assert linears[0]._forward_pre_hooks == {}


@pytest.mark.parametrize("sparse", [True, False])
def test_r4_where_it_helps(sparse):
    """Behind a ReLU that leaves one channel in 16, the Hadamard transform only spreads noise; a
    single huge channel among many others is what it is made for."""
    model = tiny("opt")
    family = describe(model)
    for layer in model.model.decoder.layers:
        fc1 = layer.fc1
        with torch.no_grad():
            if sparse:  # a channel is 1 in one token out of many, whatever comes in
                fc1.bias.fill_(-100.0)
                fc1.bias[:4] = 3.0
            else:
                fc1.bias.copy_(torch.linspace(1.0, 2.0, len(fc1.bias)))
                fc1.bias[7] = 60.0
    rotate = Rotate(r4="fit")
    rotate.prepare(model, family, Scheme.parse("w4a4"), WINDOWS.batches)
    assert rotate._rotated == (set() if sparse else {"0.fc2", "1.fc2"})
    fewbit.quantize_(
        model, "quarot", "w4a4", WINDOWS, progress=False, fit_activations=True
    )
    for layer in model.model.decoder.layers:
        online = getattr(layer.fc2, "online_hadamard", None)
        assert online is None if sparse else isinstance(online, OnlineHadamard)


@pytest.mark.parametrize("name", ["opt", "llama-gqa"])
def test_fitted_activations_are_nearer_recorded_and_stored(name, tmp_path):
    errors = {}
    for fit in (False, True):
        model = tiny(name)
        want = model(probe()).logits
        report = fewbit.quantize_(
            model, "quarot", "w8a4", WINDOWS, progress=False, fit_activations=fit
        )
        got = model(probe()).logits
        errors[fit] = float((got - want).square().mean())
        records = [r for r in report.transforms if r.get("transform") == "activations"]
        family, layers = describe(model), 2
        assert len(records) == (len(family.inputs()) * layers if fit else 0)
    assert errors[True] < errors[False]
    for record in records:
        assert record["clip"] in CLIPS and record["error"] > 0
    fewbit.save(model, tmp_path, "fewbit")
    assert torch.equal(fewbit.load(tmp_path)(probe()).logits, got)


def test_spinquant_learns_with_the_same_r4():
    model = tiny("opt")
    fewbit.quantize_(
        model, "spinquant", "w4a4", WINDOWS, progress=False, fit_activations=True, steps=1,
        range_steps=2,
    )
    quants = [m for m in model.modules() if isinstance(m, ActivationQuant)]
    assert len(quants) == 12 and any(not q.symmetric for q in quants)
