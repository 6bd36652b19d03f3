#!/usr/bin/env python3
"""Check and time every CUDA kernel on this machine's GPU, and record what was verified.

    python scripts/gpu_check.py              build, compare, sanitize, time, write the record
    python scripts/gpu_check.py --compare    compare only; the record is not written
    python scripts/gpu_check.py --emulate 75 the comparison on the CPU emulator (no GPU; build with
                                             -DFEWBIT_CUDA=EMULATE), as a card of sm_75

Every kernel is compared with reference.py over the sweep of tests/cuda_sweep.py, in eager mode and
out of a CUDA graph. The record, python/fewbit/verified.json, decides where kernels run from then
on: commit it, or send it in. Exit codes: 0 all right, 1 a kernel is wrong, 4 nothing to check here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "python" / "fewbit" / "verified.json"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "python")]
os.environ["FEWBIT_CUDA_UNVERIFIED"] = "1"

import torch  # noqa: E402

NOTHING_TO_CHECK = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--compare", action="store_true", help="compare only, write nothing")
    parser.add_argument("--emulate", type=int, metavar="SM", help="on the CPU, as a card of sm_SM")
    parser.add_argument("--record", type=Path, default=RECORD, help="where the record is")
    arguments = parser.parse_args()
    if arguments.emulate:
        return emulated(arguments.emulate)
    if not torch.cuda.is_available():
        print(
            "gpu_check: torch finds no GPU here, so there is nothing to check; "
            "--emulate 75 compares the kernels on the CPU",
            file=sys.stderr,
        )
        return NOTHING_TO_CHECK
    problem = built()
    if problem:
        print(f"gpu_check: {problem}", file=sys.stderr)
        return NOTHING_TO_CHECK
    major, minor = torch.cuda.get_device_capability()
    architecture, device = 10 * major + minor, torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, sm_{architecture}, torch {torch.__version__}")
    results = compare(device)
    if arguments.compare:
        return report(results)
    run = {
        "device": torch.cuda.get_device_name(),
        "architecture": architecture,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "sanitizer": sanitize(),
        "compared": {op: problems[:3] for op, problems in results.items()},
    }
    times, rates = measure(device)
    run.update(rates=rates, times=times)
    if run["sanitizer"] not in ("clean", "not installed"):
        results = {op: [*p, f"compute-sanitizer: {run['sanitizer']}"] for op, p in results.items()}
    arguments.record.write_text(
        json.dumps(updated(json.loads(arguments.record.read_text()), architecture, results, run),
                   indent=2) + "\n"
    )  # fmt: skip
    print(f"record written to {arguments.record}")
    return report(results)


def updated(record: dict, architecture: int, results: dict[str, list[str]], run: dict) -> dict:
    """The record after a run: an op without problems is verified on the card, any other is not."""
    verified = {op: set(cards) for op, cards in record["verified"].items()}
    for op, problems in results.items():
        cards = verified.setdefault(op, set())
        cards.discard(architecture) if problems else cards.add(architecture)
    same = (run["device"], run["architecture"])
    others = [r for r in record["runs"] if (r["device"], r["architecture"]) != same]
    return {
        "verified": {op: sorted(cards) for op, cards in sorted(verified.items()) if cards},
        "runs": [*others, run],
    }


def report(results: dict[str, list[str]]) -> int:
    for op, problems in results.items():
        print(f"{'ok   ' if not problems else 'WRONG'} {op}")
        for problem in problems[:3]:
            print(f"      {problem}")
    return 1 if any(results.values()) else 0


def compare(device: torch.device) -> dict[str, list[str]]:
    """Op to what is wrong with its kernel: every answer of its sweep, then out of a graph."""
    import cuda_sweep

    results = {}
    for op, sweep in cuda_sweep.SWEEPS.items():
        torch.manual_seed(0)
        problems = []
        try:
            for what, got, want, bound in sweep(device):
                problem = cuda_sweep.wrong(got, want, bound)
                if problem:
                    problems.append(f"{what}: {problem}")
            if device.type == "cuda":
                problems += captured(op)
        except Exception as error:  # a kernel that does not start is a finding, not the end
            problems.append(f"{type(error).__name__}: {error}")
        results[op] = problems
    return results


def emulated(architecture: int) -> int:
    from fewbit import _C

    if not hasattr(_C, "emulate_cuda"):
        print("gpu_check: --emulate needs a build with -DFEWBIT_CUDA=EMULATE", file=sys.stderr)
        return NOTHING_TO_CHECK
    _C.emulate_cuda(architecture)
    try:
        return report(compare(torch.device("cpu")))
    finally:
        _C.emulate_cuda(0)


def built() -> str:
    """Build the native module for this card where it has no CUDA kernels; why not, or nothing."""
    probe = [sys.executable, "-c", "from fewbit import _C; print(_C.cuda)"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run(probe, capture_output=True, text=True, env=environment)
    if done.stdout.strip() == "True":
        return ""
    if shutil.which("nvcc") is None and not os.environ.get("CUDACXX"):
        return "there is a GPU but no nvcc: put it on PATH or into CUDACXX"
    build = ROOT / "build" / "gpu_check"
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DFEWBIT_CUDA=ON",
        "-DCMAKE_CUDA_ARCHITECTURES=native", "-DFEWBIT_INPLACE=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            return f"{' '.join(command[:2])} failed:\n{(done.stdout + done.stderr)[-2000:]}"
    return ""


def sanitize() -> str:
    """compute-sanitizer over the comparison: "clean", "not installed", or its last lines."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "not installed"
    command = [tool, "--error-exitcode", "9", sys.executable, __file__, "--compare"]
    done = subprocess.run(command, capture_output=True, text=True)
    return "clean" if done.returncode == 0 else (done.stdout + done.stderr)[-1000:]


