#!/usr/bin/env python3
"""Check and time every CUDA kernel on this machine's GPU, and record what was verified.

    python scripts/gpu_check.py              build, compare, sanitize, time, write the record
    python scripts/gpu_check.py --compare    compare only; the record is not written
    python scripts/gpu_check.py --only OP .. these operators only
    python scripts/gpu_check.py --no-sanitizer   without what takes most of the time
    python scripts/gpu_check.py --small      times small shapes: to see the script run, no figures
    python scripts/gpu_check.py --emulate 75 the comparison on the CPU emulator (no GPU; build with
                                             -DFEWBIT_CUDA=EMULATE), as a card of sm_75

Every kernel is compared with reference.py over the sweep of tests/cuda_sweep.py, in eager mode and
out of a CUDA graph, each operator in a process of its own: a kernel that breaks the card's context
breaks no other's result. compute-sanitizer, where it is installed, looks for wrong accesses and
for races in the same comparison. What is right is timed (gpu_times.py) against the bandwidth and
the rates measured in the same run, and against the peers that are installed. The record,
python/fewbit/verified.json, decides where kernels run from then on: commit it, or send it in.
Exit codes: 0 all right, 1 a kernel is wrong, 4 nothing to check here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "python" / "fewbit" / "verified.json"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts"), str(ROOT / "python")]
os.environ["FEWBIT_CUDA_UNVERIFIED"] = "1"

import torch  # noqa: E402

NOTHING_TO_CHECK = 4
TOOLS = ("memcheck", "racecheck")  # of compute-sanitizer
SANITIZER_EXIT = 9
SANITIZER_SECONDS = 900  # for one operator and tool
UNFINISHED = f"not finished in {SANITIZER_SECONDS} s"
Results = dict[str, list[str]]  # op to what is wrong with its kernel


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--compare", action="store_true", help="compare only, write nothing")
    parser.add_argument("--only", nargs="+", metavar="OP", help="these operators only")
    parser.add_argument("--no-sanitizer", action="store_true", help="without compute-sanitizer")
    parser.add_argument("--small", action="store_true", help="time small shapes, to see it run")
    parser.add_argument("--emulate", type=int, metavar="SM", help="on the CPU, as a card of sm_SM")
    parser.add_argument("--record", type=Path, default=RECORD, help="where the record is")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)  # of a process for one op
    arguments = parser.parse_args()
    if arguments.emulate:
        return emulated(arguments.emulate, arguments.only)
    if not torch.cuda.is_available():
        print(
            "gpu_check: torch finds no GPU here, so there is nothing to check; "
            "--emulate 75 compares the kernels on the CPU",
            file=sys.stderr,
        )
        return NOTHING_TO_CHECK
    if arguments.answer:
        results = compare(torch.device("cuda"), arguments.only)
        arguments.answer.write_text(json.dumps(results))
        return 0
    problem = built()
    if problem:
        print(f"gpu_check: {problem}", file=sys.stderr)
        return NOTHING_TO_CHECK
    names = chosen(arguments.only)
    major, minor = torch.cuda.get_device_capability()
    architecture = 10 * major + minor
    print(f"{torch.cuda.get_device_name()}, sm_{architecture}, torch {torch.__version__}")
    results = {}
    for op in names:
        results[op] = in_its_own_process(op)
        report({op: results[op]})
    if arguments.compare:
        return 1 if any(results.values()) else 0
    sanitizer = {}
    if not arguments.no_sanitizer:
        sanitizer = sanitize([op for op in names if not results[op]])
    for op, said in sanitizer.items():
        if said != "clean" and UNFINISHED not in said:
            results[op].append(f"compute-sanitizer: {said}")
    run = {
        "device": torch.cuda.get_device_name(),
        "architecture": architecture,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
        "compared": {op: problems[:3] for op, problems in results.items()},
        "sanitizer": sanitizer or "not run",
    }
    record = json.loads(arguments.record.read_text(encoding="utf-8"))
    write(arguments.record, updated(record, architecture, results, run))  # before what takes long
    run["rates"], run["times"] = timed(
        [op for op in names if not results[op]], arguments.small
    )
    write(arguments.record, updated(record, architecture, results, run))
    print(f"record written to {arguments.record}")
    return report(results)


def chosen(only: list[str] | None) -> list[str]:
    import cuda_sweep

    unknown = set(only or ()) - set(cuda_sweep.SWEEPS)
    if unknown:
        raise SystemExit(f"gpu_check: no operator {sorted(unknown)[0]}, one of "
                         f"{', '.join(cuda_sweep.SWEEPS)}")  # fmt: skip
    return [op for op in cuda_sweep.SWEEPS if not only or op in only]


def write(path: Path, record: dict) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def updated(record: dict, architecture: int, results: Results, run: dict) -> dict:
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


def report(results: Results) -> int:
    for op, problems in results.items():
        print(f"{'ok   ' if not problems else 'WRONG'} {op}", flush=True)
        for problem in problems[:3]:
            print(f"      {problem}")
    return 1 if any(results.values()) else 0


# ---- comparing -----------------------------------------------------------------------------------


def compare(device: torch.device, only: list[str] | None = None) -> Results:
    """Every answer of an op's sweep against reference.py, then the op out of a graph."""
    import cuda_sweep

    results = {}
    for op in chosen(only):
        torch.manual_seed(0)
        problems = []
        try:
            for what, got, want, bound in cuda_sweep.SWEEPS[op](device):
                problem = cuda_sweep.wrong(got, want, bound)
                if problem:
                    problems.append(f"{what}: {problem}")
            if device.type == "cuda":
                problems += captured(op)
        except Exception as error:  # a kernel that does not start is a finding, not the end
            problems.append(f"{type(error).__name__}: {error}")
        results[op] = problems
    return results


