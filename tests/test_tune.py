"""Distillation: exact gradients, a lower divergence, the same form on disk, and the way back."""

import copy

import pytest
import torch

import fewbit
from fewbit import calibrate, checkpoint, pipeline, stream, tune
from fewbit.errors import CalibrationError, UnsupportedError, UsageError
from fewbit.families import decoder_layers, describe, linear_names
from fewbit.scheme import Scheme
from tiny import probe, tiny


def data(windows=6, tokens=24):
    return calibrate.Windows([probe(1, tokens, seed=i) for i in range(windows)])


def quantized(method="rtn", scheme="w2a16g8", name="llama-gqa", **options):
    teacher = tiny(name)
    model = copy.deepcopy(teacher)
    fewbit.quantize_(model, method, scheme, data(), progress=False, **options)
    return model, teacher


@pytest.mark.parametrize("group, columns", [(4, 12), (5, 12), (12, 12)])
def test_gradients_of_dequantize(group, columns):
    """dw/ds by differences; dw/dv is s inside the grid and 0 outside."""
    groups = -(-columns // group)
    v = torch.linspace(-1.3, 8.7, 3 * columns).reshape(3, columns).double().requires_grad_()
    s = (torch.rand(3, groups, dtype=torch.float64) + 0.5).requires_grad_()
    z = torch.full((3, groups), 3.0, dtype=torch.float64)
    out = torch.randn(3, columns, dtype=torch.float64)

    def weight(scale):
        return tune._Dequantize.apply(v, scale, z, group, 7)

    (weight(s) * out).sum().backward()
    for i, j in [(0, 0), (1, groups - 1), (2, 0)]:
        step = torch.zeros_like(s)
        step[i, j] = 1e-4
        difference = ((weight(s + step) - weight(s - step)) * out).sum().item() / 2e-4
        assert abs(difference - s.grad[i, j].item()) < 1e-8
    wide = s.detach().repeat_interleave(group, 1)[:, :columns]
    inside = (v.detach().round() >= 0) & (v.detach().round() <= 7)
    assert torch.equal(v.grad, out * wide * inside) and not bool(inside.all())


@pytest.mark.parametrize("name", ["llama-gqa", "opt"])
@pytest.mark.parametrize(
    "method, scheme", [("rtn", "w2a16g8"), ("rtn", "w4a8"), ("quarot+gptq", "w4a4")]
)
def test_tune_brings_the_predictions_closer(name, method, scheme):
    model, teacher = quantized(method, scheme, name)
    before = {n: type(model.get_submodule(n)) for n in linear_names(model)}
    codes = {n: model.get_submodule(n).codes() for n in before}
    options = tune.Tune(epochs=40, batch=2, codes=2e-2, scales=1e-2, norms=1e-2)
    windows = data(4)
    windows.batches[-1] = windows.batches[0]  # tiny: what is held out is what was learned
    record = tune.tune_(model, teacher, describe(model), windows, options)
    assert record["kept"] and record["kl_after"] < 0.9 * record["kl_before"]
    found = tune.divergence(model, teacher, windows.batches[-1:])
    assert found == pytest.approx(record["kl_after"])
    after = {n: model.get_submodule(n) for n in before}
    assert all(type(m) is before[n] for n, m in after.items())
    assert all(torch.equal(m.codes().zero_point, codes[n].zero_point) for n, m in after.items())
    assert any(not torch.equal(m.codes().q, codes[n].q) for n, m in after.items())
    assert all(m.codes().scale.dtype == codes[n].scale.dtype for n, m in after.items())


def test_what_does_not_help_is_not_kept():
    """A learning rate that destroys the model leaves it bit for bit as the solver made it."""
    model, teacher = quantized()
    want = model(probe()).logits
    record = tune.tune_(
        model, teacher, describe(model), data(), tune.Tune(epochs=4, batch=1, norms=1.0, scales=0.5)
    )
    assert not record["kept"] and record["kl_after"] >= record["kl_before"]
    assert torch.equal(model(probe()).logits, want)


def test_in_a_stack_with_undo_and_on_disk(tmp_path):
    """gptq+tune is a recipe: reported, restorable, repeatable, and stored like gptq's result."""
    logits = []
    for _ in range(2):
        model = tiny("llama-gqa")
        float_logits = model(probe()).logits
        report = fewbit.quantize_(
            model, "gptq+tune", "w3a16g8", data(), progress=False, epochs=10, batch=2, codes=1e-2,
        )  # fmt: skip
        logits.append(model(probe()).logits)
    assert torch.equal(*logits)
    assert report.recipe["tune"]["epochs"] == 10 and report.recipe["solver"]["name"] == "GPTQ"
    assert report.tune["steps"] == 25 and report.tune["kl_before"] > 0
    assert not any(p.grad is not None for p in model.parameters())
    fewbit.save(model, tmp_path / "out")
    assert torch.allclose(fewbit.load(tmp_path / "out")(probe()).logits, logits[1], atol=1e-5)
    fewbit.restore_(model)
    assert torch.equal(model(probe()).logits, float_logits)


def test_solvers_see_fewer_windows(monkeypatch):
    """At even distances; what is learned comes from all of them."""
    seen = []
    run = pipeline.run
    monkeypatch.setattr(pipeline, "run", lambda *a: seen.append(a[2]) or run(*a))
    windows = data(6)
    report = fewbit.quantize_(
        tiny("llama-gqa"), "gptq+tune", "w3a16g8", windows, progress=False, solved=3, epochs=1,
        batch=1,
    )  # fmt: skip
    assert [id(b) for b in seen[0].batches] == [id(windows.batches[i]) for i in (0, 2, 4)]
    assert report.tune["steps"] == 5 and windows.thinned(6) is windows


def test_directories_and_the_command_line_learn_too(tmp_path):
    """What is written is what quantize_ and save make, and a limit on memory is refused."""
    tiny("llama-gqa").save_pretrained(tmp_path / "model")
    options = dict(scheme="w3a16g8", epochs=4, batch=1)
    model = checkpoint.load_float(tmp_path / "model")
    fewbit.quantize_(model, "gptq+tune", calibration=data(), progress=False, **options)
    report = fewbit.quantize_directory(
        tmp_path / "model", tmp_path / "out", "gptq+tune", calibration=data(), progress=False,
        **options,
    )  # fmt: skip
    assert report.tune["steps"] == 20 and (tmp_path / "out" / "fewbit_report.json").exists()
    assert torch.equal(fewbit.load(tmp_path / "out")(probe()).logits, model(probe()).logits)
    for limited in (
        lambda: fewbit.quantize_directory(
            tmp_path / "model", tmp_path / "other", "gptq+tune", "w3a16g8", data(), memory=2**33
        ),
        lambda: stream.plan_directory(tmp_path / "model", "gptq+tune", "w3a16g8", data()),
    ):
        with pytest.raises(UnsupportedError, match="'gptq.tune'.*tune learns from the whole model"):
            limited()
    assert not (tmp_path / "other").exists()


def test_wrong_use():
    with pytest.raises(UsageError, match="codes must be in 0..1000"):
        tune.Tune(codes=-1)
    with pytest.raises(UsageError, match="holdout must be above 0 and below 1"):
        tune.Tune(holdout=1.0)
    model, teacher = quantized("mixed", "w4a16g8")
    with pytest.raises(UsageError, match="cannot learn model.layers.0.*MixedLinear"):
        tune.tune_(model, teacher, describe(model), data(), tune.Tune())
    model, teacher = quantized("rtn", Scheme.parse("w8a8", symmetric_activations=False))
    with pytest.raises(UsageError, match="activations are asymmetric"):
        tune.tune_(model, teacher, describe(model), data(), tune.Tune())
    model, teacher = quantized()
    with pytest.raises(CalibrationError, match="at least 2 calibration windows, got 1"):
        tune.tune_(model, teacher, describe(model), data(1), tune.Tune())
    padded = calibrate.Windows(data(2).batches, [torch.ones(1, 24, dtype=torch.bool), None])
    with pytest.raises(CalibrationError, match="without padding"):
        tune.tune_(model, teacher, describe(model), padded, tune.Tune())
    assert type(decoder_layers(model)[0].self_attn.q_proj) is fewbit.PackedLinear
