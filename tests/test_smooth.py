"""SmoothQuant: the formula, automatic alpha, levels O1 to O3 and W4A8, ranges, dead channels."""

import copy

import pytest
import torch

from fewbit import ops
from fewbit.calibrate import Windows
from fewbit.errors import CalibrationError, UsageError
from fewbit.families import decoder_layers, describe
from fewbit.linear import PackedLinear
from fewbit.linearise import linearise
from fewbit.pipeline import quantize_
from fewbit.pseudo import PseudoInt8Linear, fake_quantize
from fewbit.scheme import Codes, Scheme
from fewbit.transforms.edges import edges, fit_range
from fewbit.transforms.smooth import smooth_scale
from tiny import TWINS, probe, tiny

DATA = Windows([probe(2, 40, seed=s) for s in range(3)])


def test_the_formula_and_dead_channels():
    x, w = torch.tensor([4.0, 0.0, 1.0, 9.0]), torch.tensor([1.0, 1.0, 0.0, 4.0])
    got = smooth_scale(x, w, 0.5)
    torch.testing.assert_close(got, torch.tensor([2.0, 1.0, 1.0, 1.5]))
    torch.testing.assert_close(smooth_scale(x, w, 1.0)[[0, 3]], x[[0, 3]])
    torch.testing.assert_close(smooth_scale(x, w, 0.0)[[0, 3]], 1 / w[[0, 3]])


@pytest.mark.parametrize("bits, top", [(8, 127), (4, 7)])
def test_fake_quantize(bits, top):
    x = torch.randn(5, 9) * 3
    token = fake_quantize(x, bits, "token")
    s = x.abs().amax(1, keepdim=True) / top
    torch.testing.assert_close(token, (x / s).round() * s, rtol=0, atol=0)
    tensor = fake_quantize(x, bits, "tensor")
    s = x.abs().max() / top
    torch.testing.assert_close(tensor, (x / s).round() * s, rtol=0, atol=0)
    clamped = fake_quantize(x, bits, "static", torch.tensor([0.1]))
    assert float(clamped.abs().max()) <= 0.1 * top * (1 + 2**-23)
    zeros = fake_quantize(torch.zeros(2, 3), bits, "token")
    assert torch.equal(zeros, torch.zeros(2, 3))
    assert fake_quantize(torch.zeros(0, 3), bits, "tensor").shape == (0, 3)


@pytest.mark.parametrize("mode", ["token", "tensor", "static"])
def test_pseudo_int8_is_its_equation(mode):
    w, x, bias = torch.randn(6, 10), torch.randn(4, 10), torch.randn(6)
    scheme = Scheme.parse("w8a8", activations=mode)
    codes = Codes(*ops.quantize(w, 8, -1, True, scheme.scale_dtype))
    scale = torch.tensor([0.02]) if mode == "static" else None
    module = PseudoInt8Linear(codes, scheme, bias, scale)
    want = fake_quantize(x, 8, mode, scale) @ module.weight.T + bias
    gamma = 12 * 2**-24  # ten products and the bias, float32
    bound = gamma * (x.abs() @ module.weight.abs().T + bias.abs())
    assert bool(((module(x) - want).abs() <= 2 * bound).all())


@pytest.mark.parametrize("alpha", [0.5, "auto"])
@pytest.mark.parametrize("twin", TWINS)
@torch.no_grad()
def test_smoothing_lowers_the_peak_and_runs(twin, alpha):
    if alpha == "auto" and twin not in ("opt", "llama-gqa", "gpt2", "mixtral", "gemma"):
        return
    model = tiny(twin)
    before = model(input_ids=probe()).logits
    report = quantize_(model, "smoothquant", "w8a8", DATA, progress=False, alpha=alpha)
    after = model(input_ids=probe()).logits
    assert float((after - before).norm() / before.norm()) < 0.2
    if alpha == 0.5:
        for record in (r for r in report.transforms if r.get("transform") == "smooth"):
            assert record["outlier"][1] <= record["outlier"][0] * 1.5
    else:
        for record in report.transforms:
            errors = dict(zip(record["alphas"], record["errors"], strict=True))
            assert errors[record["alpha"]] == min(errors.values()) <= errors[None]
    assert {r.info["module"] for r in report.linears} == {"Int8Linear"}


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a8g16", "w4a4"])
@pytest.mark.parametrize("level, mode", [("O1", "token"), ("O2", "tensor"), ("O3", "static")])
def test_levels(level, mode, scheme):
    model = tiny("llama-gqa")
    report = quantize_(model, "smoothquant", scheme, DATA, progress=False, level=level)
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 14 and {m.scheme.activations for m in packed} == {mode}
    assert all((getattr(m, "x_scale", None) is not None) == (level == "O3") for m in packed)
    assert report.recipe["scheme"]["activations"] == mode
    assert bool(model(input_ids=probe()).logits.isfinite().all())


def test_plain_rounding_of_activations_needs_no_calibration_but_static():
    model = tiny("opt")
    quantize_(model, "rtn", "w8a8", progress=False)
    with pytest.raises(CalibrationError, match="needs calibration"):
        quantize_(tiny("opt"), "rtn", Scheme.parse("w8a8", activations="static"), progress=False)


def test_scales_stay_inside_float16():
    model = copy.deepcopy(tiny("opt")).half()
    family = describe(model)
    linearise(model, family)
    layer = decoder_layers(model, family)[0]
    edge = edges(layer, family, model.config)[0]
    s = torch.logspace(-9, 9, 48)
    fitted = fit_range(layer, edge, s, family)
    norm = layer.get_submodule(edge.source)
    for value in (norm.weight.float() / fitted, norm.bias.float() / fitted):
        assert bool(value.half().isfinite().all())
    for path in edge.readers:
        assert bool((layer.get_submodule(path).weight.float() * fitted).half().isfinite().all())
    torch.testing.assert_close(fitted[20:28], s[20:28], rtol=0, atol=0)


def test_wrong_options():
    for bad in (1.5, -0.1, "best"):
        with pytest.raises(UsageError, match="alpha must be in 0..1"):
            quantize_(tiny("opt"), "smoothquant", "w8a8", DATA, alpha=bad)
    with pytest.raises(UsageError, match="level must be one of O1, O2, O3"):
        quantize_(tiny("opt"), "smoothquant", "w8a8", DATA, level="O4")


def test_the_sample_does_not_depend_on_batching():
    from fewbit.calibrate import capture, collect

    ids = torch.cat([probe(1, 60, seed=s) for s in range(12)])
    samples = []
    for size in (1, 3, 12):
        model = tiny("opt")
        family = describe(model)
        inputs = capture(model, family, Windows(list(ids.split(size))))
        stats, _ = collect(decoder_layers(model, family)[0], family, inputs)
        samples.append(stats["fc1"].sample)
    assert samples[0].shape == (180, 48)  # 720 tokens, every fourth
    for other in samples[1:]:
        torch.testing.assert_close(other, samples[0])


def test_static_scales_keep_their_type_when_the_model_moves():
    scheme = Scheme.parse("w4a6", activations="static")
    codes = Codes(*ops.quantize(torch.randn(8, 16), 4, -1, True, "float16"))
    module = PseudoInt8Linear(codes, scheme, None, torch.tensor([0.1])).half()
    assert module.x_scale.dtype == torch.float32 and module.scale.dtype == torch.float16
