"""AWQ search of one 4096 x 4096 linear: time against the published loop in eager torch, and loss.

Run: python tests/bench_search_scale.py [size] [tokens] [repeats]. Our time holds the statistics
too. Asserts that the chosen scale's exact loss is no higher than the full grid's.
"""

import json
import sys
import time

import torch

from fewbit import ops
from fewbit.scheme import Scheme
from fewbit.stats import Stats
from fewbit.transforms.race import Block, full_loss, race
from fewbit.transforms.scale import awq_scale

POINTS = 20


def problem(size, tokens, seed):
    """A weight, and inputs with a few large channels, correlated by a low-rank mix."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(size, size, generator=g) * 0.02
    w *= torch.rand(size, 1, generator=g) + 0.5
    level = torch.randn(size, generator=g).mul(0.7).exp()
    level[torch.randint(size, (max(size // 200, 1),), generator=g)] *= 20
    mix = torch.randn(tokens, 32, generator=g) @ torch.randn(32, size, generator=g) * 0.2
    return w, (torch.randn(tokens, size, generator=g) + mix) * level


def eager(w, x, scheme):
    """The published search: quantise, multiply, compare outputs, for each of the 20 ratios."""
    group, top = scheme.group_size, 2**scheme.bits - 1
    reference, mean = x @ w.T, x.abs().mean(0)
    losses = []
    for i in range(POINTS):
        s = mean.clamp(min=1e-4).pow(i / POINTS)
        s = s / (s.max() * s.min()).sqrt()
        v = (w * s).reshape(-1, group)
        lo, hi = v.amin(1, True).clamp(max=0), v.amax(1, True).clamp(min=0)
        step = (hi - lo).clamp(min=1e-5) / top
        zero = (-(lo / step).round()).clamp(0, top)
        q = (((v / step).round() + zero).clamp(0, top) - zero) * step
        losses.append(float((x @ (q.reshape(w.shape) / s).T - reference).pow(2).mean()))
    return losses


def ours(w, stats, scheme):
    scales = [awq_scale(stats.mean_abs, i / POINTS) for i in range(POINTS)]
    return race(scales, [Block(w, stats)], scheme), scales


def main(size=4096, tokens=2048, repeats=3):
    scheme = Scheme(4, 128, scale_dtype="float32")
    rows = []
    for seed in range(repeats):
        w, x = problem(size, tokens, seed)
        begin = time.perf_counter()
        gram = torch.zeros(size, size)
        ops.gram(x, gram)
        stats = Stats(tokens, x.abs().sum(0), x.abs().amax(0), gram)
        start = time.perf_counter()
        eager(w, x, scheme)
        middle = time.perf_counter()
        result, scales = ours(w, stats, scheme)
        end = time.perf_counter()
        spent = end - middle + start - begin
        full = [full_loss(Block(w, stats), s, scheme) for s in scales]
        assert full[result.best] <= min(full), (result.best, full)
        rows.append({
            "eager_s": middle - start, "fewbit_s": spent, "of_it_gram_s": start - begin,
            "ratio": spent / (middle - start), "best": result.best / POINTS,
            "measured_in_full": sum(result.exact),
        })
    rows.sort(key=lambda r: r["ratio"])
    print(json.dumps({"size": size, "tokens": tokens, "threads": torch.get_num_threads(),
                      "median": rows[len(rows) // 2], "all": rows}, indent=1))
    return rows[len(rows) // 2]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
