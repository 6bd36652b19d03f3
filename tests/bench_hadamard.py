"""hadamard against torch.clone of the same bytes: python tests/bench_hadamard.py [--threads N]

Targets: <= 1.5 x clone for powers of two, <= 2.5 x for m 2^k. Median of repeats, float32, 2^23
numbers; the result is checked first.
"""

import argparse
import statistics
import time

import torch

from fewbit import _C, ops
from fewbit.hadamard import hadamard_matrix, plan, transform

WIDTHS = [128, 1024, 4096, 8192, 16384, 32768, 768, 2560, 3072, 4864, 5632, 11008, 14336, 18944]


def median_ms(run, repeats=21):
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    print(f"{_C.isa()}, {torch.get_num_threads()} threads")
    print("width  m    clone ms  hadamard ms  ratio  target")
    for n in WIDTHS:
        p = plan(n)
        base = None if p.m == 1 else hadamard_matrix(p.m)
        x = torch.randn(2**23 // n, n)
        want = transform(x[:4].double(), p)
        assert (ops.hadamard(x[:4], base) - want).abs().max() < 1e-5 * want.abs().max()
        copy = median_ms(x.clone)
        ours = median_ms(lambda x=x, base=base: ops.hadamard(x, base))
        target = 1.5 if p.m == 1 else 2.5
        print(f"{n:5}  {p.m:3}  {copy:8.2f}  {ours:11.2f}  {ours / copy:5.2f}  {target}")


if __name__ == "__main__":
    main()
