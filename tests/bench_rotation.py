"""What rotations do for 4-bit activations: perplexity and outliers, over seeds.

    python tests/bench_rotation.py [--models NAME ..] [--seeds N ..] [--rows LABEL ..]
        [--results FILE] [--text held-out] [--plot FILE.png]
        [--write]    # the figures, for scripts/accuracy_table.py
    python tests/bench_rotation.py --sweep [--results FILE]   # SpinQuant's options and optimisers

Per-token 4-bit activations and 4-bit weights with one scale per row; protocol: small_models.py.
With ``--results`` what was measured is kept, and another call goes on where this one stopped; so
pieces (``--models``, ``--rows``, ``--seeds``) can run on their own. ``--sweep`` chooses SpinQuant's
options, on text that is neither calibrated on nor tested. Exits with 1 where an expected
order does not hold: RTN > QuaRot+RTN > QuaRot+GPTQ >= SpinQuant+GPTQ, by means over seeds, or where
an input whose largest number was above 50 times the mean stays above 10 by token.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

import small_models
from fewbit.pipeline import quantize_
from fewbit.recipes import METHODS, Recipe
from fewbit.rotation import outlier_ratios, rotate_
from fewbit.scheme import Scheme
from fewbit.solvers.rtn import RTN
from fewbit.transforms.activations import QuantizeActivations
from fewbit.transforms.rotate import Rotate
from fewbit.transforms.spinquant import SpinQuant

MODELS = ["opt-tiny-outliers", "llama-tiny-outliers"]
KIND = "random-hadamard"
ORDER = ["RTN", "QuaRot+RTN", "QuaRot+GPTQ", "SpinQuant+GPTQ"]
UNSEEDED = ("RTN", "GPTQ")
STORED = Path(__file__).resolve().parent / "results" / "rotation.json"
# What SpinQuant may be told, one change at a time from its defaults; scored with GPTQ.
SWEEP = {
    "defaults": {},
    "ranges only": {"steps": 0},
    "network only": {"range_steps": 0},
    "network only, Cayley SGD": {"range_steps": 0, "optimizer": "cayley-sgd"},
    "network only, Cayley SGD, cross-entropy (the paper)": {
        "range_steps": 0, "optimizer": "cayley-sgd", "loss": "ce"},
    "ranges and network, Cayley SGD": {"optimizer": "cayley-sgd"},
    "cross-entropy": {"loss": "ce"},
    "quantised weights": {"weights": True},
    "1000 range steps": {"range_steps": 1000},
    "60 steps": {"steps": 60},
    "lr 0.003": {"lr": 0.003},
}


def recipes(seed: int) -> dict[str, Recipe]:
    """By label, in the order of the table."""
    scheme, kv = Scheme.parse("w4a4"), Scheme.parse("w4a4kv4")
    rtn, gptq = RTN(), METHODS["gptq"](scheme).solver
    last = QuantizeActivations()
    kinds = {"r1": KIND, "r2": KIND, "r4": KIND, "seed": seed}
    quarot, quarot_kv = Rotate(**kinds), Rotate(**kinds, r3="hadamard")
    spin_rtn = SpinQuant(seed=seed, weights=True)
    spin, spin_kv = SpinQuant(seed=seed), SpinQuant(seed=seed, r3="hadamard")
    rows = {
        "RTN": (scheme, (last,), rtn),
        "GPTQ": (scheme, (last,), gptq),
        "QuaRot+RTN": (scheme, (quarot, last), rtn),
        "QuaRot+GPTQ": (scheme, (quarot, last), gptq),
        "SpinQuant+RTN": (scheme, (spin_rtn, last), rtn),
        "SpinQuant+GPTQ": (scheme, (spin, last), gptq),
        "QuaRot+GPTQ KV4": (kv, (quarot_kv, last), gptq),
        "SpinQuant+GPTQ KV4": (kv, (spin_kv, last), gptq),
    }
    return {label: Recipe(label, *parts) for label, parts in rows.items()}


def measure(name: str, label: str, seed: int, arguments) -> float:
    bench = small_models.load(name, text=arguments.text)
    recipe = recipes(seed)[label]
    quantize_(bench.model, recipe, calibration=bench.calibration, keep_float=False, progress=False)
    return bench.score(arguments.windows)


def table(
    name: str, arguments, results: small_models.Results
) -> tuple[bool, dict[str, list[float]]]:
    """Print the perplexities; whether the expected order holds in what was measured, and the
    values by row."""
    protocol = f"{name}, {arguments.text}, {arguments.windows} windows"
    base = results.get(
        f"{protocol}, float", lambda: small_models.load(name, text=arguments.text).score(
            arguments.windows)
    )
    print(f"\n{protocol}: float {base:.2f}", flush=True)
    print("| method | mean | spread | seeds |\n|---|---|---|---|")
    found = {"float": [base]}
    for label in arguments.rows:
        found[label] = values = [
            results.get(f"{protocol}, {label}, seed {seed}",
                        lambda seed=seed, label=label: measure(name, label, seed, arguments))
            for seed in ((0,) if label in UNSEEDED else arguments.seeds)
        ]
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        shown = ", ".join(f"{v:.2f}" for v in values)
        print(f"| {label} | {statistics.mean(values):.2f} | {spread} | {shown} |", flush=True)
    means = [statistics.mean(found[label]) for label in ORDER if label in found]
    return all(a >= b for a, b in zip(means, means[1:], strict=False)), found


def write(found: dict[str, dict[str, list[float]]], arguments) -> None:
    """What scripts/accuracy_table.py makes the README's table of."""
    rows = {label: {name: found[name][label] for name in found}
            for label in ("float", *arguments.rows)}
    protocol = {"seeds": arguments.seeds, "windows": arguments.windows, "models": list(found)}
    STORED.write_text(json.dumps({**protocol, "rows": rows}, indent=1) + "\n")