def emulated(architecture: int, only: list[str] | None) -> int:
    from fewbit import _C

    if not hasattr(_C, "emulate_cuda"):
        print("gpu_check: --emulate needs a build with -DFEWBIT_CUDA=EMULATE", file=sys.stderr)
        return NOTHING_TO_CHECK
    _C.emulate_cuda(architecture)
    try:
        return report(compare(torch.device("cpu"), only))
    finally:
        _C.emulate_cuda(0)


def in_its_own_process(op: str, *before: str) -> list[str]:
    """What is wrong with ``op``; ``before``: a program that runs the comparison and watches it."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [*before, sys.executable, __file__, "--only", op, "--answer", str(answer)]
        try:
            limit = SANITIZER_SECONDS if before else None
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return [UNFINISHED]
        said = (done.stdout + done.stderr).strip()
        if before and done.returncode == SANITIZER_EXIT:
            return [said[-1000:]]
        if not answer.exists():
            return [f"the comparison ended with code {done.returncode}: {said[-1000:]}"]
        return json.loads(answer.read_text())[op]


def captured(op: str) -> list[str]:
    """What a CUDA graph of the op gives on fresh input, against the op itself."""
    import gpu_times

    if op not in gpu_times.OPS or op == "pack":  # which checks its codes, and so waits for the card
        return []
    case = next(gpu_times.Bench(torch.device("cuda"), small=True).cases(op))
    case.call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.call(0)
    case.refill()
    graph.replay()
    want = case.call(0)
    torch.cuda.synchronize()
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (out, want)), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs if a is not None)
    return [] if same else ["a replayed graph gives another result than the op"]


def sanitize(names: list[str]) -> dict[str, str]:
    """compute-sanitizer over the comparison: op to "clean" or what it says; empty without it."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed: accesses and races are not checked")
        return {}
    said = {}
    for op in names:
        for kind in TOOLS:
            watch = (tool, "--tool", kind, "--error-exitcode", str(SANITIZER_EXIT))
            problems = in_its_own_process(op, *watch)
            if problems:
                said[op] = f"{kind}: {problems[0]}"
                break
        else:
            said[op] = "clean"
        print(f"compute-sanitizer {op}: {said[op][:200]}", flush=True)
    return said


# ---- building and timing -------------------------------------------------------------------------


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
    print("building the kernels for this card, some minutes", flush=True)
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


def timed(names: list[str], small: bool) -> tuple[dict[str, float], list[dict]]:
    import gpu_times

    device = torch.device("cuda")
    rates = gpu_times.rates_of(device, 64 if small else 4096)
    print(f"copy {rates['copy'] / 1e9:.0f} GB/s, fp16 {rates['fp16'] / 1e12:.1f} TFLOP/s, int8 "
          f"{rates['int8'] / 1e12:.1f} TOP/s, fp32 {rates['fp32'] / 1e12:.1f} TFLOP/s")  # fmt: skip
    ops = tuple(op for op in gpu_times.OPS if op in names)
    return rates, gpu_times.measure(gpu_times.Bench(device, small), rates, ops)


if __name__ == "__main__":
    raise SystemExit(main())
