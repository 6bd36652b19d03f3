"""GPTQ on a whole model against an independent implementation: the same losses of every linear."""

import pytest
import torch

import fewbit
import published
from fewbit import calibrate, checkpoint
from fewbit.pipeline import ERROR_ROWS

SETTINGS = dict(damp=0.01, order="columns", fit="range")  # as published


@torch.no_grad()
def independent(model, windows, packed, bits, group_size):
    """{name: (codes, ||X (W' - W)^T||^2 / ||X W^T||^2 of the rows that a Report looks at)}: hooks
    on whole forward passes, one layer after the other, all sums in float64.

    A solved layer then runs as fewbit's ``packed`` modules of the same name: with a float matrix
    product of the same weights its output would differ in the last float32 bit, which moves a few
    targets across a rounding boundary and those rows' losses by some 1e-3, three layers on.
    """
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    names = {m: n for n, m in model.named_modules()}
    results = {}
    for layer in layers:
        linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
        grams = {m: torch.zeros(m.in_features, m.in_features).double() for m in linears}

        def add(linear, args, grams=grams):
            x = args[0].reshape(-1, linear.in_features).double()
            grams[linear] += x.T @ x

        hooks = [m.register_forward_pre_hook(add) for m in linears]
        for ids in windows:
            model(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        for m, h in grams.items():
            damped = h + SETTINGS["damp"] * h.diagonal().mean() * torch.eye(len(h))
            codes = published.gptq(m.weight, damped, bits, group_size, False)
            step = -(-m.out_features // ERROR_ROWS)
            old = m.weight.double()[::step]
            new = published.dequantized(*codes, group_size)[::step]
            error = (((new - old) @ h) * (new - old)).sum() / ((old @ h) * old).sum()
            results[names[m]] = codes, float(error)
            model.set_submodule(names[m], packed[names[m]])
    return results


@pytest.mark.parametrize(
    "name, bits, group_size", [("llama-tiny-outliers", 2, 64), ("opt-tiny", 3, 128)]
)
def test_codes_and_losses_are_those_of_the_published_algorithm(shared, name, bits, group_size):
    path = shared / "models" / name
    model, tokenizer = checkpoint.load_float(path), checkpoint.load_tokenizer(path)
    text = calibrate.read_text(shared / "data" / "books_calibration.txt")
    data = calibrate.cut(calibrate.tokenize(text, tokenizer), 256, 8, "text")
    scheme = f"w{bits}a16g{group_size}"
    report = fewbit.quantize_(model, "gptq", scheme, data, progress=False, **SETTINGS)
    packed = {r.name: model.get_submodule(r.name) for r in report.linears}
    fewbit.restore_(model)
    want = independent(model, data.batches, packed, bits, group_size)
    for record in report.linears:
        (q, scale, zero_point), error = want[record.name]
        dequantized = published.dequantized(q, scale, zero_point, group_size)
        assert torch.equal(packed[record.name].weight.double(), dequantized), record.name
        assert abs(record.relative_error / error - 1) <= 1e-9, record.name
