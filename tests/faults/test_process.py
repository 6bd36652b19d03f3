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
from sweep import METHODS, digest, quantize
from test_numbers import wide

from fewbit import _C, interrupt, ops
from tiny import TWINS, tiny

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
    assert "-DFEWBIT_SANITIZE=ADDRESS" in script and "UBSAN_OPTIONS" in script
    assert "for binding in cpp/bindings/*.cpp" in script and "tests/test_$(basename" in script
    for path in (ROOT / "cpp" / "bindings").glob("*.cpp"):
        if "m.def(" in path.read_text() and path.name != "module.cpp":
            assert (ROOT / "tests" / f"test_{path.stem}.py").exists(), path.name


def test_f08_every_kernel_is_in_the_race_test():
    """tests/races.cpp runs every kernel's tasks on threads, for ThreadSanitizer."""
    races = (ROOT / "tests" / "races.cpp").read_text()
    for header in (ROOT / "cpp" / "include" / "fewbit").glob("*.h"):
        for kernel in re.findall(r"^FEWBIT_(?:DOT_)?KERNEL\((\w+)", header.read_text(), re.M):
            assert re.search(rf"\b{kernel}\b", races), kernel


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_f08_no_kernel_has_a_data_race():
    """Builds the kernels under ThreadSanitizer and runs tests/races.cpp; some minutes."""
    script = ["bash", str(ROOT / "scripts" / "sanitize.sh"), "thread"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "every kernel on four threads" in done.stdout


def test_f07_no_mixture_of_arguments_ends_the_process():
    """A thousand calls of every kind; ``python tests/faults/fuzz_ops.py --calls N`` makes more."""
    command = [sys.executable, str(HERE / "fuzz_ops.py"), "--calls", "2000", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_f09_every_launch_is_checked_and_on_the_right_device():
    """One function launches, and it returns the error; one calls it, under a device guard, and
    names operator and shape."""
    sources = {p.name: p.read_text() for p in (ROOT / "cpp" / "cuda").iterdir()}
    assert not [name for name, text in sources.items() if "<<<" in text]
    assert [name for name, text in sources.items() if "cudaLaunchKernel(" in text] == ["device.h"]
    for name, text in sources.items():
        if name.endswith(".cu"):  # its error goes on, or into a variable
            before = re.findall(r"(\S+)\s+start\(", text)
            assert set(before) <= {"return", "="}, (name, before)
            assert len(before) == len(re.findall(r"\bstart\(", text)), name
    bindings = {p.name: p.read_text() for p in (ROOT / "cpp" / "bindings").iterdir()}
    assert [name for name, text in bindings.items() if "cuda::launch(" in text] == ["cuda.h"]
    launcher = bindings["cuda.h"].partition("void run_cuda(")[2].partition("\n}")[0]
    assert launcher.index("DeviceGuard guard(device)") < launcher.index("cuda::launch(")
    assert "shape_of(on)" in launcher and "<< op <<" in launcher


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
        for _ in range(1000):
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
from fewbit.hadamard import plan
x, g, h = torch.randn(512, 256), torch.zeros(256, 256), torch.zeros(256, 256)
bases, row = plan(13696).bases(), torch.randn(1, 13696)  # one of order 428, first seen in the child
ops.gram(x, g)
pid = os.fork()
ops.gram(x, h)
y = ops.hadamard(row, bases)
if pid == 0:  # row by row: torch's own operators use its threads, which are not here, above 32768
    same = all(torch.equal(a, b) for a, b in zip(g, h))
    os._exit(0 if same and torch.equal(y, ops.hadamard(row, bases)) else 1)
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


STOPPED = """
import sys, time, threading, signal, os
from pathlib import Path
from sweep import quantize
folder, after = Path(sys.argv[1]), float(sys.argv[2])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
threads = threading.active_count()
def press():
    time.sleep(after)
    print(time.monotonic(), flush=True)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=press).start()
try:
    quantize(folder / "model", folder / "out", "gptq", 256)
except KeyboardInterrupt:
    print(time.monotonic(), threading.active_count() - threads, flush=True)
"""


def test_f12_a_notebooks_stop_button_ends_the_cell_and_the_same_cell_goes_on(tmp_path):
    """In the process itself, which lives on: no handler of the command line is in place."""
    torch.manual_seed(0)
    model = wide(tmp_path / "model", 1024, 2816)
    cell = [sys.executable, "-c", STOPPED, str(tmp_path)]
    for after in (0.4, 1.1):
        done = subprocess.run([*cell, str(after)], cwd=HERE, capture_output=True, text=True)
        lines = done.stdout.split()
        assert done.returncode == 0 and len(lines) == 3, done.stdout + done.stderr
        assert float(lines[1]) - float(lines[0]) < 0.5 and lines[2] == "0"
        assert not (tmp_path / "out").exists()
    quantize(model, tmp_path / "out", "gptq", 256)
    quantize(model, tmp_path / "want", "gptq", 256)
    assert digest(tmp_path / "out") == digest(tmp_path / "want")


@pytest.fixture
def kernel():
    """A notebook's kernel, and what a notebook talks to it with."""
    pytest.importorskip("ipykernel", reason="needs ipykernel and jupyter_client")
    manager = pytest.importorskip("jupyter_client.manager", reason="needs jupyter_client")
    kernel, client = manager.start_new_kernel(cwd=str(HERE))
    yield kernel, client
    client.stop_channels()
    kernel.shutdown_kernel(now=True)


CELL_OF = """
import time
from pathlib import Path
from sweep import quantize
ended = 0.0
def cell():
    global ended
    try:
        quantize(Path({folder!r}) / "model", Path({folder!r}) / "out", "gptq", 256)
    finally:
        ended = time.monotonic()
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the packages around the kernel
def test_f26_the_stop_button_of_a_real_notebook(kernel, tmp_path):
    """By its signal and by its message: the cell ends, and run again it goes on."""
    kernel, client = kernel
    torch.manual_seed(0)
    wide(tmp_path / "model", 1024, 2816)

    def run(source: str, press=None) -> dict:
        asked = client.execute(source, user_expressions={"ended": "ended"}, stop_on_error=False)
        if press is not None:
            time.sleep(after)
            press()
        while True:  # the answer to starting may still be under way
            answer = client.get_shell_msg(timeout=120)
            if answer["parent_header"].get("msg_id") == asked:
                return answer["content"]

    assert run(CELL_OF.format(folder=str(tmp_path)))["status"] == "ok"
    message = client.session.msg("interrupt_request", {})
    presses = [kernel.interrupt_kernel, lambda: client.control_channel.send(message)]
    for after, press in zip((0.4, 1.1), presses, strict=True):
        sent = time.monotonic() + after
        found = run("cell()", press)
        assert found["status"] == "error" and found["ename"] == "KeyboardInterrupt", found
        ended = run("pass")["user_expressions"]["ended"]["data"]["text/plain"]
        assert 0 < float(ended) - sent < 0.5  # the kernel's traceback takes seconds more
        assert not (tmp_path / "out").exists()
    assert run("cell()")["status"] == "ok"
    quantize(tmp_path / "model", tmp_path / "want", "gptq", 256)
    assert digest(tmp_path / "out") == digest(tmp_path / "want")


TWICE = """
import sys, time
from fewbit import interrupt
interrupt.GRACE = 60.0
with interrupt.prompt(lambda: "stopped twice", 3):
    while True:
        try:
            print("ready", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            pass  # code that does not listen
"""


def test_f12_a_second_ctrl_c_ends_the_process_at_once():
    command = [sys.executable, "-c", TWICE]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as run:
        assert run.stdout.readline() == "ready\n"
        run.send_signal(signal.SIGINT)
        assert run.stdout.readline() == "ready\n"
        sent = time.monotonic()
        run.send_signal(signal.SIGINT)
        assert run.wait(5) == 3 and time.monotonic() - sent < 0.5
        assert run.stderr.read() == "stopped twice\n"


def test_f12_ctrl_c_that_foreign_code_turned_into_its_own_error():
    """torch's reading of a shape does: "could not determine the shape of object type ..."."""
    with pytest.raises(KeyboardInterrupt) as raised, interrupt.prompt(lambda: "stopped", 3):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None
    assert str(raised.value.__cause__) == "could not determine the shape"
    with pytest.raises(ValueError, match="its own"), interrupt.prompt(lambda: "stopped", 3):
        raise ValueError("its own")


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


def test_f13_no_memory_at_an_allocation_then_resumed_to_the_same_bytes():
    sweep("allocate", "--method", "rtn", "--every", 300)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", METHODS)
def test_f13_no_memory_at_every_fifth_allocation(method):
    sweep("allocate", "--method", method, "--every", 5)


@pytest.mark.parametrize("name", TWINS)
def test_f13_every_family_goes_on_after_its_first_layer(tmp_path, name):
    def callback(event):
        if event["event"] == "layer":
            raise KeyboardInterrupt

    tiny(name).save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "want", "awq")
    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path / "model", tmp_path / "out", "awq", callback=callback)
    assert (tmp_path / "out.fewbit" / "step-00001.json").exists()
    quantize(tmp_path / "model", tmp_path / "out", "awq")
    assert digest(tmp_path / "out") == digest(tmp_path / "want")


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
