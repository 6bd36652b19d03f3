"""quantize_ from a live model to packed linears and back."""

import pytest
import torch
from torch import nn

import fewbit
from fewbit.calibrate import Windows
from fewbit.errors import CalibrationError, UnsupportedError, UsageError
from fewbit.families import linear_names
from fewbit.linear import PackedLinear
from tiny import probe, tiny

FAMILIES = ["opt", "llama-gqa", "llama-mha-bias"]


def data():
    return Windows(list(probe(4, 24).split(1)))


@pytest.mark.parametrize("method", ["rtn", "awq"])
@pytest.mark.parametrize("name", FAMILIES)
def test_quantises_every_decoder_linear_and_nothing_else(name, method):
    model = tiny(name)
    report = fewbit.quantize_(model, method, "w4a16g16", data(), progress=False)
    names = list(linear_names(model))
    assert [r.name for r in report.linears] == names
    assert all(isinstance(model.get_submodule(n), PackedLinear) for n in names)
    assert isinstance(model.lm_head, nn.Linear)
    assert all(0 < r.relative_error < 0.05 for r in report.linears)
    assert all(r.tokens == (96 if method == "awq" else 0) for r in report.linears)


@pytest.mark.parametrize("name", FAMILIES)
def test_restore_gives_the_model_back_bit_for_bit(name):
    model, ids = tiny(name), probe()
    before = model(ids).logits
    fewbit.quantize_(model, "awq", "w3a16g16", data(), progress=False)
    assert not torch.equal(model(ids).logits, before)
    fewbit.restore_(model)
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(UsageError, match="nothing to restore"):
        fewbit.restore_(model)


def test_same_bytes_twice_and_on_any_number_of_threads():
    results = []
    before = torch.get_num_threads()
    for threads in (1, 1, 3):
        torch.set_num_threads(threads)
        model = tiny("opt")
        fewbit.quantize_(model, "awq", "w4a16g16", data(), progress=False)
        results.append(model.state_dict())
    torch.set_num_threads(before)
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name
        if "packed" in name:  # the float model's own sums may differ by threads, codes should not
            assert torch.equal(tensor, results[2][name]), name


def test_awq_never_loses_to_rounding_on_its_own_objective():
    for name in FAMILIES:
        report = fewbit.quantize_(tiny(name), "awq", "w3a16g16", data(), progress=False)
        edges = [r for r in report.transforms if r["transform"] == "awq"]
        assert edges and all(r["loss"] <= r["rtn_loss"] for r in edges)


def test_scales_leave_the_float_model_unchanged():
    from fewbit.families import decoder_layers, describe
    from fewbit.transforms.scale import apply_scale, edges

    for name in FAMILIES:
        model = tiny(name, torch.float64)
        ids, family = probe(), describe(model)
        before = model(ids).logits
        for layer in decoder_layers(model):
            for edge in edges(layer, family, model.config):
                width = layer.get_submodule(edge.readers[0]).in_features
                s = edge.to_source(torch.rand(width, dtype=torch.float64) + 0.5)
                apply_scale(layer, edge, s, family)
        # float64 rounding of a few dozen products on logits of order 1
        assert float((model(ids).logits - before).abs().max()) < 1e-9


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (("magic",), UsageError, "method 'magic' is not known; rtn, awq"),
        (("awq",), CalibrationError, "this method needs calibration"),
        (("rtn", "w4a16kv4g16"), UsageError, "quantises the KV cache"),
        (("awq", "w4a16g16", [[1] * 4, [999]]), CalibrationError, "sample 1 has token 999"),
    ],
)
def test_refuses_before_touching_the_model(arguments, error, message):
    model = tiny("opt")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=message):
        fewbit.quantize_(model, *arguments, progress=False)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_refuses_what_it_should_not_guess():
    with pytest.raises(UnsupportedError, match="no family describes Sequential"):
        fewbit.quantize_(nn.Sequential(nn.Linear(4, 4)), "rtn", progress=False)
    model = tiny("opt")
    fewbit.quantize_(model, "rtn", "w4a16g16", progress=False)
    with pytest.raises(UsageError, match="already quantised"):
        fewbit.quantize_(model, "rtn", "w4a16g16", progress=False)
    model = tiny("opt")
    model.model.decoder.layers[1].fc1.weight.data[3, 4] = float("nan")
    with pytest.raises(UsageError, match="layers.1.fc1.weight holds values that are not finite"):
        fewbit.quantize_(model, "rtn", "w4a16g16", progress=False)


def test_progress_events_and_plain_lines(capsys):
    events = []
    fewbit.quantize_(tiny("opt"), "rtn", "w4a16g16", callback=events.append)
    assert [e["event"] for e in events].count("layer") == 2
    assert "layer 2/2" in capsys.readouterr().err


def test_an_interrupt_half_way_leaves_the_model_as_it_was():
    model, ids = tiny("opt"), probe()
    before = model(ids).logits

    def stop(event):
        if event["event"] == "layer":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fewbit.quantize_(model, "awq", "w4a16g16", data(), progress=False, callback=stop)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width(bits):
    report = fewbit.quantize_(tiny("opt"), "rtn", f"w{bits}a16g16", progress=False)
    worst = max(r.relative_error for r in report.linears)
    assert 0 < worst < 0.6 * 4.0 ** (2 - bits)  # each bit divides the squared error by about 4