def captured(op: str) -> list[str]:
    """What a CUDA graph of the op gives on fresh input, against the op itself."""
    case = cases(torch.device("cuda"), small=True).get(op)
    if case is None:  # packing checks its codes, which waits for the card
        return []
    call, fresh = case.call, case.refill
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    fresh()
    graph.replay()
    want = call()
    torch.cuda.synchronize()
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (out, want)), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs if a is not None)
    return [] if same else ["a replayed graph gives another result than the op"]


class Case:
    """A call to be timed: bytes it must move, operations it must do, and torch's way."""

    def __init__(
        self,
        call: Callable,
        moved: float,
        operations: float = 0.0,
        peers: dict[str, Callable] | None = None,
        refill: Callable = lambda: None,
    ) -> None:
        self.call, self.moved, self.operations = call, moved, operations
        self.peers, self.refill = peers or {}, refill


def cases(device: torch.device, small: bool = False, rows: int = 1) -> dict[str, Case]:
    from fewbit import ops

    n, k = (256, 256) if small else (4096, 4096)
    m = 8 if small else 2048
    w = torch.randn(n, k, device=device, dtype=torch.float16)
    tokens = torch.randn(m, k, device=device, dtype=torch.float16)
    x = torch.randn(rows, k, device=device, dtype=torch.float16)
    codes = ops.quantize(w, 4, 128, False, "float16")
    packed = ops.pack(*codes, 4, 128)
    codes8 = ops.quantize(w, 8, -1, True, "float32")
    packed8 = ops.pack(*codes8, 8, -1)
    norm = torch.rand(k, device=device)

    def refill() -> None:
        for t in (w, tokens, x):
            t.normal_()

    weight4, flops = n * k * 0.52, 2.0 * rows * n * k
    linear = {"torch fp16 linear": lambda: torch.nn.functional.linear(x, w)}
    return {
        "pseudo_quantize": Case(
            lambda: ops.pseudo_quantize(w, 4, 128), 4 * n * k, refill=refill,
            peers={"torch": lambda: ops.reference.pseudo_quantize(w, 4, 128, False, "float32")},
        ),
        "quantize": Case(lambda: ops.quantize(w, 4, 128), 3 * n * k, refill=refill),
        "dequantize": Case(lambda: ops.dequantize(*codes, 128, "float16"), 3 * n * k),
        "unpack": Case(lambda: ops.unpack(*packed, n, k, 4, 128), n * k + weight4),
        "quantize_per_token": Case(
            lambda: ops.quantize_per_token(tokens), 3 * m * k, refill=refill,
            peers={"torch": lambda: ops.reference.quantize_per_token(tokens, True, None, None)},
        ),
        "norm_quantize": Case(
            lambda: ops.norm_quantize(tokens, norm), 3 * m * k, refill=refill,
            peers={"torch": lambda: ops.reference.norm_quantize(tokens, norm, None, 1e-6, True,
                                                                True)},
        ),
        "hadamard": Case(
            lambda: ops.hadamard(tokens), 4 * m * k, refill=refill, peers=_hadamard_peer(tokens)
        ),
        "w4a16_linear": Case(
            lambda: ops.w4a16_linear(x, *packed, None, n, 4, 128), weight4, flops, refill=refill,
            peers={**linear, **_int4_peer(w, x)},
        ),
        "w8a8_linear": Case(
            lambda: ops.w8a8_linear(x, *packed8, None, n, 8, -1), n * k, flops, refill=refill,
            peers={**linear, **_int8_peer(n, k, rows, device)},
        ),
        "int8_mixed_linear": Case(
            lambda: ops.int8_mixed_linear(x, *packed8, None, n), n * k, flops, refill=refill,
            peers={**linear, **_bitsandbytes_peer(w, x)},
        ),
    }  # fmt: skip


