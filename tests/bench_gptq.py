"""Perplexity of GPTQ, its successors and its stacks on the shared models, and the solve's speed.

python tests/bench_gptq.py accuracy [--models ..] [--json out.json]    the tables of the README
python tests/bench_gptq.py speed [--json out.json]                     against eager torch

Protocol of the folder of shared models: 64 windows of 256 tokens of books_test.txt, calibration on
the first 32 windows of 256 tokens of books_calibration.txt.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

import torch

import fewbit
from fewbit import calibrate, ops
from fewbit.solvers.factor import factorize

SHARED = Path(os.environ.get("FEWBIT_SHARED", Path(__file__).parents[2] / "shared"))
MODELS = ("opt-tiny", "opt-tiny-outliers", "llama-tiny", "llama-tiny-outliers")
# What plain code reaches (README beside the models): rtn, awq, gptq; and the float model.
PLAIN = {
    "opt-tiny": {
        "w4": (73.78, 74.50, 72.88), "w3": (83.22, 81.92, 75.34), "w2": (144.4, 140.5, 94.1)
    },
    "opt-tiny-outliers": {
        "w4": (81.75, 75.07, 76.06), "w3": (94.27, 86.20, 80.18), "w2": (165.4, 157.5, 99.6)
    },
    "llama-tiny": {
        "w4": (67.48, 67.51, 66.87), "w3": (73.45, 73.64, 70.35), "w2": (116.5, 111.6, 93.3)
    },
    "llama-tiny-outliers": {
        "w4": (70.21, 67.98, 68.04), "w3": (77.55, 74.42, 71.62), "w2": (128.8, 119.7, 97.1)
    },
}
FLOAT = {"opt-tiny": 72.05, "opt-tiny-outliers": 72.05, "llama-tiny": 66.25,
         "llama-tiny-outliers": 66.25}
SCHEMES = {"w4": "w4a16g128", "w3": "w3a16g128", "w2": "w2a16g64"}
BEST = dict(order="groups", target="qronos", strength=0.25, sweeps=3, true_sequential=True)
METHODS = {
    "rtn": ("rtn", {}),
    "awq": ("awq", {}),
    "gptq": ("gptq", {}),
    "successor": ("gptq", BEST),
    "awq+gptq": ("awq+gptq", {}),
    "awq+successor": ("awq+gptq", BEST),
}


TOKENS: dict[tuple[str, str], torch.Tensor] = {}


def text_tokens(model: str, part: str, tokenizer) -> torch.Tensor:
    """Token ids of one of the books' texts, read once a model."""
    if (model, part) not in TOKENS:
        text = (SHARED / "data" / f"books_{part}.txt").read_text()
        TOKENS[model, part] = calibrate.tokenize(text, tokenizer)
    return TOKENS[model, part]


def perplexity_of(name: str, method: str, scheme: str, **options) -> tuple[float, float]:
    """Perplexity, and seconds of all solves."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = SHARED / "models" / name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    train, test = (text_tokens(name, part, tokenizer) for part in ("calibration", "test"))
    data = calibrate.cut(train, 256, 32, "books_calibration.txt")
    report = fewbit.quantize_(
        model, method, scheme, data, keep_float=False, progress=False, **options
    )
    value = float(fewbit.perplexity(model, test, 256, limit=64, batch=8))
    return value, sum(r.seconds for r in report.linears)


def accuracy(models, widths, methods) -> dict:
    results = {}
    for name in models:
        for width in widths:
            for label in methods:
                method, options = METHODS[label]
                value, seconds = perplexity_of(name, method, SCHEMES[width], **options)
                results[f"{name} {width} {label}"] = value
                line = f"{name:20} {width} {label:14} {value:8.3f}  solve {seconds:.1f} s"
                print(line, flush=True)
    return results


def eager(w, h, bits: int, group: int, block: int = 128) -> torch.Tensor:
    """The published algorithm with torch operations, as its implementations write it."""
    w, q = w.clone(), torch.zeros_like(w)
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    top = 2**bits - 1
    for b in range(0, w.shape[1], block):
        end = min(b + block, w.shape[1])
        part, errors, inverse = w[:, b:end].clone(), torch.zeros(len(w), end - b), u[b:end, b:end]
        for i in range(end - b):
            if (b + i) % group == 0:
                span = w[:, b + i : b + i + group]
                lo, hi = span.amin(1).clamp(max=0), span.amax(1).clamp(min=0)
                s = (hi - lo) / top
                z = (-lo / s).round()
            x = part[:, i]
            q[:, b + i] = (((x / s).round() + z).clamp(0, top) - z) * s
            e = (x - q[:, b + i]) / inverse[i, i]
            part[:, i:] -= e[:, None] * inverse[i, i:]
            errors[:, i] = e
        w[:, end:] -= errors @ u[b:end, end:]
    return q


def speed(size: int = 4096, repeats: int = 3) -> dict:
    """Factor and solve of one layer, both ways in turn; the least time of each."""
    torch.manual_seed(0)
    w, x = torch.randn(size, size), torch.randn(2 * size, size)
    h = x.T @ x
    del x
    times = {"factor": [], "solve": [], "eager": []}
    peak = None
    for _ in range(repeats):
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        factor = factorize(h, 0.01)
        middle = time.perf_counter()
        codes = ops.gptq(w, factor.c, 4, 128)
        times["factor"].append(middle - start)
        times["solve"].append(time.perf_counter() - middle)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = (after - before) * 1024 if peak is None else peak
        del factor, codes
        start = time.perf_counter()
        eager(w, h, 4, 128)
        times["eager"].append(time.perf_counter() - start)
    best = {k: min(v) for k, v in times.items()}
    best["ratio"] = (best["factor"] + best["solve"]) / best["eager"]
    best["peak / Hessian"] = peak / (4 * size * size)
    for key, value in best.items():
        print(f"{key:16} {value:.3f}")
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("accuracy", "speed"))
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--widths", nargs="+", default=("w3", "w2", "w4"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "speed":
        results = speed()
    else:
        results = accuracy(arguments.models, arguments.widths, arguments.methods)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
