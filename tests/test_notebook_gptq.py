"""Notebook 04 runs from top to bottom, and its numbers say what its text says."""

import json

import pytest

from conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "04_gptq.ipynb"


def test_runs_and_shows_what_it_claims():
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    matplotlib.use("Agg")
    names: dict = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    results, scores = names["results"], names["scores"]
    assert results["OBQ, 8 sweeps"] <= results["GPTQ"] < results["rounding"]
    assert scores["float"] < scores["gptq"] < scores["rounding"]
