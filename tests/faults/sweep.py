"""Stop a run in every way and let it go on: the bytes must be those of a run that nobody stopped.

    python tests/faults/sweep.py kill --method gptq            # kill -9 before every step on disk
    python tests/faults/sweep.py torn --method awq             # the same, with a half-written file
    python tests/faults/sweep.py enospc --method rtn           # the N-th step fails: no space left
    python tests/faults/sweep.py write --method rtn            # the N-th write of the process fails
    python tests/faults/sweep.py allocate --method gptq        # the N-th allocation of torch fails
    python tests/faults/sweep.py random --method gptq --times 50   # kill -9 at random times
    python tests/faults/sweep.py interrupt --method gptq --times 200   # Ctrl-C at random times
    python tests/faults/sweep.py all                            # all of it, for all METHODS

Every run is a fork of this process, which has imported everything and started no thread. The N-th
write and allocation fail in the C library itself (failing.c, preloaded), wherever they come from.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fewbit import durable, interrupt, stream  # noqa: E402
from fewbit.errors import FewbitError, ResumableStop  # noqa: E402
from fewbit.journal import folder_of  # noqa: E402
from fewbit.reproducible import strict  # noqa: E402
from tiny import probe, tiny  # noqa: E402

strict()  # before the first product
METHODS = {
    "rtn": "w4a16g8", "awq": "w4a16g8", "gptq": "w4a16g8", "quarot+gptq": "w4a16g8",
    "smoothquant": "w8a8",
}  # fmt: skip
FORMATS = {"smoothquant": "int-quantized"}
PRELOADED = {"write": 0, "allocate": 1}  # kinds of failing.c
ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "erofs": errno.EROFS, "edquot": errno.EDQUOT}


@functools.cache
def windows(tokens: int) -> list[torch.Tensor]:
    """Four calibration windows."""
    return list(probe(4, tokens).split(1))


def quantize(model: Path, out: Path, method: str, tokens: int = 24, **options):
    """``quantize_directory`` with the fixed arguments of this file."""
    ids = windows(tokens)
    options = {"format": FORMATS.get(method, "compressed-tensors"), "progress": False, **options}
    return stream.quantize_directory(model, out, method, METHODS[method], ids, **options)


class Fault:
    """A durable.hook that counts the steps and does something at number ``at``."""

    def __init__(self, kind: str, at: int) -> None:
        self.kind, self.at, self.seen = kind, at, 0

    def __call__(self, action: str, path: Path) -> None:
        self.seen += 1
        if self.seen != self.at:
            return
        if self.kind == "torn" and action == "sync" and path.is_file():
            os.truncate(path, path.stat().st_size // 2)
        if self.kind in ("kill", "torn"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind in ERRORS:
            raise OSError(ERRORS[self.kind], os.strerror(ERRORS[self.kind]), str(path))


class Preloaded:
    """The same for calls into the C library, by failing.c: counts from when it is armed."""

    def __init__(self, kind: str, at: int) -> None:
        self.kind, self.at = PRELOADED[kind], at

    def arm(self) -> None:
        ctypes.CDLL(None).failing_arm(self.kind, ctypes.c_long(self.at))

    @property
    def seen(self) -> int:
        return ctypes.CDLL(None).failing_seen(self.kind)


def build(folder: Path) -> Path:
    """failing.c as a library to be preloaded."""
    library = folder / "failing.so"
    source = Path(__file__).with_name("failing.c")
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library


def child(run, hook=None) -> int:
    """Fork, run, and give the process id; 0 done, the error's exit code, 70 a crash."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    if isinstance(hook, Preloaded):
        hook.arm()
    else:
        durable.hook = hook
    code = 70
    try:
        with interrupt.prompt(lambda: "stopped", ResumableStop.exit_code):
            run()
        code = 0
    except KeyboardInterrupt:
        code = ResumableStop.exit_code
    except FewbitError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def digest(out: Path) -> str:
    """SHA-256 over every byte of a finished output but the times and threads in its report."""
    h = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        data = path.read_bytes()
        if path.name == stream.REPORT:
            data = json.dumps(_result(json.loads(data)), sort_keys=True).encode()
        if path.name == "README.md":  # holds the same environment
            data = re.sub(rb'"threads": \d+', b"", data)
        h.update(path.relative_to(out).as_posix().encode() + b"\0" + data + b"\0")
    return h.hexdigest()


def _result(value):
    """What a run found, without how long it took on how many threads (torchrun starts one)."""
    if isinstance(value, dict):
        return {k: _result(v) for k, v in value.items() if k not in ("seconds", "threads")}
    return [_result(v) for v in value] if isinstance(value, list) else value