def sweep(name: str, arguments, results: small_models.Results) -> None:
    """Perplexity and seconds of SpinQuant+GPTQ on held-out text by option."""
    protocol = f"{name}, held-out, {arguments.windows} windows"
    print(f"\n{protocol}\n| SpinQuant+GPTQ | mean | spread | seconds |\n|---|---|---|---|")
    for label, options in SWEEP.items():
        values, seconds = [], []
        for seed in arguments.seeds:
            key = f"{protocol}, sweep {options}, seed {seed}"

            def both(label=label, seed=seed, options=options) -> list[float]:
                bench, started = small_models.load(name, text="held-out"), time.monotonic()
                spin = SpinQuant(seed=seed, **options)
                scheme = Scheme.parse("w4a4")
                solver = METHODS["gptq"](scheme).solver
                recipe = Recipe(label, scheme, (spin, QuantizeActivations()), solver)
                quantize_(bench.model, recipe, calibration=bench.calibration, keep_float=False,
                          progress=False)
                taken = time.monotonic() - started
                return [bench.score(arguments.windows), taken]

            value, taken = results.get(key, both)
            values.append(value), seconds.append(taken)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"| {label} | {statistics.mean(values):.2f} | {spread:.2f} | "
              f"{statistics.mean(seconds):.0f} |", flush=True)


def ratios(name: str) -> tuple[dict, dict]:
    bench = small_models.load(name)
    ids = bench.tokens[: 8 * 256].reshape(8, 256)
    before = outlier_ratios(bench.model, ids)
    rotate_(bench.model, r1=KIND, r2=KIND, r4=KIND)
    return before, outlier_ratios(bench.model, ids)


def outliers(name: str, plot: str | None) -> bool:
    """Table of activation ratios before and after; True when each linear above 50 falls below 10
    by token. Over all numbers the norms of tokens differ, which no rotation changes: counted."""
    before, after = ratios(name)
    print(f"\n{name}: max / mean of the inputs, before -> after")
    print("| linear | all numbers | by token | by channel |\n|---|---|---|---|")
    for path, b in before.items():
        pairs = zip(b, after[path], strict=True)
        print(f"| {path} | " + " | ".join(f"{x:.1f} -> {y:.1f}" for x, y in pairs) + " |")
    high = [path for path, b in before.items() if b[0] > 50]
    print(f"above 50 before: {len(high)} linears; below 10 after: "
          f"{sum(after[p][0] < 10 for p in high)} over all numbers, "
          f"{sum(after[p][1] < 10 for p in high)} by token")
    if plot:
        draw(name, before, after, plot)
    return all(after[path][1] < 10 for path in high)


def draw(name: str, before: dict, after: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for values, label in ((before, "as it is"), (after, "rotated")):
        axes.semilogy([v[1] for v in values.values()], "o-", label=label)
    axes.axhline(10, color="grey", linewidth=0.8)
    axes.set(title=name, xlabel="linear", ylabel="largest over mean input, by token")
    axes.legend()
    figure.savefig(path.replace(".png", f"-{name}.png"))
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(recipes(0)), choices=list(recipes(0)))
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--text", default="test", choices=small_models.TEXTS)
    parser.add_argument("--sweep", action="store_true", help="SpinQuant's options, held-out text")
    parser.add_argument("--results", help="a JSON file to go on from")
    parser.add_argument("--write", action="store_true", help=f"put the figures into {STORED.name}")
    parser.add_argument("--plot", help="FILE.png: one picture of the ratios per model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # every number is the same on any machine with the same libraries
    results = small_models.Results(arguments.results)
    if arguments.sweep:
        for name in arguments.models:
            sweep(name, arguments, results)
        return 0
    good, found = True, {}
    for name in arguments.models:
        held, found[name] = table(name, arguments, results)
        good &= held
    if arguments.write:
        write(found, arguments)
    for name in arguments.models:
        good &= outliers(name, arguments.plot)
    print("\nall orders hold" if good else "\nan expected order does not hold")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
