"""Any transform, then GPTQ: the solver sees the transformed weights with the statistics of their
inputs, whether those were moved in closed form or collected anew. Experts with few tokens."""

import copy
from dataclasses import replace

import pytest
import torch

import fewbit
from fewbit import calibrate, ops, recipes
from fewbit.solvers.gptq import GPTQ
from fewbit.solvers.rtn import RTN
from test_sequential import inputs_of
from tiny import probe, tiny

STACKS = [("awq+gptq", "w3a16g16"), ("smoothquant+gptq", "w8a8"), ("quarot+gptq", "w3a16g16")]


class Kept(GPTQ):
    """GPTQ that keeps the linears, statistics and codes it has seen, in order."""

    def __init__(self, **options):
        super().__init__(**options)
        self._seen = []

    def build(self, linear, path, scheme, stats, integer):
        kept = copy.deepcopy(linear)
        codes = self.solve(linear.weight, scheme, stats)[0]
        self._seen.append((kept, stats, codes))
        return super().build(linear, path, scheme, stats, integer)


@pytest.mark.parametrize("name", ["opt", "llama-gqa"])
@pytest.mark.parametrize("stack, scheme", STACKS, ids=lambda value: value)
def test_the_solver_sees_the_transformed_model(name, stack, scheme):
    model, windows = tiny(name), calibrate.Windows(list(probe(4, 24).split(1)))
    logits = model(windows.batches[0]).logits
    # Not sequential: then every input is that of the transformed float model.
    recipe = replace(recipes.build(stack, scheme), solver=Kept(), sequential=False)
    report = fewbit.quantize_(model, recipe, calibration=windows, progress=False)
    seen = dict(zip((r.name for r in report.linears), recipe.solver._seen, strict=True))
    for path, (linear, _, codes) in seen.items():
        packed = model.get_submodule(path)
        back = ops.dequantize(*codes, recipe.scheme.group_size)
        torch.testing.assert_close(packed.weight.float(), back.float(), rtol=1e-3, atol=1e-6)
        model.set_submodule(path, linear)
    torch.testing.assert_close(model(windows.batches[0]).logits, logits, rtol=1e-3, atol=1e-3)
    changed = 0.0
    original = tiny(name)
    for path, x in inputs_of(model, windows).items():
        linear, stats, _ = seen[path]
        scale = float((x.T @ x).diagonal().mean())
        torch.testing.assert_close(stats.gram.double(), x.T @ x, rtol=1e-4, atol=1e-4 * scale)
        change = linear.weight - original.get_submodule(path).weight
        changed = max(changed, float(change.abs().max()))
    assert changed > 1e-2  # the transform did something


@pytest.mark.parametrize("stack, scheme", STACKS, ids=lambda value: value)
def test_gptq_behind_a_transform_loses_less_than_rounding(stack, scheme):
    errors = {}
    for solver in (GPTQ(), RTN()):
        model, windows = tiny("llama-gqa"), calibrate.Windows(list(probe(8, 48).split(1)))
        recipe = replace(recipes.build(stack, scheme), solver=solver, sequential=False)
        report = fewbit.quantize_(model, recipe, calibration=windows, progress=False)
        errors[type(solver)] = sum(r.relative_error for r in report.linears)
    assert errors[GPTQ] < 0.9 * errors[RTN]


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_every_expert_is_counted_and_too_few_tokens_are_reported(name):
    model, windows = tiny(name), calibrate.Windows([probe(1, 2)])
    report = fewbit.quantize_(model, "gptq", "w3a16g8", windows, progress=False)
    experts = [r for r in report.linears if ".experts." in r.name]
    gates = [r for r in experts if r.name.endswith(("gate_proj", "w1"))]
    layers = model.config.num_hidden_layers
    routed = windows.tokens * model.config.num_experts_per_tok * layers
    assert sum(r.tokens for r in gates) == routed
    empty = [r for r in experts if r.tokens == 0]
    assert empty and len(empty) < len(experts)
    for record in report.linears:
        weight = model.get_submodule(record.name).weight
        assert bool(weight.isfinite().all()) and "few_tokens" in record.info
        if record.tokens == 0:
            assert record.info["ladder"] == "rtn" and "no token" in record.info["reason"]
        else:
            assert record.rung == 0
    with pytest.raises(fewbit.errors.HessianError, match="no token is routed to this expert"):
        fewbit.quantize_(tiny(name), "gptq", "w3a16g8", windows, progress=False, strict=True)


@pytest.mark.parametrize("target", ["gptaq", "qronos"])
def test_an_expert_without_pairs_of_tokens_aims_at_its_own_output_and_says_so(target):
    model, windows = tiny("mixtral"), calibrate.Windows([probe(1, 16)])
    report = fewbit.quantize_(model, "gptq", "w3a16g8", windows, progress=False, target=target)
    for record in report.linears:
        assert ("float model's router" in record.info.get("target", "")) == (
            ".experts." in record.name and record.tokens > 0
        )
