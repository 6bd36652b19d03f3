"""The model card: what it says is what the directory holds."""

import json

import pytest
from shared_models import quantized

import fewbit
from fewbit import card
from fewbit.checkpoint import load_float, save
from fewbit.cli import main
from fewbit.conversion import convert
from fewbit.errors import DamagedFileError
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


def test_a_conversion_takes_report_and_figures_along(shared, tmp_path, capsys):
    source = str(shared / "models" / "llama-tiny")
    text = str(shared / "data" / "tinyshakespeare.txt")
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    scheme = ["--scheme", "w4a16g128sym", "--samples", "2", "--window", "64"]
    calibration = ["--method", "awq", "--set", "clip=false", "--calibration", text]
    assert main(["quantize", source, "-o", a, *scheme, *calibration, "--quiet"]) == 0
    evaluate = ["--text", text, "--window", "64", "--limit", "2", "--save", "--quiet"]
    assert main(["eval", a, *evaluate]) == 0
    assert main(["convert", a, b, "--to", "gptq", "--quiet"]) == 0
    assert main(["convert", b, c, "--to", "compressed-tensors", "--quiet"]) == 0
    first, last = Report.load(tmp_path / "a" / REPORT), Report.load(tmp_path / "c" / REPORT)
    assert last.converted == ["compressed-tensors", "gptq"]
    assert [e.pop("format") for e in last.evaluations] == ["compressed-tensors"]
    assert {**last.to_dict(), "converted": []} == first.to_dict()

    assert main(["eval", c, *evaluate]) == 0
    cards = {name: (tmp_path / name / "README.md").read_text() for name in "abc"}
    assert "stored as gptq, converted from compressed-tensors." in cards["b"]
    assert "stored as compressed-tensors, converted from compressed-tensors, gptq." in cards["c"]
    value = f"| {first.evaluations[0]['perplexity']['value']:.4f} (2 windows"
    for kept in (f"SHA-256 `{first.calibration['sha256']}`", value, '"name": "awq"'):
        assert all(kept in text for text in cards.values())
    assert "perplexity, tinyshakespeare.txt, as compressed-tensors |" in cards["c"]
    assert "perplexity, tinyshakespeare.txt |" in cards["c"]  # measured again
    capsys.readouterr()
    assert main(["report", c]) == 0
    assert "converted from compressed-tensors, gptq" in capsys.readouterr().out
    page = (tmp_path / "c" / "fewbit_report.html").read_text()
    assert "converted from compressed-tensors, gptq" in page and "measured in format" in page

    pytest.importorskip("gguf")
    assert main(["convert", a, d, "--to", "gguf", "--quiet"]) == 0
    text = (tmp_path / "d" / "README.md").read_text()
    assert front_matter(text)["library_name"] == "gguf" and "fewbit.load" not in text
    assert "| llama.cpp | yes | `llama-server -m DIR/model.gguf` |" in text and value in text
    assert main(["report", d, "--quiet"]) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": {}},
        {"recipe": "awq"},
        {"source": 3},
        {"linears": [{"name": "a"}]},
        {"evaluations": [7]},
        {"evaluations": [{"text": "a", "perplexity": {}}]},
        {"calibration": {"tokens": "many", "source": "", "sha256": ""}},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_damaged_report_is_refused_before_the_conversion(shared, tmp_path, change):
    model = load_float(shared / "models" / "llama-tiny")
    report = fewbit.quantize_(model, "rtn", "w4a16g128sym", progress=False)
    save(model, tmp_path / "a", report=report)
    (tmp_path / "a" / REPORT).write_text(json.dumps({**report.to_dict(), **change}))
    with pytest.raises(DamagedFileError, match="is not a report of fewbit"):
        convert(tmp_path / "a", tmp_path / "b", "awq")
    assert not (tmp_path / "b").exists()
