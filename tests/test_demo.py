"""``fewbit demo``: figures, table and plot, and AWQ repairing what rounding breaks."""

import json

import pytest

pytest.importorskip("transformers")


def test_demo_runs_and_shows_what_it_claims(tmp_path, monkeypatch):
    from fewbit.demo import run as demo

    # The 7B-sized layer takes a gigabyte and seconds; a small one runs the same code.
    monkeypatch.setattr(demo, "LAYER", [(256, 128), (128, 256)])
    result = demo.run(tmp_path / "out")
    original, rtn, awq = (row["perplexity"] for row in result["rows"])
    assert original < awq < rtn and awq - original < 0.6 * (rtn - original)
    sizes = [row["linear_bytes"] for row in result["rows"]]
    assert sizes[1] == sizes[2] < 0.14 * sizes[0]  # 4.19 bits of 32 a weight
    assert all(row["decode_tokens_per_second"] > 0 for row in result["rows"])
    assert json.loads((tmp_path / "out" / "demo.json").read_text())["rows"] == result["rows"]
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "perplexity" in demo.table(result)
