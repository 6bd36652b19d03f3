"""What the CUDA kernels cost, counted without a card: python tests/bench_cuda_costs.py

The interpreter of ptx.py runs every kernel and counts, for each element that the op is about: the
instructions that warps issue, the bytes asked for over those of the sectors touched, and the passes
that an access to shared memory takes (1: no bank conflicts). From them and from what the op must
move follows a bound that needs no clock: issuing takes so much of the time that memory takes. Above
1, a kernel cannot reach the card's bandwidth, however well it hides latency.

An instruction of PTX is counted as what it becomes in machine code (WEIGHTS: read off nvdisasm's
listings of kernels that hold little else; whole kernels come to 0.7 to 1.1 of it). Cards: NVIDIA's
data sheets, clocks as they hold them under load, 0.85 of the memory rate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fewbit import ops
from fewbit.hadamard import plan
from ptx import WARP, Cards, compile_ptx
from test_cuda_build import FLAGS, SOURCES, tool

# Multiprocessors, clock, bytes a second; four warps issue in each cycle.
CARDS = {
    "T4": (40, 1.35e9, 320e9 * 0.85),
    "A100": (108, 1.41e9, 2039e9 * 0.85),
    "H100": (132, 1.7e9, 3350e9 * 0.85),
}
FREE = ("mov", "cvta", "abs", "neg")  # addresses of parameters, modifiers of operands
WEIGHTS = {
    "div.s64": 80, "div.u64": 70, "rem.s64": 80, "rem.u64": 70, "div.s32": 18, "div.u32": 14,
    "rem.s32": 18, "rem.u32": 14, "div.rn.f32": 9, "sqrt.rn.f32": 8, "rcp.rn.f32": 8,
    "mul.lo.s64": 4, "mul.hi.s64": 10, "min.s64": 4, "max.s64": 4,
}  # fmt: skip


def weight(opcode: str) -> int:
    if opcode.split(".")[0] in FREE or "param" in opcode or opcode.endswith(".pred"):
        return 0
    if opcode in WEIGHTS:
        return WEIGHTS[opcode]
    return 2 if opcode.endswith(("s64", "u64", "b64")) and "." in opcode else 1


@dataclass
class Case:
    name: str
    elements: int
    moved: float  # bytes that the op must move for each
    most: float  # instructions for each: a kernel that needs more has lost something
    call: Callable[[], object]
    architecture: int = 75


@dataclass
class Cost:
    case: Case
    instructions: float  # for each element
    useful: float  # bytes asked for over bytes of the sectors touched
    passes: float  # over shared memory's banks, for each access

    def bound(self, card: str) -> float:
        """Time that issuing takes over the time that memory takes."""
        processors, clock, rate = CARDS[card]
        issue = self.instructions / (processors * 4 * WARP * clock)
        return issue / (self.case.moved / rate)


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    w = torch.randn(256, 4096).half()
    n = w.numel()
    codes = ops.quantize(w, 4, 128, False, "float16")
    packed = ops.pack(*codes, 4, 128)
    yield Case("quantize, group 128", n, 3, 20.5, lambda: ops.quantize(w, 4, 128))
    yield Case("pseudo_quantize, group 128", n, 4, 22.5, lambda: ops.pseudo_quantize(w, 4, 128))
    yield Case("dequantize", n, 3, 10, lambda: ops.dequantize(*codes, 128, "float16"))
    yield Case("pack", n, 1.5, 7, lambda: ops.pack(*codes, 4, 128))
    yield Case("unpack", n, 1.5, 4, lambda: ops.unpack(*packed, 256, 4096, 4, 128))

    x = torch.randn(48, 4096).half()
    stats = torch.zeros(4096, dtype=torch.float64), torch.zeros(4096)
    yield Case("act_stats", x.numel(), 2, 16, lambda: ops.act_stats(x, *stats))
    yield Case("quantize_per_token", x.numel(), 3, 22, lambda: ops.quantize_per_token(x))
    weight_of_norm = torch.ones(4096)
    yield Case("norm_quantize", x.numel(), 3, 25, lambda: ops.norm_quantize(x, weight_of_norm))
    for width, most, most_codes in [(128, 19, 31), (4096, 27, 39), (8192, 31, 43),
                                    (14336, 72, 95), (11008, 122, 148)]:  # fmt: skip
        row = torch.randn(24 * 4096 // width if width < 4096 else 24, width).half()
        p = plan(width)
        bases = p.bases() if p.m > 1 else None
        yield Case(f"hadamard, {width}", row.numel(), 4, most, lambda x=row, b=bases:
                   ops.hadamard(x, b))  # fmt: skip
        yield Case(f"hadamard_quantize, {width}", row.numel(), 3, most_codes, lambda x=row, b=bases:
                   ops.hadamard_quantize(x, b))  # fmt: skip

    eights = ops.pack(*ops.quantize(w, 8, -1, True), 8, -1)
    for m, most in [(1, 4.4), (16, 4.7), (64, 12.4)]:
        row = torch.randn(m, 4096).half()
        for architecture in (75, 80):
            yield Case(f"w4a16_linear, M={m}, sm_{architecture}", n, 0.52, most, lambda x=row:
                       ops.w4a16_linear(x, *packed, None, 256), architecture)  # fmt: skip
    for m, most in [(16, 4.4), (64, 12.1)]:
        row = torch.randn(m, 4096).half()
        for architecture in (75, 80):
            yield Case(f"w8a8_linear, M={m}, sm_{architecture}", n, 1.0, most, lambda x=row:
                       ops.w8a8_linear(x, *eights, None, 256), architecture)  # fmt: skip


def measure(case: Case, folder: Path) -> Cost:
    with Cards(folder, case.architecture, counting=True) as cards:
        case.call()
    if cards.problems:
        raise RuntimeError(f"{case.name}: {cards.problems[0]}")
    counts = [counts for counts in cards.costs.values()]
    issued = sum(weight(k) * v for c in counts for k, v in c.opcodes.items())
    total = {k: sum(getattr(c, k) for c in counts) for k in ("sectors", "bytes", "passes", "turns")}
    return Cost(
        case, issued * WARP / case.elements, total["bytes"] / (32 * total["sectors"]),
        total["passes"] / max(total["turns"], 1),
    )  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for architecture in (75, 80):
            compile_ptx(tool("nvcc"), SOURCES, architecture, FLAGS[:4], folder)
        print(f"{'':34} instructions  useful  passes  issue over memory: " + "  ".join(CARDS))
        for case in cases():
            cost = measure(case, folder)
            bounds = "  ".join(f"{cost.bound(card):.2f}" for card in CARDS)
            print(f"{case.name:34} {cost.instructions:12.1f} {cost.useful:7.2f} {cost.passes:7.2f}"
                  f"  {'':19}{bounds}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
