"""The model card: what it says is what the directory holds."""

import pytest
from shared_models import quantized

import fewbit
from fewbit import card
from fewbit.checkpoint import load_float, save
from fewbit.cli import main
from fewbit.recipe_file import RECIPE
from fewbit.report import REPORT, Report

pytest.importorskip("transformers")


def front_matter(text):
    lines = text.splitlines()
    assert lines[0] == "---"
    return dict(line.split(": ", 1) for line in lines[1 : lines.index("---", 1)])


def test_a_card_with_a_report(shared, tmp_path):
    source = shared / "models" / "llama-tiny"
    model = load_float(source)
    report = fewbit.quantize_(model, "rtn", "w4a16g128sym", progress=False)
    model.config._name_or_path = "someone/tiny"  # as from the hub
    report.source = "someone/tiny"
    entry = {"value": 70.0, "windows": 4, "window": 256, "stride": 256}
    report.evaluations.append({"text": "books.txt", "perplexity": entry})
    save(model, tmp_path, report=report)
    text = (tmp_path / "README.md").read_text()
    found = front_matter(text)
    assert found["base_model"] == "someone/tiny" and found["base_model_relation"] == "quantized"
    assert "| vLLM | yes | `vllm serve DIR`" in text and "| llama.cpp | no |" in text
    assert f"{report.bits_per_weight:.2f} bits a weight" in text
    assert "70.0000 (4 windows of 256 tokens, stride 256, no BOS)" in text
    assert '"name": "rtn"' in text


def test_a_card_without_one_names_no_path(shared, tmp_path):
    save(quantized(shared / "models" / "llama-tiny", "w4a16g128sym"), tmp_path, "awq")
    text = (tmp_path / "README.md").read_text()
    assert str(shared) not in text and "base_model" not in front_matter(text)
    assert "# llama-tiny, awq" in text and "yes | `lmdeploy serve" in text


def test_somebodys_own_card_stays(shared, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    model = quantized(shared / "models" / "llama-tiny", "w4a16g128sym")
    save(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    save(model, tmp_path / "b")
    card.write(tmp_path / "b", source="other")
    assert "# other," in (tmp_path / "b" / "README.md").read_text()


def test_a_report_lies_beside_its_model_and_goes_with_it(shared, tmp_path):
    model = load_float(shared / "models" / "llama-tiny")
    report = fewbit.quantize_(model, "rtn", "w4a16g128sym", progress=False)
    save(model, tmp_path, report=report)
    stored = Report.load(tmp_path / REPORT)
    assert stored.to_dict() == report.to_dict()
    assert main(["report", str(tmp_path), "--quiet"]) == 0
    (tmp_path / RECIPE).write_text("")
    save(model, tmp_path)
    assert not {p.name for p in tmp_path.iterdir()} & {REPORT, "fewbit_report.html", RECIPE}
