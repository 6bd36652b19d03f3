"""Operators with arguments that make no sense: each call ends in a result or a Python exception.

    python tests/faults/fuzz_ops.py --calls 100000 --seed 1 [--device cuda]

Starts from a valid call of every operator and changes one to three arguments: numbers at the ends
of their range, tensors of another type, shape, stride, device or content, text and None. A crash
ends this process with a signal; ``--trace`` prints every call before it is made, so that the last
line is the culprit. ``scripts/sanitize.sh`` runs it under AddressSanitizer, which sees what a crash
does not show.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fewbit import ops  # noqa: E402
from test_devices import arguments  # noqa: E402

INTEGERS = [
    0, 1, -1, 2, 3, -7, 5, 7, 8, 9, 16, 17, 33, 64, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32 + 1,
    2**40, 2**62, 2**63 - 1, -(2**63),
]  # fmt: skip
FLOATS = [0.0, -1.0, 1e-38, 1e38, float("inf"), float("nan"), -float("inf")]
TEXTS = ["", "float64", "float16", "int8", "in_order", "x" * 300, "\0"]
TYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8,
    torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


def other_tensor(t: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """``t``, changed in one way."""
    size = draw.choice([0, 1, 2, 3, 7, 63, 65])
    changes = [
        lambda: t.to(draw.choice(TYPES)),
        lambda: t.flatten(),
        lambda: t[None],
        lambda: t.mT if t.dim() > 1 else t[::2],
        lambda: t[:size],
        lambda: t[..., :size],
        lambda: t[..., ::2],
        lambda: torch.cat([t, t], -1) if t.dim() else t,
        lambda: torch.cat([t, t]) if t.dim() else t,
        lambda: t.new_zeros(()),
        lambda: t.new_zeros(0),
        lambda: t.new_zeros(size, 0),
        lambda: t.new_zeros(1).expand(t.shape),
        lambda: t.to(draw.choice(["meta", "cpu"])),
        lambda: t.to_sparse(),
        lambda: torch.nn.Parameter(t.clone()) if t.is_floating_point() else t.neg(),
        lambda: torch.full_like(t, draw.choice(FLOATS if t.is_floating_point() else [0, 1, 127])),
        lambda: t + draw.choice([1, 2**20, -(2**40)]) if t.dtype == torch.int64 else t * 0,
        lambda: draw.choice(list(t.view(-1))) if t.numel() else t,
    ]
    return draw.choice(changes)()


def other(value, draw: random.Random):
    """Something else in the place of an argument."""
    if draw.random() < 0.08:
        return draw.choice([None, "x", 1, 1.5, [], torch.zeros(2), object()])
    if isinstance(value, torch.Tensor):
        return other_tensor(value, draw)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice(INTEGERS)
    if isinstance(value, float):
        return draw.choice(FLOATS)
    if isinstance(value, str):
        return draw.choice(TEXTS)
    return draw.choice([None, torch.randn(draw.choice([1, 20, 64])), torch.arange(3)])


def shown(value) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"<{value.dtype} {list(value.shape)} {value.layout} {value.device}>"


def run(
    calls: int, seed: int, trace: bool = False, device: str = "cpu", without: Sequence[str] = ()
) -> tuple[int, int]:
    """Make the calls on ``device``; how many gave a result, and how many an exception."""
    draw, done, refused = random.Random(seed), 0, 0
    torch.manual_seed(seed)
    names = sorted(set(arguments()) - set(without))
    for number in range(calls):
        name = names[number % len(names)]
        given = tree_map_only(torch.Tensor, lambda t: t.to(device), list(arguments()[name]))
        for at in draw.sample(range(len(given)), min(len(given), draw.choice([1, 1, 1, 2, 3]))):
            try:
                given[at] = other(given[at], draw)
            except Exception:  # torch itself refuses the change
                continue
        if trace:
            print(name, *map(shown, given), flush=True)
        try:
            getattr(ops, name)(*given)
        except AssertionError:
            raise
        except Exception:
            refused += 1
        else:
            done += 1
    return done, refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--without", nargs="+", default=[], metavar="OP")
    parser.add_argument("--trace", action="store_true")
    options = parser.parse_args()
    faulthandler.enable()
    faulthandler.dump_traceback_later(600 + options.calls // 10, exit=True)  # an endless loop
    if "libasan" not in Path("/proc/self/maps").read_text():  # it maps terabytes for itself
        size = 8 << 30
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    done, refused = run(options.calls, options.seed, options.trace, options.device,
                        options.without)  # fmt: skip
    print(f"{done} results, {refused} exceptions, nothing else")


if __name__ == "__main__":
    main()
