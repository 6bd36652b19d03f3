"""fewbit bench accuracy: a table that resumes, names what a method refuses, and fits its plot."""

import json

import pytest
import torch

from fewbit.bench import accuracy
from fewbit.calibrate import Windows
from fewbit.cli import main
from fewbit.errors import UsageError
from fewbit.evaluate import compare, log_probabilities, perplexity
from tiny import probe, tiny


def test_divergence_by_its_definition():
    model, other = tiny("opt"), tiny("opt", seed=1)
    ids = probe(3, 20)
    data = Windows(list(ids.split(1)))
    reference = torch.zeros(3, 20, model.config.vocab_size)
    log_probabilities(model, data, reference, batch=2)
    assert compare(model, data, reference).kl == pytest.approx(0.0, abs=1e-6)
    got = compare(other, data, reference, batch=2)
    p, q = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (model, other))
    assert got.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert got.perplexity == pytest.approx(float(perplexity(other, ids.reshape(-1), 20)), rel=1e-6)
    # Padding counts for nothing, and lengths may differ; float16 references round.
    padded = torch.nn.functional.pad(ids[:1, :15], (0, 5), value=1)
    mask = torch.arange(20)[None] < 15
    mixed = Windows([padded, ids[1:2]], [mask, None])
    cut = [reference[0, :15], reference[1]]
    want = compare(other, Windows([ids[:1, :15], ids[1:2]]), cut)
    assert compare(other, mixed, cut).kl == pytest.approx(want.kl, rel=1e-4)
    assert want.predictions == 14 + 19
    halves = log_probabilities(model, mixed)
    assert compare(other, mixed, halves).kl == pytest.approx(want.kl, rel=1e-2)


@pytest.fixture
def place(shared, tmp_path):
    """(arguments of run, tmp_path): a shared model, a little text."""
    model = shared / "models" / "llama-tiny"
    texts = [shared / "data" / f"books_{part}.txt" for part in ("test", "calibration")]
    return (model, *texts, tmp_path / "out"), dict(window=32, windows=2, samples=2)


def test_table_resumes_and_says_what_was_refused(place, monkeypatch, capsys):
    (model, text, calibration, out), sizes = place
    refusing = accuracy.Method("too wide", "llm-int8")
    monkeypatch.setitem(accuracy.TABLE, "w3a16g128", (*accuracy.WEIGHT_ONLY, refusing))
    arguments = ["bench", "accuracy", str(model), "--text", str(text), "-o", str(out)]
    arguments += ["--calibration", str(calibration), "--schemes", "w3a16g128"]
    arguments += [f"--{name}={value}" for name, value in sizes.items()]
    assert main([*arguments, "--methods", "rtn", "too wide"]) == 0
    first = json.loads((out / "accuracy.json").read_text())
    rtn, refused = first["cells"]
    assert rtn["kl"] > 0 and rtn["perplexity"] != first["float"]
    assert rtn["bits"] == pytest.approx(3 + 24 / 128) and rtn["seconds"] > 0
    assert rtn["cpu_seconds"] > 0
    assert "w8a8 with scales per token, not w3a16g128asym" in refused["refused"]
    solved = []
    measure = accuracy._measure
    monkeypatch.setattr(
        accuracy, "_measure", lambda *a: solved.append(a[2].label) or measure(*a)
    )
    assert main([*arguments, "--methods", "rtn", "gptq", "too wide"]) == 0
    assert solved == ["gptq"]
    second = json.loads((out / "accuracy.json").read_text())
    assert second["cells"][::2] == first["cells"] and second["cells"][1]["label"] == "gptq"
    shown = capsys.readouterr().out
    assert shown.endswith((out / "accuracy.md").read_text() + "\n")
    assert "| **" in shown and "| too wide | llm-int8 is w8a8" in shown
    assert (out / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(out.glob("float_log_probabilities*")) and not list(out.glob(".*"))


def test_two_calls_at_a_time_share_the_cells(place, monkeypatch):
    arguments, sizes = place
    rows = dict(schemes=["w3a16g128"], methods=["rtn", "mixed 1 %", "gptq"], say=str)
    slow = accuracy.Method("gptq", "gptq", samples=4)
    table = tuple(slow if m.label == "gptq" else m for m in accuracy.WEIGHT_ONLY)
    monkeypatch.setitem(accuracy.TABLE, "w3a16g128", table)
    measure, measured = accuracy._measure, []

    def and_meanwhile(*a):
        measured.append(a[2].label)
        if len(measured) == 1:  # another call, while this one is at its first cell
            accuracy.run(*arguments, **sizes, **rows)
        return measure(*a)

    monkeypatch.setattr(accuracy, "_measure", and_meanwhile)
    result = accuracy.run(*arguments, **sizes, **rows)
    assert measured == ["rtn", "gptq", "mixed 1 %"]  # the other call has the longest first
    assert [c["label"] for c in result["cells"]] == rows["methods"]
    shown = (arguments[-1] / "accuracy.md").read_text()
    assert all(f"| {label} |" in shown for label in measured)
    assert not list(arguments[-1].glob(".*"))


def test_another_protocol_is_not_mixed_in(place):
    arguments, sizes = place
    rows = dict(schemes=["w4a16g128"], methods=["rtn"], say=str)
    accuracy.run(*arguments, **sizes, **rows)
    with pytest.raises(UsageError, match=r"another protocol \(text_sha256, windows differ\)"):
        accuracy.run(*arguments, **{**sizes, "windows": 3}, **rows)
    with pytest.raises(UsageError, match="method 'magic' is not in the table; rtn, mixed 1 %"):
        accuracy.run(*arguments, **sizes, methods=["magic"])


def test_every_cell_of_the_table_is_a_recipe_for_its_scheme():
    from fewbit.recipes import build

    for scheme, rows in accuracy.TABLE.items():
        assert len({m.label for m in rows}) == len(rows)
        for method in rows:
            recipe = build(method.method, scheme, **method.options)
            assert (recipe.integer or recipe.quantizes_activations) == ("a16" not in scheme)
            assert method.samples is None or method.label.endswith(f" {method.samples}")
