"""Progress on a terminal, in a log file, and to a program."""

import sys
import types

import pytest
import tqdm

from fewbit import progress
from fewbit.progress import Progress, held_bytes
from fewbit.report import LinearRecord


def record(name="model.layers.0.fc1", **changes):
    return LinearRecord(name, "w4a16g128asym", 1.5e-3, "output", 2048, 100, 20, 0.5, **changes)


def run(show=True, callback=None, layers=2):
    with Progress(layers, show, callback) as shown:
        for i in range(layers):
            records = [record(f"model.layers.{i}.fc1"), record(info={"rung": 1})]
            for each in records:
                shown.linear(each)
            shown.layer(records)


def test_a_log_file_gets_lines(capsys):
    run()
    lines = capsys.readouterr().err.splitlines()
    head, first, second, layer, *_ = lines
    assert head.split() == ["linear", "error", "tokens", "rung", "seconds", "memory", "left"]
    assert first.split()[:5] == ["model.layers.0.fc1", "1.5e-03", "2,048", "0", "0.50"]
    assert first.split()[-3:] == [first.split()[5], "MiB", "-"] and second.split()[3] == "1"
    assert layer == "layer 1/2 done, 0:00 left" and len(lines) == 7
    assert not any(c in "".join(lines) for c in "\r\x1b")  # nothing that only a terminal knows


def test_a_terminal_gets_a_bar_below_the_lines(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run()
    text = capsys.readouterr().err
    assert "model.layers.1.fc1" in text and "1/2" in text and "layer 1/2 done" not in text


def test_a_notebook_gets_them_on_stdout(capsys, monkeypatch):
    """It shows stderr as an error."""
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr(progress, "tqdm", tqdm.tqdm)
    run()
    text = capsys.readouterr()
    assert "model.layers.1.fc1" in text.out and "model.layers.1.fc1" not in text.err
    assert "1/2" in text.err  # the bar, of text without a notebook's widgets


def test_quiet_prints_nothing_and_programs_get_events(capsys):
    events = []
    run(show=False, callback=events.append)
    assert capsys.readouterr() == ("", "")
    assert [e["event"] for e in events] == ["linear", "linear", "layer"] * 2
    assert events[1]["info"] == {"rung": 1} and events[0]["memory"] > 1 << 20
    assert events[2]["done"] == 1 and events[2]["seconds_left"] >= 0


def test_time_left_counts_from_where_a_run_was_taken_up(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = Progress(10, callback=None)
    shown.skip(4)
    assert shown.seconds_left is None
    now[0] = 30.0
    shown.layer([])
    assert shown.seconds_left == pytest.approx(150)
    now[0] = 50.0  # inside a layer it counts down
    assert shown.seconds_left == pytest.approx(130)
    now[0] = 300.0
    assert shown.seconds_left == 0
    assert "4 of 10 layers are done already" in capsys.readouterr().err
    assert progress._clock(3723) == "1:02:03"


def test_long_names_keep_their_end(capsys):
    with Progress(1) as shown:
        shown.linear(record("model." + "x" * 60 + ".down_proj"))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("...") and line.split()[0].endswith(".down_proj")


def test_memory_is_that_of_the_process():
    assert held_bytes()[0] > 50 << 20  # torch is loaded
