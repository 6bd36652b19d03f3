"""The papers' orders on small trained models with activation outliers: perplexities as a table.

Run: python tests/bench_methods.py [model ..] [--windows 64] prints JSON, then Markdown; exit status
1 when an order does not hold. Protocol: books_test.txt, windows of 256 tokens, no overlap, no BOS;
calibration: the first 32 windows of 256 tokens of books_calibration.txt.
"""

import argparse
import json
import sys

import torch
import transformers

from conftest import SHARED
from fewbit import lab
from fewbit.calibrate import cut, read_text, tokenize
from fewbit.evaluate import perplexity
from fewbit.families import describe
from fewbit.pipeline import quantize_
from fewbit.recipes import Recipe
from fewbit.scheme import Scheme
from fewbit.undo import remember, restore_

SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
ALPHAS = (0.3, 0.5, 0.7, 0.85)
TENSOR = Scheme.parse("w8a8", activations="tensor")


def load(name):
    path = SHARED / "models" / name
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    test = tokenize(read_text(SHARED / "data/books_test.txt"), tokenizer)
    text = read_text(SHARED / "data/books_calibration.txt")
    return model, test, cut(tokenize(text, tokenizer), 256, 32, "books_calibration.txt")


@torch.no_grad()
def scaled_up(model, feat, factor):
    """Exercise 1's simulation on the decoder's linears: salient 1 % times a factor, 3 bits."""
    inside = {n: m for n, m in model.named_modules() if n.startswith(describe(model).layers)}
    for name, m in inside.items():
        if isinstance(m, torch.nn.Linear):
            holder = torch.nn.ModuleDict({"m": m})
            lab.pseudo_quantize_model_weight_scaleup(holder, 3, 128, {"m": feat[name]}, factor)


def measure(name, windows):
    model, test, data = load(name)

    def score():
        return float(perplexity(model, test, 256, limit=windows, batch=8))

    def method(recipe, scheme, **options):
        quantize_(model, recipe, scheme, data, progress=False, **options)
        value = score()
        restore_(model)
        return value

    rows = {"float": score(), "w3g128 rtn": method("rtn", "w3a16g128")}
    for by in ("activation", "hessian", "weight", "random"):
        rows[f"w3g128 1 % by {by}"] = method("mixed", "w3a16g128", by=by)
    feat = lab.get_calib_feat(model, None, data.batches)
    for factor in SCALES:
        remember(model)
        scaled_up(model, feat, factor)
        rows[f"w3g128 scale {factor:g}"] = score()
        restore_(model)
    rows["w3g128 awq"] = method("awq", "w3a16g128")
    rows["w3g128 awq clip"] = method("awq", "w3a16g128", clip=True)
    for form in ("duo", "closed-times", "closed-over"):
        rows[f"w3g128 awq {form}"] = method("awq", "w3a16g128", form=form)
    rows["w8a8 tensor naive"] = method(Recipe("rtn", TENSOR), TENSOR)
    for alpha in (*ALPHAS, "auto"):
        rows[f"w8a8 tensor smooth {alpha}"] = method("smoothquant", TENSOR, alpha=alpha)
    return rows


def orders(rows):
    """The papers' statements, each with whether it holds here."""
    scales = {s: rows[f"w3g128 scale {s:g}"] for s in SCALES}
    smooth = min(rows[f"w8a8 tensor smooth {a}"] for a in (*ALPHAS, "auto"))
    rtn, base = rows["w3g128 rtn"], rows["float"]
    kept = {by: rows[f"w3g128 1 % by {by}"] for by in ("activation", "random")}
    return {
        "1 % by activation wins back more of the loss than 1 % at random":
            rtn - kept["activation"] > 3 * max(rtn - kept["random"], 0),
        "1 % at random wins back less than a tenth": rtn - kept["random"] < 0.1 * (rtn - base),
        "scale 2 beats scale 1": scales[2.0] < scales[1.0],
        "scales have a sweet spot": min(scales, key=scales.get) not in (1.0, SCALES[-1]),
        "awq at least as good as the best fixed scale": rows["w3g128 awq"] <= min(scales.values()),
        "naive w8a8 collapses": rows["w8a8 tensor naive"] > 1.2 * base,
        "smoothquant at its sweet spot within 1 %": smooth < 1.01 * base,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=["opt-tiny-outliers", "llama-tiny-outliers"])
    parser.add_argument("--windows", type=int, default=64)
    arguments = parser.parse_args()
    table = {name: measure(name, arguments.windows) for name in arguments.models}
    held = {name: orders(rows) for name, rows in table.items()}
    print(json.dumps({"perplexity": table, "orders": held}, indent=1))
    print("\n| | " + " | ".join(table) + " |\n|---|" + "---|" * len(table))
    for row in next(iter(table.values())):
        print(f"| {row} | " + " | ".join(f"{rows[row]:.2f}" for rows in table.values()) + " |")
    for order in next(iter(held.values())):
        print(f"| {order} | " + " | ".join(str(h[order]).lower() for h in held.values()) + " |")
    return 0 if all(all(h.values()) for h in held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
