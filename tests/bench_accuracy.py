"""RTN and AWQ on the shared models: perplexity, and the output loss of every decoder layer.

    python tests/bench_accuracy.py [--models opt-tiny ...] [--schemes w4a16g128 ...] [--json FILE]

Protocol: models in float32, text encoded without special tokens, the first 64 windows of 256
tokens, no overlap, no BOS; calibration on the first 32 windows of 256 tokens of
books_calibration.txt. The layer loss is ||y' - y||^2 / ||y||^2 of the decoder layer's output minus
its input (what the layer adds), float inputs, that layer alone quantised. Exits with 1 when AWQ's
scaled linears, which its search minimises (||X (W' - W)^T||^2 summed over the linears that share an
input), lose to RTN's anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

import fewbit
from conftest import SHARED
from fewbit import calibrate, checkpoint
from fewbit.families import decoder_layers, describe

MODELS = ["opt-tiny", "opt-tiny-outliers", "llama-tiny", "llama-tiny-outliers"]
TEXTS = ["books_test", "wikitext2_raw_test"]
WINDOW, WINDOWS, SAMPLES = 256, 64, 32


def calibration(tokenizer) -> calibrate.Windows:
    path = SHARED / "data" / "books_calibration.txt"
    return calibrate.windows(path, tokenizer, WINDOW, SAMPLES)


@torch.no_grad()
def layer_losses(model, method: str, scheme: str, data: calibrate.Windows) -> list[float]:
    """Relative output loss of each decoder layer, that layer alone quantised."""
    family, float_outputs = describe(model), []
    inputs = calibrate.capture(model, family, calibrate.Windows(data.batches[:8]))
    trail = [inputs]
    for layer in decoder_layers(model):
        trail.append(calibrate.run_layer(layer, trail[-1]))
        pairs = zip(trail[-2], trail[-1], strict=True)
        float_outputs.append([b.hidden - a.hidden for a, b in pairs])
    recipe = fewbit.recipes.build(method, scheme)
    parallel = fewbit.Recipe(method, recipe.scheme, recipe.transforms, recipe.solver, False)
    fewbit.quantize_(model, parallel, calibration=data, progress=False)
    losses = []
    for i, layer in enumerate(decoder_layers(model)):
        outputs = calibrate.run_layer(layer, trail[i])
        error = energy = 0.0
        for x, y, want in zip(trail[i], outputs, float_outputs[i], strict=True):
            error += float((y.hidden - x.hidden - want).square().sum())
            energy += float(want.square().sum())
        losses.append(error / energy)
    fewbit.restore_(model)
    return losses


def measure(name: str, schemes: list[str], texts: list[str]) -> list[dict]:
    path = SHARED / "models" / name
    model, tokenizer = checkpoint.load_float(path), checkpoint.load_tokenizer(path)
    data = calibration(tokenizer)
    tokens = {
        text: calibrate.tokenize(calibrate.read_text(SHARED / "data" / f"{text}.txt"), tokenizer)
        for text in texts
    }

    def perplexities() -> dict:
        return {t: float(fewbit.perplexity(model, tokens[t], WINDOW, limit=WINDOWS)) for t in texts}

    rows = [{"model": name, "method": "float", "scheme": "", **perplexities()}]
    for scheme in schemes:
        for method in ("rtn", "awq"):
            losses = layer_losses(model, method, scheme, data)
            report = fewbit.quantize_(model, method, scheme, data, progress=False)
            row = {"model": name, "method": method, "scheme": scheme, **perplexities()}
            searched = [r for r in report.transforms if "rtn_loss" in r]
            ratios = [r["loss"] / r["rtn_loss"] for r in searched if r["rtn_loss"] > 0]
            row |= {"layer_losses": losses, "seconds": report.seconds, "edge_ratios": ratios}
            rows.append(row)
            fewbit.restore_(model)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--schemes", nargs="+", default=["w4a16g128", "w3a16g128"])
    parser.add_argument("--texts", nargs="+", default=TEXTS)
    parser.add_argument("--json")
    options = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit(f"shared models and texts are not at {SHARED} (set FEWBIT_SHARED)")
    everything, worse = [], []
    head = "".join(f"{t:>22}" for t in options.texts)
    print(f"{'model':<22}{'method':<8}{'scheme':<12}{head}{'layer losses':>16}")
    for name in options.models:
        rows = measure(name, options.schemes, options.texts)
        everything += rows
        for row in rows:
            figures = "".join(f"{row[t]:>22.2f}" for t in options.texts)
            losses = " ".join(f"{v:.1e}" for v in row.get("layer_losses", []))
            label = f"{name:<22}{row['method']:<8}{row['scheme']:<12}"
            print(f"{label}{figures}   {losses}", flush=True)
        for scheme in options.schemes:
            rtn, awq = (
                next(r for r in rows if r["method"] == m and r["scheme"] == scheme)
                for m in ("rtn", "awq")
            )
            worst = max(awq["edge_ratios"])
            print(f"  {scheme}: AWQ / RTN loss of scaled linears, worst edge {worst:.4f}")
            if worst > 1:
                worse.append(f"{name} {scheme}: an edge's loss is {worst:.4f} of RTN's")
            for i, (a, b) in enumerate(zip(awq["layer_losses"], rtn["layer_losses"], strict=True)):
                if a > b:
                    print(f"  {scheme}: decoder layer {i} as a whole: {a / b:.4f} of RTN's loss")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as stream:
            json.dump(everything, stream, indent=1)
    print("\n".join(worse) or "AWQ's searched loss is at most RTN's on every edge")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
