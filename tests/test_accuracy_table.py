"""The README's tables are what scripts/accuracy_table.py makes of the stored measurements."""

import json

import pytest

import accuracy_table
from readmes import READMES, ROOT, put


def test_every_readme_holds_the_tables():
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        for name, table in accuracy_table.tables().items():
            assert put(text, name, table) == text, (
                f"{path.name}: run python scripts/accuracy_table.py --write"
            )


def test_marks_translate_heads():
    begin, end = "<!-- goals table: begin; goal=Ziel; float=reell -->", "<!-- goals table: end -->"
    text = "\n".join(["a", begin, "old", end, "b"])
    new = put(text, "goals", "| goal | x |\n| floats | goal |")
    assert new.splitlines() == ["a", begin, "| Ziel | x |", "| floats | Ziel |", end, "b"]


def test_stored_cells_follow_one_protocol_and_belong_to_the_table():
    found = [json.loads(p.read_text()) for p in (ROOT / "tests/results/accuracy").glob("*.json")]
    same = {key: {r["protocol"][key] for r in found} for key in found[0]["protocol"]}
    assert len(found) >= 4
    assert all(len(same[key]) == 1 for key in ("text", "window", "windows", "samples", "dtype"))
    for result in found:
        assert all((c["scheme"], c["label"]) in accuracy_table.rows() for c in result["cells"])


def test_new_cells_replace_old_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy_table, "RESULTS", tmp_path)
    cells = [
        {"scheme": "w3a16g128", "label": "gptq", "perplexity": 8.0},
        {"scheme": "w4a16g128", "label": "rtn", "perplexity": 4.5},
        {"scheme": "w4a16g128", "label": "gptq", "refused": "no"},
    ]
    new = tmp_path / "accuracy.json"
    for part in (cells, [{**cells[1], "perplexity": 4.25}]):
        new.write_text(json.dumps({"protocol": {"model": "m"}, "float": 4.0, "cells": part}))
        accuracy_table.add(new)
    stored = accuracy_table.stored("m")["cells"]
    assert [c.get("perplexity") for c in stored] == [4.25, None, 8.0]  # in the order of the table
    assert accuracy_table.accuracy_table(["m"]).splitlines()[2:] == [
        "| float | 4.00 |", "| w4a16g128 rtn | **4.25** |", "| w3a16g128 gptq | **8.00** |",
    ]  # fmt: skip
    assert "| w4a16g128 | 0.5 | 6.25 |" in accuracy_table.goal_table(["m"])
    new.write_text(json.dumps({"protocol": {"model": "m", "windows": 1}, "cells": []}))
    with pytest.raises(SystemExit, match="another protocol"):
        accuracy_table.add(new)


def test_draws_are_a_mean_and_a_deviation_of_the_rows_that_all_have(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy_table, "RESULTS", tmp_path)
    (tmp_path / "accuracy").mkdir()
    for name, rows in (
        ("m-outliers", {"rtn": 5.0, "gptq": 4.5}), ("m-1-outliers", {"rtn": 7.0}), ("m", {}),
        ("n-outliers", {"rtn": 3.0}),
    ):  # fmt: skip
        cells = [{"scheme": "w4a16g128", "label": k, "perplexity": v} for k, v in rows.items()]
        (tmp_path / "accuracy" / f"{name}.json").write_text(json.dumps({"cells": cells}))
    made = accuracy_table.draws_table(["m-outliers", "n-outliers"]).splitlines()[2:]
    assert made == ["| w4a16g128 rtn | 6.00 \u00b1 1.41 |  |"]


def test_auto_is_held_against_rows_that_neither_choose_nor_learn_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy_table, "RESULTS", tmp_path)
    (tmp_path / "accuracy").mkdir()
    rows = {"gptq": (0.5, 8.0), "qronos": (0.25, 10.0), "auto": (0.5, 6.0), "auto+tune": (0.1, 2.0)}
    cells = [
        {"scheme": "w4a16g128", "label": label, "kl": kl, "perplexity": perplexity}
        for label, (kl, perplexity) in rows.items()
    ]
    cells.append({"scheme": "w4a16g128", "label": "rtn", "refused": "no"})
    cells.append({"scheme": "w8a8", "label": "rtn", "kl": 1.0, "perplexity": 2.0})
    (tmp_path / "accuracy" / "m.json").write_text(json.dumps({"cells": cells}))
    made = accuracy_table.auto_table(["m", "n"]).splitlines()[2:]
    assert made == ["| w4a16g128 | 2.000, 0.750 |  |"]


def test_what_is_below_its_bar_is_in_italics(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy_table, "RESULTS", tmp_path)
    rows = {"a over b": {"bar": 0.9, "1": 0.9, "2": 0.899}, "c over d": {"bar": 1.0, "2": 3.0}}
    found = {"X": {"isa": "avx2", "rows": rows}, "Y": {"isa": "avx512", "rows": {}}}
    (tmp_path / "kernels.json").write_text(json.dumps(found))
    made = accuracy_table.kernels_table().splitlines()
    assert made[0] == "| ratio, 1 and 2 threads | bar | X | Y |"
    assert made[2:] == ["| a over b | 0.9 | 0.90, *0.90* |  |", "| c over d | 1 | 3.00 |  |"]


def test_ratios_of_the_kernels_are_those_of_the_cases():
    import bench_all

    hadamard = {"op": "hadamard", "threads": 2, "shape": "", "bars": [{"bar": 0.4, "ratio": 0.5}]}
    slow = {**hadamard, "bars": [{"bar": 0.4, "ratio": 0.3}]}
    case = {"op": "x", "shape": "M=16 4x4", "threads": 1, "bars": [
        {"against": "copy", "bar": 0.5, "ratio": 0.25},
        {"against": "matmul 1024", "bar": 0.9 * 64, "ratio": 64.0},
    ]}  # fmt: skip
    calls = [{"op": "y", "threads": 1, "us_above_torch": us} for us in (1.0, 10.0)]
    solver = {"op": "solve", "threads": 1, "of eager": 0.25, "bar": 0.5}
    assert bench_all.ratios([hadamard, slow, case, *calls, solver]) == {
        "x M=16 4x4 over copy": {"bar": 0.5, "1": 0.25},
        "x M=16 4x4 over the matmul rate": {"bar": 0.9, "1": 1.0},
        "solve over eager torch": {"bar": 2.0, "1": 4.0},
        "hadamard, share of 2 widths m 2^k within 2.5 clones": {"bar": 1.0, "2": 0.5},
        "5 us over the call of 16x16 above torch's, dearest of 2 operators": {"bar": 1.0, "1": 0.5},
    }