class Sweep:
    """One model, one method, the digest of its uninterrupted run, its time and number of steps."""

    def __init__(
        self, folder: Path, method: str, name: str = "llama-gqa", kind: str = "kill"
    ) -> None:
        self.folder, self.method = folder, method
        self.model, self.out = folder / "model", folder / "out"
        if not self.model.exists():
            tiny(name).save_pretrained(self.model)
        windows(24)  # before any child counts allocations
        reference = folder / f"reference-{method}"
        count = folder / "count"
        fault = (Preloaded if kind in PRELOADED else Fault)(kind, 0)

        def run() -> None:
            quantize(self.model, reference, method)
            count.write_text(str(fault.seen))

        started = time.monotonic()
        assert wait(child(run, fault)) == 0, "the run without a fault failed"
        self.seconds = time.monotonic() - started
        self.steps, self.want = int(count.read_text()), digest(reference)

    def start(self, hook=None) -> int:
        return child(lambda: quantize(self.model, self.out, self.method), hook)

    def finish(self, what: str) -> None:
        """Run again without a fault, compare, and clean up."""
        partial = self.out.exists() and any(self.out.iterdir())
        assert not partial or digest(self.out) == self.want, f"{what}: half an output"
        if partial and not folder_of(self.out).exists():  # it had just finished
            shutil.rmtree(self.out)
            return
        code = wait(self.start())
        assert code == 0, f"{what}: the resumed run ended with {code}"
        assert digest(self.out) == self.want, f"{what}: other bytes than an uninterrupted run"
        left = [p.name for p in self.folder.iterdir() if p.name.startswith("out.")]
        assert not left, f"{what}: {left} is left"
        shutil.rmtree(self.out)

    def at_steps(self, kind: str, every: int = 1) -> int:
        """Fail before every ``every``-th step; returns how many were tried."""
        tried = 0
        for at in range(1, self.steps + 1, every):
            code = wait(self.start((Preloaded if kind in PRELOADED else Fault)(kind, at)))
            what = f"{self.method}, {kind} at step {at} of {self.steps}"
            allowed = (-signal.SIGKILL,) if kind in ("kill", "torn") else (3,)
            assert code in allowed, f"{what}: ended with {code}"
            self.finish(what)
            tried += 1
        return tried

    def at_times(self, kind: str, times: int, seed: int = 0) -> list[float]:
        """Signals at random times; the seconds from each to the end of the process."""
        pick, took = random.Random(seed), []
        number = signal.SIGKILL if kind == "random" else signal.SIGINT
        while len(took) < times:
            pid = self.start()
            time.sleep(pick.uniform(0.0, self.seconds))
            sent = time.monotonic()
            os.kill(pid, number)
            code = wait(pid)
            seconds = time.monotonic() - sent
            if code == 0:  # it was faster this time
                shutil.rmtree(self.out)
                continue
            want = (-signal.SIGKILL,) if kind == "random" else (3,)
            before = kind == "interrupt" and code == -signal.SIGINT  # before the handler was set
            assert code in want or before, f"{self.method}, {kind}: ended with {code}"
            took.append(seconds)
            self.finish(f"{self.method}, {kind} number {len(took)}")
        return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ["kill", "torn", *ERRORS, *PRELOADED, "random", "interrupt"]
    parser.add_argument("kind", choices=[*kinds, "all"])
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    options = parser.parse_args()
    if options.kind in ("all", *PRELOADED) and "failing.so" not in os.environ.get("LD_PRELOAD", ""):
        with tempfile.TemporaryDirectory() as folder:
            preload = {**os.environ, "LD_PRELOAD": str(build(Path(folder)))}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=preload).returncode)
    torch.set_num_threads(1)  # a fork has no other threads
    for method in [options.method] if options.method else METHODS:
        for kind in kinds if options.kind == "all" else [options.kind]:
            with tempfile.TemporaryDirectory() as folder:
                sweep = Sweep(Path(folder), method, kind=kind)
                if kind in ("random", "interrupt"):
                    took = sorted(sweep.at_times(kind, options.times, options.seed))
                    p99 = took[min(len(took) - 1, int(0.99 * len(took)))]
                    text = f"{len(took)} times, p99 {p99:.3f} s, worst {took[-1]:.3f} s"
                else:
                    text = f"{sweep.at_steps(kind, options.every)} of {sweep.steps} steps"
                print(f"{method:<12} {kind:<9} {text}: same bytes", flush=True)


if __name__ == "__main__":
    main()
