"""What a solver is shown: the inputs of each linear with the right part of the model quantised, and
the float model's inputs beside them."""

import pytest
import torch

import fewbit
from fewbit import calibrate
from fewbit.families import decoder_layers, describe, linear_names
from fewbit.recipes import Recipe
from fewbit.scheme import Scheme
from fewbit.solvers.gptq import GPTQ
from tiny import probe, tiny

# (sequential, true_sequential)
MODES = {"parallel": (False, False), "by layer": (True, False), "by linear": (True, True)}


class Watched(GPTQ):
    """GPTQ that keeps what it was given."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def build(self, linear, path, scheme, stats, integer):
        self.seen.append(stats)
        return super().build(linear, path, scheme, stats, integer)


@torch.no_grad()
def inputs_of(model, windows):
    """{name: [tokens, in_features] float64} of every decoder linear, by hooks on whole passes."""
    found = {name: [] for name in linear_names(model)}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, a, name=name: found[name].append(a[0].reshape(-1, a[0].shape[-1]).double())
        )
        for name in found
    ]
    for ids in windows.batches:
        model(ids)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def expected_inputs(model, packed, mode, windows):
    """Of the float ``model``, with what ``mode`` has quantised by then in place."""
    if mode == "parallel":
        return inputs_of(model, windows)
    result = {}
    for index in range(len(decoder_layers(model))):
        here = [n for n in packed if n.startswith(f"{describe(model).layers}.{index}.")]
        if mode == "by linear":
            for name in here:
                model.set_submodule(name, packed[name])
        seen = inputs_of(model, windows)
        result |= {name: seen[name] for name in here}
        for name in here:
            model.set_submodule(name, packed[name])
    return result


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["opt", "llama-gqa"])
def test_statistics_belong_to_the_inputs_at_that_moment(name, mode):
    model, windows = tiny(name), calibrate.Windows(list(probe(4, 24).split(1)))
    floats = inputs_of(model, windows)
    solver = Watched(target="qronos")
    recipe = Recipe("watched", Scheme.parse("w3a16g16"), (), solver, *MODES[mode])
    report = fewbit.quantize_(model, recipe, calibration=windows, progress=False)
    packed = {r.name: model.get_submodule(r.name) for r in report.linears}
    fewbit.restore_(model)
    want = expected_inputs(model, packed, mode, windows)
    moved = 0.0
    for record, stats in zip(report.linears, solver.seen, strict=True):
        x, x_float = want[record.name], floats[record.name]
        torch.testing.assert_close(stats.gram.double(), x.T @ x, rtol=1e-6, atol=1e-6)
        difference = (x_float - x).T @ x
        torch.testing.assert_close(stats.cross.double(), difference, rtol=1e-6, atol=1e-6)
        moved = max(moved, float(difference.abs().max()))
    assert (moved > 1e-2) == (mode != "parallel")


def test_the_float_pass_leaves_the_layer_as_it_was():
    model = tiny("llama-gqa")
    layer, family = decoder_layers(model)[0], describe(model)
    inputs = calibrate.capture(model, family, calibrate.windows(probe()))
    linear = layer.mlp.up_proj
    packed = fewbit.PackedLinear.from_linear(linear, "w2a16g16")
    layer.mlp.up_proj = packed
    floats = calibrate.FloatPass(inputs, {"mlp.up_proj": linear})
    stats, outputs = calibrate.collect(layer, family, inputs, floats=floats)
    assert layer.mlp.up_proj is packed
    assert torch.equal(outputs[0].hidden, calibrate.run_layer(layer, inputs)[0].hidden)
    assert not bool(stats["self_attn.q_proj"].cross.any())  # the same inputs in both passes
    assert bool(stats["mlp.down_proj"].cross.any())  # behind the quantised linear


def test_padding_enters_no_cross_statistic():
    model = tiny("opt")
    layer, family = decoder_layers(model)[0], describe(model)
    ids = probe(1, 12)

    def cross(tokens, mask):
        data = calibrate.Windows([tokens], [mask])
        inputs = calibrate.capture(model, family, data)
        moved = inputs.follow(x.hidden * 1.01 + 0.01 for x in inputs)
        stats, _ = calibrate.collect(layer, family, inputs, floats=calibrate.FloatPass(moved))
        return {path: s.cross for path, s in stats.items()}

    alone = cross(ids, None)
    mask = torch.ones(1, 15, dtype=torch.bool)
    mask[:, 12:] = False
    padded = cross(torch.nn.functional.pad(ids, (0, 3), value=1), mask)
    for path, value in alone.items():
        torch.testing.assert_close(value, padded[path], rtol=1e-4, atol=1e-4)
