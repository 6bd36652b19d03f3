"""Notebooks 01 to 03 run whole, from their first cell to their last, and are stored without output.

Each cell is executed in one namespace, which is what a kernel does; no network is needed.
"""

import json
import time
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("0[123]_*.ipynb"))


def test_there_are_three():
    assert [p.stem[:2] for p in NOTEBOOKS] == ["01", "02", "03"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_whole(path):
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    book = json.loads(path.read_text())
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert "torch.__version__" in "".join(code[0]["source"])  # checked before anything is imported
    assert all(not c["outputs"] and c["execution_count"] is None for c in code)
    names, started = {"__name__": path.stem}, time.monotonic()
    try:
        for i, cell in enumerate(code):
            exec(compile("".join(cell["source"]), f"{path.name}[{i}]", "exec"), names)
    finally:
        plt.close("all")
    assert time.monotonic() - started < 290