def _hadamard_peer(x: torch.Tensor) -> dict[str, Callable]:
    try:
        from fast_hadamard_transform import hadamard_transform
    except ImportError:
        return {"clone": lambda: x.clone()}
    return {"clone": lambda: x.clone(), "fast-hadamard-transform": lambda: hadamard_transform(x)}


def _int4_peer(w: torch.Tensor, x: torch.Tensor) -> dict[str, Callable]:
    try:
        from gemlite.helper import A16W4_HQQ_INT

        linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
        layer = A16W4_HQQ_INT(device=w.device).from_linear(linear.to(w.device))
    except Exception:  # absent, or not for this card: then there is no peer
        return {}
    return {"gemlite": lambda: layer(x)}


def _int8_peer(n: int, k: int, rows: int, device: torch.device) -> dict[str, Callable]:
    if rows <= 16:  # what torch._int_mm asks for
        return {}
    a = torch.randint(-127, 128, (rows, k), device=device, dtype=torch.int8)
    b = torch.randint(-127, 128, (n, k), device=device, dtype=torch.int8).T
    s = torch.rand(n, device=device)
    return {"torch._int_mm and scales": lambda: (torch._int_mm(a, b) * s).half()}


def _bitsandbytes_peer(w: torch.Tensor, x: torch.Tensor) -> dict[str, Callable]:
    try:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear8bitLt(w.shape[1], w.shape[0], bias=False, has_fp16_weights=False,
                                    threshold=6.0).to(w.device)  # fmt: skip
    except Exception:  # absent, or not for this card
        return {}
    return {"bitsandbytes": lambda: layer(x)}


def seconds(call: Callable) -> float:
    """Median of replayed graphs of 20 calls, or of calls where the peer cannot be captured."""
    call()
    torch.cuda.synchronize()
    count, run = 20, None
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
        run = graph.replay
    except Exception:

        def run() -> None:
            for _ in range(count):
                call()

    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / count)
    return statistics.median(times)


def measure(device: torch.device) -> tuple[list[dict], dict[str, float]]:
    """Times of every op, its peers and its limit, all in this run."""
    source = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / seconds(lambda: target.copy_(source))
    a = torch.randn(4096, 4096, device=device, dtype=torch.float16)
    rate = 2 * 4096**3 / seconds(lambda: a @ a)
    print(f"copy {bandwidth / 1e9:.0f} GB/s, fp16 product {rate / 1e12:.1f} TFLOP/s")
    rows = []
    for m in (1, 4, 16, 64, 256, 2048):
        for op, case in cases(device, rows=m).items():
            if m > 1 and not case.operations:
                continue
            ours = seconds(case.call)
            limit = max(case.moved / bandwidth, case.operations / rate)
            peers = {}
            for name, call in case.peers.items():
                try:
                    peers[name] = seconds(call)
                except Exception as error:  # a peer that does not run on this card
                    print(f"{op:20} m {m:5}  {name} failed: {str(error)[:80]}")
            rows.append({"op": op, "rows": m, "us": 1e6 * ours, "of_limit": limit / ours,
                         "times_faster_than": {p: t / ours for p, t in peers.items()}})  # fmt: skip
            others = ", ".join(f"{t / ours:.2f}x {p}" for p, t in peers.items())
            print(f"{op:20} m {m:5}  {1e6 * ours:9.1f} us  {100 * limit / ours:5.0f} %"
                  f" of the limit  {others}")  # fmt: skip
    return rows, {"copy_gb_s": bandwidth / 1e9, "fp16_tflop_s": rate / 1e12}


if __name__ == "__main__":
    raise SystemExit(main())
