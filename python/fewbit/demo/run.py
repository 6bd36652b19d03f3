"""``fewbit demo``: the embedded model in 4 bits by RTN and by AWQ, measured before and after.

The model (trained by scripts/train_demo_model.py on text of our own) has activation outliers as
large models have them, so that rounding alone hurts it and activation-aware scales repair it. It is
far too small for its decode speed to say anything; speed is measured on one decoder layer of a
7B-parameter shape with random weights as well, and both are printed.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from torch import nn

from ..calibrate import tokenize
from ..checkpoint import load_float, load_tokenizer
from ..errors import MissingExtraError
from ..evaluate import perplexity, speed
from ..families import linear_names
from ..linear import PackedLinear
from ..pipeline import quantize_
from ..scheme import Scheme
from ..undo import restore_
from . import MODEL_DIR
from .text import CALIBRATION_SEED, EVALUATION_SEED, generate

SCHEME = "w4a16g128"
WINDOW = 256  # tokens; the perplexity protocol: WINDOWS of them, no overlap, no BOS
WINDOWS = 32
LAYER = [  # (out_features, in_features) of a 7B Llama-type decoder layer
    (4096, 4096), (4096, 4096), (4096, 4096), (4096, 4096),
    (11008, 4096), (11008, 4096), (4096, 11008),
]  # fmt: skip


def run(output: Path) -> dict:
    """Quantise, measure, write ``demo.json`` and ``demo.png`` into ``output``; returns the figures.

    Raises MissingExtraError without transformers; without matplotlib the plot alone is missing, and
    the result says so.
    """
    output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_float(MODEL_DIR), load_tokenizer(MODEL_DIR)
    calibration, evaluation = generate(CALIBRATION_SEED, 60_000), generate(EVALUATION_SEED, 60_000)
    tokens = tokenize(evaluation, tokenizer)

    rows = [_row("float32", model, tokens)]
    for method in ("rtn", "awq"):
        report = quantize_(
            model, method, SCHEME, calibration, tokenizer, window=WINDOW, progress=False
        )
        rows.append(_row(f"{method} {SCHEME}", model, tokens, report.seconds))
        restore_(model)
    result = {
        "protocol": f"{WINDOWS} windows of {WINDOW} tokens, no overlap, no BOS",
        "rows": rows,
        "layer": layer_speed(),
        "threads": torch.get_num_threads(),
    }
    (output / "demo.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    try:
        plot(result).savefig(output / "demo.png", dpi=120)
        result["plot"] = str(output / "demo.png")
    except MissingExtraError as error:
        result["plot"] = f"not written: {error}"
    return result


def _row(name: str, model: nn.Module, tokens: torch.Tensor, seconds: float = 0.0) -> dict:
    return {
        "model": name,
        "perplexity": float(perplexity(model, tokens, WINDOW, limit=WINDOWS)),
        "linear_bytes": sum(_nbytes(model.get_submodule(n)) for n in linear_names(model)),
        "decode_tokens_per_second": speed(model, tokens, 16, 48).decode,
        "quantise_seconds": seconds,
    }


def _nbytes(module: nn.Module) -> int:
    if isinstance(module, PackedLinear):
        return module.nbytes()
    return sum(p.numel() * p.element_size() for p in module.parameters())


@torch.no_grad()
def layer_speed(repeats: int = 8) -> dict:
    """Milliseconds of one token through the linears of a 7B layer: float32, bfloat16, 4 bits."""
    torch.manual_seed(0)
    linears = [nn.Linear(k, n, bias=False) for n, k in LAYER]
    inputs = [torch.randn(1, k) for _, k in LAYER]
    packed = [PackedLinear.from_linear(m, Scheme.parse(SCHEME)) for m in linears]
    weights = [m.weight.detach().bfloat16() for m in linears]
    halves = list(zip(weights, inputs, strict=True))

    def best(step) -> float:
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
        return 1e3 * min(times)

    return {
        "shape": "one 7B decoder layer, one token",
        "float32_ms": best(lambda: [m(x) for m, x in zip(linears, inputs, strict=True)]),
        "bfloat16_ms": best(lambda: [nn.functional.linear(x.bfloat16(), w) for w, x in halves]),
        "w4a16_ms": best(lambda: [m(x) for m, x in zip(packed, inputs, strict=True)]),
    }


def table(result: dict) -> str:
    """The figures as text."""
    lines = [f"{'model':<18}{'perplexity':>11}{'linears':>12}{'decode':>13}{'time':>9}"]
    for row in result["rows"]:
        lines.append(
            f"{row['model']:<18}{row['perplexity']:>11.2f}{row['linear_bytes'] / 2**20:>8.2f} MiB"
            f"{row['decode_tokens_per_second']:>7.0f} tok/s{row['quantise_seconds']:>7.1f} s"
        )
    layer = result["layer"]
    lines += [
        f"perplexity: {result['protocol']}, on generated text the model has not seen",
        "decode: the embedded model is so small that Python, not arithmetic, takes its time; "
        "so, beside it:",
        f"{layer['shape']}: float32 {layer['float32_ms']:.1f} ms, bfloat16 "
        f"{layer['bfloat16_ms']:.1f} ms, 4 bits {layer['w4a16_ms']:.1f} ms "
        f"({layer['float32_ms'] / layer['w4a16_ms']:.1f} x float32, {result['threads']} threads)",
        f"plot: {result['plot']}",
    ]
    return "\n".join(lines)


def plot(result: dict):
    """A matplotlib figure: perplexity, size and layer time, before and after."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("plots need matplotlib: pip install 'fewbit[report]'") from None
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    names = [row["model"].replace(" ", "\n") for row in result["rows"]]
    colours = ["#7f7f7f", "#d55e00", "#0072b2"]  # colour-blind safe
    panels = [
        (left, names, [r["perplexity"] for r in result["rows"]], "perplexity", "held-out text"),
        (middle, names, [r["linear_bytes"] / 2**20 for r in result["rows"]], "MiB", "size"),
        (
            right,
            ["float32", "bfloat16", "4 bits"],
            [result["layer"][k] for k in ("float32_ms", "bfloat16_ms", "w4a16_ms")],
            "ms a token",
            "one 7B decoder layer",
        ),
    ]
    for axes, labels, values, unit, title in panels:
        bars = axes.bar(labels, values, color=colours)
        axes.bar_label(bars, fmt="%.2f" if max(values) < 100 else "%.0f")
        axes.set_ylabel(unit)
        axes.set_title(title)
        axes.margins(y=0.15)
    return figure
