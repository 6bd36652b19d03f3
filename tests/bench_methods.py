"""The papers' orders on small trained models with activation outliers: perplexities as a table.

    python tests/bench_methods.py [MODEL ..] [--seeds 0 1 2] [--results FILE] [--text held-out]
    python tests/bench_methods.py --results FILE --write    # for scripts/accuracy_table.py

Protocol: small_models.py. ``--results`` keeps what was measured, and another call goes on where
this one stopped. Exit status 1 when an order does not hold.

The "-outliers" models multiply six channels a norm by 20 to 60 and divide the columns that read
them, so salient columns lie far below the step of their group, where large models' salient columns
are of ordinary size. Two statements are therefore looked at where they can hold: 2 as a good scale
on "-mild" (2 to 6 times), and a sweet spot among larger scales on "-outliers". What 3 bits do to a
model of this size without any outlier no salient column can win back; so there are rows at 4 bits,
where that is little, and for the part that outliers cause. Scales act on the linears that read a
norm, where the outliers are and where a scale folds away; the exercise's form, on every linear, is
the row below.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

import small_models
from fewbit import lab
from fewbit.families import describe
from fewbit.pipeline import quantize_
from fewbit.recipes import Recipe
from fewbit.scheme import Scheme
from fewbit.undo import remember, restore_

MODELS = ["opt-tiny-outliers", "llama-tiny-outliers", "opt-tiny-mild", "llama-tiny-mild"]
SCALES = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
EVERYWHERE = 2.0
ALPHAS = (0.3, 0.5, 0.7, 0.85)
TENSOR = Scheme.parse("w8a8", activations="tensor")
W3, W4 = "w3a16g128", "w4a16g128"
STORED = Path(__file__).resolve().parent / "results" / "methods.json"


@torch.no_grad()
def scaled_up(bench, factor, everywhere):
    """Exercise 1's simulation on the decoder's linears: salient 1 % times a factor, 3 bits."""
    family = describe(bench.model)
    writers = tuple(sub.writes for sub in family.sublayers)
    features = lab.get_calib_feat(bench.model, None, bench.calibration.batches)
    remember(bench.model)
    for name, m in bench.model.named_modules():
        if name.startswith(family.layers) and isinstance(m, torch.nn.Linear):
            one, scaled = torch.nn.ModuleDict({"m": m}), everywhere or not name.endswith(writers)
            lab.pseudo_quantize_model_weight_scaleup(
                one, 3, 128, {"m": features[name]}, factor if scaled else 1.0
            )


def rows(name: str) -> dict:
    """By label: a function that changes the model of a bench; "-mild" is there for the scales."""
    def method(recipe, scheme, **options):
        return lambda bench: quantize_(
            bench.model, recipe, scheme, bench.calibration, progress=False, **options
        )

    found = {"float": lambda bench: remember(bench.model), "w3 rtn": method("rtn", W3)}
    for by in ("random", "weight", "hessian", "activation"):
        found[f"w3 1 % by {by}"] = method("mixed", W3, by=by)
    found["w3 2.4 % by activation"] = method("mixed", W3, fraction=0.024)
    if not name.endswith("-mild"):
        found["w3 gptq"] = method("gptq", W3)
        found["w3 1 % by activation, gptq"] = method("mixed+gptq", W3)
        found["w4 rtn"] = method("rtn", W4)
        found["w4 1 % by activation"] = method("mixed", W4)
        found["w4 2.4 % by activation"] = method("mixed", W4, fraction=0.024)
    for factor in SCALES:
        found[f"w3 scale {factor:g}"] = lambda bench, f=factor: scaled_up(bench, f, False)
    found[f"w3 scale {EVERYWHERE:g} everywhere"] = lambda bench: scaled_up(bench, EVERYWHERE, True)
    for form in ("closed-times", "closed-over", "search", "duo"):
        found[f"w3 awq {form}, no clip"] = method("awq", W3, form=form, clip=False)
    found["w3 awq"] = method("awq", W3)
    if name.endswith("-mild"):
        return found
    found["w8a8 naive"] = method(Recipe("rtn", TENSOR), TENSOR)
    for alpha in (*ALPHAS, "auto"):
        found[f"w8a8 smooth {alpha}"] = method("smoothquant", TENSOR, alpha=alpha)
    return found


def clean_rounding(name, arguments, results):
    """Perplexity of rounding to 3 bits of the model without outliers."""
    def compute():
        bench = small_models.load(name, 0, arguments.text)
        rows(name)["w3 rtn"](bench)
        return bench.score(arguments.windows)

    key = f"{name}, {arguments.text}, {arguments.windows} windows, w3 rtn"
    return results.get(key, compute)


def measure(name, arguments, results):
    """By row: perplexities over the seeds."""
    table = {label: [] for label in rows(name)}
    for seed in arguments.seeds:
        bench = None
        for label, change in rows(name).items():
            key = f"{name} {seed}, {arguments.text}, {arguments.windows} windows, {label}"
            if key not in results.values:
                bench = bench or small_models.load(name, seed, arguments.text)
                change(bench)
                results.put(key, bench.score(arguments.windows))
                restore_(bench.model)
            table[label].append(results.values[key])
            print(f"{key}: {results.values[key]:.2f}", file=sys.stderr, flush=True)
    return table


def orders(name, row, clean):
    """The papers' statements, each with whether it holds, by means over seeds; and the shares of
    the loss that salient columns win back. ``clean``: rounding to 3 bits without outliers."""
    scales = {s: row[f"w3 scale {s:g}"] for s in SCALES}
    rtn, base = row["w3 rtn"], row["float"]
    won = {by: (rtn - row[f"w3 1 % by {by}"]) / (rtn - base) for by in ("activation", "random")}
    shares = {
        "1 % by activation, of all that 3 bits lose": won["activation"],
        "1 % by activation, of what the outliers cause at 3 bits":
            (rtn - row["w3 1 % by activation"]) / (rtn - clean),
        "2.4 % by activation, of what the outliers cause at 3 bits":
            (rtn - row["w3 2.4 % by activation"]) / (rtn - clean),
    }
    held = {
        "rtn is worse than salient columns, the best scale and awq": rtn > max(
            row["w3 1 % by activation"], min(scales.values()), row["w3 awq"]
        ),
        "1 % by activation wins back more than three times what 1 % at random does":
            won["activation"] > 3 * max(won["random"], 0),
        "1 % at random wins back less than a tenth": won["random"] < 0.1,
        "scales have a sweet spot": SCALES[-1] > min(scales, key=scales.get)
        and min(scales.values()) < rtn,
        "awq is at least as good as the best fixed scale": row["w3 awq"] <= min(scales.values()),
    }
    if name.endswith("-mild"):
        held["scale 2 beats no scale"] = scales[2.0] < rtn
    else:
        w4 = {p: (row["w4 rtn"] - row[f"w4 {p} % by activation"]) / (row["w4 rtn"] - base)
              for p in ("1", "2.4")}
        shares |= {f"{p} % by activation, of all that 4 bits lose": v for p, v in w4.items()}
        held["at 4 bits the outliers' columns win back two thirds of the loss"] = (
            w4["2.4"] > 2 / 3
        )
        smooth = min(row[f"w8a8 smooth {a}"] for a in (*ALPHAS, "auto"))
        held["naive w8a8 collapses"] = row["w8a8 naive"] > 1.2 * base
        held["smoothquant at its sweet spot within 1 % of float"] = smooth < 1.01 * base
    return held, shares


def write(table, arguments):
    """What scripts/accuracy_table.py makes the README's table of."""
    found = {
        label: {name: row[label] for name, row in table.items() if row.get(label)}
        for label in rows(MODELS[0])
    }
    protocol = {"seeds": arguments.seeds, "windows": arguments.windows, "models": list(table)}
    STORED.write_text(json.dumps({**protocol, "rows": found}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--text", default="test", choices=small_models.TEXTS)
    parser.add_argument("--results", help="a JSON file to go on from")
    parser.add_argument("--write", action="store_true", help=f"put the figures into {STORED.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = small_models.Results(arguments.results)
    table = {name: measure(name, arguments, results) for name in arguments.models}
    print(f"\nmean over outlier seeds {arguments.seeds}\n" + "".join(f"{n:>22}" for n in table))
    for label in rows(MODELS[0]):
        means = (statistics.mean(row[label]) if row.get(label) else None for row in table.values())
        print("".join(f"{'' if m is None else f'{m:.2f}':>22}" for m in means) + f"   {label}")
    if arguments.write:
        write(table, arguments)
    good = True
    for name, row in table.items():
        clean = clean_rounding(name.rpartition("-")[0], arguments, results)
        held, shares = orders(name, {k: statistics.mean(v) for k, v in row.items()}, clean)
        print(f"\n{name}")
        for what, share in shares.items():
            print(f"  won back: {100 * share:.0f} %: {what}")
        for statement, holds in held.items():
            print(f"  {'holds' if holds else 'DOES NOT HOLD'}: {statement}")
        good &= all(held.values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
