"""F8 to F13, F16, F26: threads, forks, signals, kills and memory."""

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from sweep import METHODS

from fewbit import _C, ops
from tiny import tiny

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SWEEP = [sys.executable, str(HERE / "sweep.py")]


def sweep(*arguments):
    """In a process of its own: forks need one without threads."""
    done = subprocess.run([*SWEEP, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_f08_the_sanitizers_run_the_tests_of_every_operator():
    script = (ROOT / "scripts" / "sanitize.sh").read_text()
    assert "-DFEWBIT_SANITIZE=ON" in script and "UBSAN_OPTIONS" in script
    assert "for binding in cpp/bindings/*.cpp" in script and "tests/test_$(basename" in script
    for path in (ROOT / "cpp" / "bindings").glob("*.cpp"):
        if "m.def(" in path.read_text() and path.name != "module.cpp":
            assert (ROOT / "tests" / f"test_{path.stem}.py").exists(), path.name


def test_f09_a_missing_cuda_build_is_said_not_guessed():
    if _C.cuda:
        pytest.skip("this build has CUDA kernels")
    from fewbit.doctor import examine

    assert any("CUDA" in str(finding) or "cuda" in str(finding) for finding in examine())


def test_f10_operators_from_many_threads_give_equal_bits():
    w, x = torch.randn(48, 64), torch.randn(7, 64)
    packed = ops.pack(*ops.quantize(w, 4, 16), 4, 16)

    def work():
        g = torch.zeros(64, 64)
        ops.gram(x, g)
        return ops.w4a16_linear(x, *packed, None, 48, 4, 16), g

    want, wrong = work(), []

    def many():
        for _ in range(60):
            if not all(torch.equal(a, b) for a, b in zip(work(), want, strict=True)):
                wrong.append(1)

    threads = [threading.Thread(target=many) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


FORK = """
import os, torch
torch.set_num_threads(4)
from fewbit import ops
x, g, h = torch.randn(512, 256), torch.zeros(256, 256), torch.zeros(256, 256)
ops.gram(x, g)
pid = os.fork()
ops.gram(x, h)
if pid == 0:  # row by row: torch's own operators use its threads, which are not here, above 32768
    os._exit(0 if all(torch.equal(a, b) for a, b in zip(g, h)) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_f11_operators_run_in_a_forked_child():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


INTERRUPT = """
import signal, sys, time, torch
from fewbit import ops
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
x, g = torch.randn(200000, 1024), torch.zeros(1024, 1024)
print("ready", flush=True)
try:
    while True:
        ops.gram(x, g)
except KeyboardInterrupt:
    print(time.monotonic(), flush=True)
"""


def test_f12_ctrl_c_stops_an_operator_half_way():
    """In the process itself, as a notebook's stop button does: one call takes many seconds."""
    command = [sys.executable, "-c", INTERRUPT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "ready\n"
        time.sleep(0.3)
        sent = time.monotonic()
        run.send_signal(signal.SIGINT)
        try:
            assert float(run.stdout.readline()) - sent < 0.5
        except BaseException:
            run.kill()  # it would go on for ever
            raise
    assert run.returncode == 0


def test_f12_ctrl_c_ends_a_run_that_resumes_to_the_same_bytes():
    out = sweep("interrupt", "--method", "gptq", "--times", 3)
    assert float(re.search(r"p99 ([\d.]+) s", out)[1]) <= 0.5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_f12_two_hundred_times_ctrl_c():
    out = sweep("interrupt", "--method", "gptq", "--times", 200)
    assert float(re.search(r"p99 ([\d.]+) s", out)[1]) <= 0.5


def test_f13_killed_at_steps_then_resumed_to_the_same_bytes():
    sweep("kill", "--method", "gptq", "--every", 16)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", METHODS)
def test_f13_killed_at_every_step_and_at_random_times(method):
    sweep("kill", "--method", method)
    sweep("torn", "--method", method)
    sweep("random", "--method", method, "--times", 50)


CELL = """
import os, signal, sys
from pathlib import Path
from sweep import quantize
def callback(event):
    if sys.argv[2] == "dies" and event["event"] == "layer":
        os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[1])
quantize(folder / "model", folder / "out", "rtn", callback=callback)
"""


def test_f26_a_notebook_that_dies_goes_on_by_the_same_call(tmp_path):
    """The journal is beside the output by default, and the same call finds it."""
    tiny("opt").save_pretrained(tmp_path / "model")
    cell = [sys.executable, "-c", CELL, str(tmp_path)]
    assert subprocess.run([*cell, "dies"], cwd=HERE).returncode == -signal.SIGKILL
    assert (tmp_path / "out.fewbit" / "step-00001.json").exists()
    assert subprocess.run([*cell, "lives"], cwd=HERE).returncode == 0
    assert (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out.fewbit").exists()
