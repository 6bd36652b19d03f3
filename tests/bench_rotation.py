"""What rotations do for 4-bit activations: perplexity and outliers, over seeds.

    python tests/bench_rotation.py [--seeds 3] [--windows 64] [--steps 60] [--models NAME ...]

Perplexity of the shared small models (../shared/models/README.md: books_test.txt, windows of 256
tokens, no BOS, float32) with per-token 4-bit activations and 4-bit weights, one scale per row.
Calibration: the first 32 windows of books_calibration.txt. Exits with 1 where an expected order
does not hold: RTN > QuaRot+RTN > QuaRot+GPTQ >= SpinQuant+GPTQ, by means over seeds.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch
import transformers

from fewbit.calibrate import cut, read_text, tokenize
from fewbit.evaluate import perplexity
from fewbit.pipeline import quantize_
from fewbit.recipes import METHODS, Recipe
from fewbit.rotation import outlier_ratios, rotate_
from fewbit.scheme import Scheme
from fewbit.solvers.rtn import RTN
from fewbit.transforms.activations import QuantizeActivations
from fewbit.transforms.rotate import Rotate
from fewbit.transforms.spinquant import SpinQuant

SHARED = Path(os.environ.get("FEWBIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
MODELS = ["opt-tiny-outliers", "llama-tiny-outliers"]


def load(name):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        SHARED / "models" / name, dtype=torch.float32
    )
    return model.eval().requires_grad_(False)


def tokens(name, file):
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHARED / "models" / name)
    return tokenize(read_text(SHARED / "data" / file), tokenizer)


def recipes(seed, steps):
    """(label, recipe, whether it depends on the seed) in the order of the table."""
    scheme, kv = Scheme.parse("w4a4"), Scheme.parse("w4a4kv4")
    gptq = METHODS["gptq"](scheme).solver
    last = QuantizeActivations()
    kinds = {"r1": "random-hadamard", "r2": "random-hadamard", "r4": "random-hadamard"}
    rotate = Rotate(**kinds, seed=seed)
    rotate_kv = Rotate(**kinds, r3="hadamard", seed=seed)
    learn = {"steps": steps, "seed": seed}
    return [
        ("RTN", Recipe("rtn", scheme, (last,), RTN()), False),
        ("GPTQ", Recipe("gptq", scheme, (last,), gptq), False),
        ("QuaRot+RTN", Recipe("quarot", scheme, (rotate, last), RTN()), True),
        ("QuaRot+GPTQ", Recipe("quarot+gptq", scheme, (rotate, last), gptq), True),
        ("SpinQuant+RTN",
         Recipe("spinquant", scheme, (SpinQuant(**learn, weights=True), last), RTN()), True),
        ("SpinQuant+GPTQ",
         Recipe("spinquant+gptq", scheme, (SpinQuant(**learn), last), gptq), True),
        ("QuaRot+GPTQ KV4", Recipe("quarot+gptq", kv, (rotate_kv, last), gptq), True),
    ]


def rotated(name):
    model = load(name)
    rotate_(model, r1="random-hadamard", r2="random-hadamard", r4="random-hadamard")
    return model


def outliers(name, ids):
    """Table of activation ratios before and after; True when each linear above 50 falls below 10
    by token. Over all numbers the norms of tokens differ, which no rotation changes: counted."""
    before, after = outlier_ratios(load(name), ids), outlier_ratios(rotated(name), ids)
    print(f"\n{name}: max / mean of the inputs, before -> after (all | by token | by channel)")
    for path, b in before.items():
        cells = " | ".join(f"{x:6.1f} -> {y:5.1f}" for x, y in zip(b, after[path], strict=True))
        print(f"  {path:44} {cells}")
    high = [path for path, b in before.items() if b[0] > 50]
    low = [path for path in high if after[path][0] < 10]
    print(f"  above 50 before: {len(high)} linears, below 10 after: {len(low)} over all numbers, "
          f"{sum(after[p][1] < 10 for p in high)} by token")
    return all(after[path][1] < 10 for path in high)


def table(name, arguments):
    test, calibration = tokens(name, "books_test.txt"), tokens(name, "books_calibration.txt")
    data = cut(calibration, 256, 32, "books_calibration.txt")
    score = {"window": 256, "limit": arguments.windows, "batch": 8}
    print(f"\n{name}: float {float(perplexity(load(name), test, **score)):.2f}", flush=True)
    means = {}
    for i, (label, _, seeded) in enumerate(recipes(0, arguments.steps)):
        values = []
        for seed in range(arguments.seeds if seeded else 1):
            model = load(name)
            recipe = recipes(seed, arguments.steps)[i][1]
            quantize_(model, recipe, calibration=data, keep_float=False, progress=False)
            values.append(float(perplexity(model, test, **score)))
        means[label] = statistics.mean(values)
        spread = f"+- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        shown = ", ".join(f"{v:.2f}" for v in values)
        print(f"  {label:16} {means[label]:10.2f} {spread:8} ({shown})", flush=True)
    order = ["RTN", "QuaRot+RTN", "QuaRot+GPTQ", "SpinQuant+GPTQ"]
    return all(means[a] >= means[b] for a, b in zip(order, order[1:], strict=False))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=MODELS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    good = True
    for name in arguments.models:
        ids = tokens(name, "books_test.txt")[: 8 * 256].reshape(8, 256)
        good &= outliers(name, ids)
        good &= table(name, arguments)
    print("\nall orders hold" if good else "\nan expected order does not hold")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
