"""Timing shared by the benchmarks: contenders in turn, so that a busy machine slows all of them.

A case is a name, contenders (label -> function; "ours" first), a check that raises when ours is
wrong, and bars: (label, least ratio of that contender's time to ours). Times are in one run, in
rounds; ratios are of minima and, beside them, of medians. A contender's turn is two calls, of which
the second counts: it finds caches and threads as its own kind left them, not as its predecessor did
(an 8 MB weight takes 0.10 ms after itself and 0.35 ms after a product that reads 64 MB).
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

clock = time.perf_counter  # seconds; time.process_time where others use the machine, for one thread


def reuse_memory() -> None:
    """Let freed memory serve the next result (glibc), as in a loop over layers.

    By default a large result comes from the kernel page by page at every call, which costs more
    than the work, in torch's operators as in ours.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation of its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing goes back


@dataclass
class Case:
    op: str
    shape: str
    contenders: dict[str, Callable[[], object]]
    check: Callable[[], None]
    bars: list[tuple[str, float]]
    note: str = ""
    result: dict = field(default_factory=dict)

    def run(self, rounds: int) -> None:
        self.check()
        times = {label: [] for label in self.contenders}
        for _ in range(rounds):
            for label, function in self.contenders.items():
                function()
                start = clock()
                function()
                times[label].append(clock() - start)
        least = {label: min(t) for label, t in times.items()}
        median = {label: statistics.median(t) for label, t in times.items()}
        self.result = {
            "op": self.op,
            "shape": self.shape,
            "threads": torch.get_num_threads(),
            "note": self.note,
            "min_ms": {label: 1e3 * t for label, t in least.items()},
            "median_ms": {label: 1e3 * t for label, t in median.items()},
            "bars": [
                {
                    "against": label,
                    "bar": bar,
                    "ratio": least[label] / least["ours"],
                    "ratio_of_medians": median[label] / median["ours"],
                }
                for label, bar in self.bars
            ],
        }

    def line(self) -> str:
        r = self.result
        times = "  ".join(f"{label} {t:.3f}" for label, t in r["min_ms"].items())
        bars = "  ".join(
            f"{b['ratio']:.2f}/{b['ratio_of_medians']:.2f}x {b['against']}"
            f" (bar {b['bar']:.2f}{'' if b['ratio'] >= b['bar'] else ', MISSED'})"
            for b in r["bars"]
        )
        return f"{r['threads']}t {r['op']:18} {r['shape']:28} ms: {times}\n{'':6}{bars}"


def close(ours: torch.Tensor, want: torch.Tensor, relative: float) -> None:
    """Raise unless |ours - want| <= relative * max |want|."""
    error = float((ours.double() - want.double()).abs().max() / want.double().abs().max())
    if not error <= relative:
        raise SystemExit(f"wrong result: error {error:.1e} of the largest, allowed {relative:.0e}")
