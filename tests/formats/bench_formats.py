"""Speed of packing and unpacking, in GB/s of the float16 weight that the codes stand for.

    python tests/formats/bench_formats.py [--rows 4096] [--columns 4096]

One thread, median of 7 in CPU time, each result checked first. The bar is 1 GB/s a core; a copy of
the same float16 bytes is measured beside it.
"""

import argparse
import statistics
import time

import torch
from strategies import random_codes, same

from fewbit import formats
from fewbit.scheme import Scheme

W8A8 = Scheme(8, -1, True, activation_bits=8)
CASES = [
    ("compressed-tensors", Scheme(4, 128)),
    ("compressed-tensors", Scheme(3, 128)),
    ("compressed-tensors", Scheme(8, 128)),
    ("int-quantized", W8A8),
    ("awq", Scheme(4, 128)),
    ("gptq", Scheme(4, 128, True)),
    ("gptq_v2", Scheme(2, 128)),
    ("gptq_v2", Scheme(3, 128)),
    ("gptq", Scheme(8, 128, True)),
    ("llm-int8", W8A8),
    ("smooth_quant", W8A8),
]


def seconds(call):
    times = []
    for _ in range(7):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    args = parser.parse_args()
    torch.set_num_threads(1)
    n, k = args.rows, args.columns
    gigabytes = 2 * n * k / 1e9
    w = torch.randn(n, k).half()
    print(f"{'copy of float16':32} {gigabytes / seconds(w.clone):6.2f} GB/s")
    for name, scheme in CASES:
        format, codes = formats.get(name), random_codes(n, k, scheme, low=1)
        stored = format.pack(codes, scheme)
        assert same(format.unpack(stored, scheme)[:1], codes[:1])
        rates = [
            gigabytes / seconds(lambda f=format, c=codes, s=scheme: f.pack(c, s)),
            gigabytes / seconds(lambda f=format, t=stored, s=scheme: f.unpack(t, s)),
        ]
        print(f"{name + ' ' + str(scheme):32} {rates[0]:6.2f} pack {rates[1]:6.2f} unpack GB/s")


if __name__ == "__main__":
    main()
