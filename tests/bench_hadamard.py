"""hadamard against torch.clone of the same bytes: python tests/bench_hadamard.py [--threads N]
[--processor-time]

Targets: <= 1.5 x clone for powers of two, <= 2.5 x for m 2^k. float32, 2^23 numbers.
"""

import argparse
import time

import torch

import bench
from bench import Case, close, reuse_memory
from fewbit import _C, ops
from fewbit.hadamard import plan, transform

WIDTHS = [
    128, 512, 1024, 2048, 4096, 8192, 16384, 32768,
    768, 3072, 2560, 5120, 3584, 14336, 28672, 2304, 9216, 5632, 6656, 1920, 17408, 4864, 9728,
    6912, 27648, 8960, 17920, 18944, 29568, 10944, 2880, 11008, 13696, 15104,
]


def cases():
    for n in WIDTHS:
        p = plan(n)
        base = p.bases() if p.m > 1 else None
        x = torch.randn(2**23 // n, n)

        def check(x=x, base=base, p=p):
            close(ops.hadamard(x[:4], base), transform(x[:4].double(), p), 1e-5)

        contenders = {"ours": lambda x=x, base=base: ops.hadamard(x, base), "clone": x.clone}
        bar = 1.5 if p.m == 1 else 2.5
        shape = " x ".join(str(order) for order in (*p.orders, 2**p.k))
        kind = "" if p.exact else " Hartley"
        yield Case("hadamard", f"{len(x)}x{n} = {shape}{kind}", contenders, check,
                   [("clone", 1 / bar)])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--processor-time", action="store_true", help="on a machine not at rest")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.processor_time:
        bench.clock = time.process_time
    reuse_memory()
    print(_C.isa())
    for case in cases():
        case.run(arguments.rounds)
        print(case.line(), flush=True)


if __name__ == "__main__":
    main()
