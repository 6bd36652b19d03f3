"""Speed of the second-order solve, and whether the accuracy table keeps GPTQ's orders.

python tests/bench_gptq.py speed           one 4096 x 4096 layer against eager torch, and memory
python tests/bench_gptq.py model           solves of whole models against their calibration forward
python tests/bench_gptq.py successors      GPTQ, FOEM, GPTAQ and Qronos on held-out text
python tests/bench_gptq.py bars [FILE ..]  orders and limits of GPTQ in accuracy.json files that
                                           `fewbit bench accuracy` wrote for the shared models, by
                                           default the stored ones, and plain code's figures

Exit status 1 when a bar is missed.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import transformers

import fewbit
import published
from conftest import ROOT, SHARED
from fewbit import calibrate, checkpoint, memory, ops
from fewbit.evaluate import compare, log_probabilities
from fewbit.families import decoder_layers, describe
from fewbit.recipes import Recipe
from fewbit.scheme import Codes, Scheme
from fewbit.solvers import Solver
from fewbit.solvers.factor import factorize
from fewbit.solvers.gptq import GPTQ
from fewbit.stats import Stats

# What plain code reaches (README beside the models): rtn, awq, gptq.
PLAIN = {
    "opt-tiny": {
        "w4a16g128": (73.78, 74.50, 72.88), "w3a16g128": (83.22, 81.92, 75.34),
        "w2a16g64": (144.4, 140.5, 94.1),
    },
    "opt-tiny-outliers": {
        "w4a16g128": (81.75, 75.07, 76.06), "w3a16g128": (94.27, 86.20, 80.18),
        "w2a16g64": (165.4, 157.5, 99.6),
    },
    "llama-tiny": {
        "w4a16g128": (67.48, 67.51, 66.87), "w3a16g128": (73.45, 73.64, 70.35),
        "w2a16g64": (116.5, 111.6, 93.3),
    },
    "llama-tiny-outliers": {
        "w4a16g128": (70.21, 67.98, 68.04), "w3a16g128": (77.55, 74.42, 71.62),
        "w2a16g64": (128.8, 119.7, 97.1),
    },
}


STORED = [ROOT / "tests" / "results" / "accuracy" / f"{name}.json" for name in PLAIN]


def bars(files: list[Path]) -> list[tuple[str, bool]]:
    """(what should hold, whether it does) for each accuracy.json."""
    found = []
    for file in files or STORED:
        result = json.loads(file.read_text())
        name, base = result["protocol"]["model"], result["float"]
        values = {(c["scheme"], c["label"]): c.get("perplexity") for c in result["cells"]}

        def order(scheme: str, better: str, worse: str, values=values, name=name) -> None:
            a, b = values[scheme, better], values[scheme, worse]
            found.append((f"{name} {scheme}: {better} {a:.2f} <= {worse} {b:.2f}", a <= b))

        def limit(what: str, scheme: str, label: str, most: float, v=values, name=name) -> None:
            value = v[scheme, label]
            text = f"{name} {scheme}: {label} {value:.2f}, {what} {most:.2f}"
            found.append((text, value <= most))

        for scheme, plain in PLAIN[name].items():
            for label, most in zip(("rtn", "awq", "gptq"), plain, strict=True):
                # Rounding is rounding: what is left is how two programs round scales and ties.
                limit("plain code", scheme, label, most * 1.02 if label == "rtn" else most)
            if scheme != "w4a16g128":  # there the methods lie within 0.1 % of each other
                order(scheme, "gptq", "rtn")
                order(scheme, "qronos", "gptq")
                order(scheme, "awq+gptq", "awq")
                order(scheme, "awq+gptq", "gptq")
        best = "awq+gptq" if "outliers" in name else "gptq"
        allowed = 0.025 if "outliers" in name else 0.015
        limit(f"float + {allowed:.1%}", "w4a16g128", best, base * (1 + allowed))
    return found


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


def peak_bytes(function) -> int:
    """The most memory that this process holds while ``function`` runs, beyond what it held before
    (Linux counts it in whole pages, what libraries map and MKL buffers included)."""
    memory.reset_peak()
    before = memory.resident()
    result = function()
    most = memory.peak() - before
    del result
    return most


def speed(size: int = 4096, repeats: int = 3) -> dict:
    """Factor and solve of one layer, both ways in turn; the least time of each."""
    torch.manual_seed(0)
    w, x = torch.randn(size, size), torch.randn(2 * size, size)
    h = x.T @ x
    del x

    def ours() -> Codes:
        return Codes(*ops.gptq(w, factorize(h, 0.01).c, 4, 128))

    part = h[:1280, :1280].contiguous()  # loads what is loaded once
    ops.gptq(w[:64, :1280], factorize(part, 0.01).c, 4, 128)
    peak = peak_bytes(ours)
    default = lambda: GPTQ().solve(w, Scheme(), Stats(2 * size, w[0], w[0], h))  # noqa: E731
    times = {"factor": [], "solve": [], "eager": [], "solver's defaults": []}
    for _ in range(repeats):
        start = time.perf_counter()
        factor = factorize(h, 0.01)
        middle = time.perf_counter()
        codes = ops.gptq(w, factor.c, 4, 128)
        times["factor"].append(middle - start)
        times["solve"].append(time.perf_counter() - middle)
        start = time.perf_counter()
        theirs = eager(w, h, 4, 128)
        times["eager"].append(time.perf_counter() - start)
        start = time.perf_counter()
        default()
        times["solver's defaults"].append(time.perf_counter() - start)
    best = {k: min(v) for k, v in times.items()}
    best["ratio"] = (best["factor"] + best["solve"]) / best["eager"]
    best["peak / Hessian"] = peak / (4 * size * size)
    losses = [float((((q - w) @ h) * (q - w)).sum()) for q in (ops.dequantize(*codes, 128), theirs)]
    best["loss / eager's"] = losses[0] / losses[1]
    for key, value in best.items():
        print(f"{key:18} {value:.3f}")
    assert abs(best["loss / eager's"] - 1) < 0.01
    return best


def whole_model(
    name: str, model, data: calibrate.Windows, method: str, repeats: int = 3
) -> tuple[float, float]:
    """Seconds of all solves over those of one forward pass through all layers, and over those of
    the passes that the method's calibration makes; the least of each, in turn."""
    forward, solves, calls = [], [], []
    plain = calibrate.forward

    def counted(*args):
        calls.append(1)
        return plain(*args)

    for _ in range(repeats):
        inputs = calibrate.capture(model, describe(model), data)
        start = time.perf_counter()
        for layer in decoder_layers(model):
            inputs = calibrate.run_layer(layer, inputs)
        forward.append(time.perf_counter() - start)
        calls.clear()
        calibrate.forward = counted
        report = fewbit.quantize_(model, method, "w4a16g128", data, progress=False)
        calibrate.forward = plain
        fewbit.restore_(model)
        solves.append(sum(r.seconds for r in report.linears))
    ratio = min(solves) / min(forward)
    passes = len(calls) / (len(decoder_layers(model)) * len(data.batches))
    line = f"{name:20} {method:8} forward {min(forward):.2f} s, solves {min(solves):.2f} s"
    print(f"{line}, ratio {ratio:.2f}, to its {passes:.0f} passes {ratio / passes:.2f}", flush=True)
    return ratio, ratio / passes


class FOEM(Solver):
    """published.py's, on the statistics that fewbit's solvers get."""

    needs_stats = compensates = True

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def solve(self, weight, scheme: Scheme, stats: Stats) -> tuple[Codes, dict]:
        h = stats.gram.double()
        h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
        grid = (scheme.bits, scheme.group_size, scheme.symmetric, scheme.scale_dtype)
        q, scale, zero_point = published.gptq(weight, h, *grid, beta=self.beta)
        return Codes(q, scale.half(), zero_point), {}


def successors(folders: list[Path]) -> list[tuple[str, bool]]:
    """Mean KL divergence from the float model on text that calibration has not seen: windows 32 to
    63 of the calibration file. All as published, columns from left to right, ranges unsearched.

    Measured on opt-tiny and opt-tiny-outliers at 3 and 2 bits and llama-tiny at 3, mean: GPTQ
    0.152, FOEM 0.154 (beta 0.05) and 0.176 (0.2), GPTAQ 0.150 half of the way and 0.194 all of it,
    Qronos 0.145 and 0.192.
    """
    plain = dict(order="columns", fit="range")
    solvers = {"gptq": GPTQ(**plain)} | {f"foem {b}": FOEM(b) for b in (0.05, 0.2)}
    for target in ("gptaq", "qronos"):
        for strength in (0.5, 1.0):
            solvers[f"{target} {strength}"] = GPTQ(target=target, strength=strength, **plain)
    sums = dict.fromkeys(solvers, 0.0)
    for path in folders or [SHARED / "models" / name for name in PLAIN]:
        model, tokenizer = checkpoint.load_float(path), checkpoint.load_tokenizer(path)
        text = calibrate.read_text(SHARED / "data" / "books_calibration.txt")
        seen = calibrate.cut(calibrate.tokenize(text, tokenizer), 256, 64, "books_calibration.txt")
        data, held = (calibrate.Windows(seen.batches[part]) for part in (slice(32), slice(32, 64)))
        floats = log_probabilities(model, held)
        for scheme in ("w3a16g128", "w2a16g64"):
            line = f"{path.name:20} {scheme}"
            for name, solver in solvers.items():
                recipe = Recipe(name, Scheme.parse(scheme), (), solver)
                fewbit.quantize_(model, recipe, calibration=data, progress=False)
                kl = compare(model, held, floats).kl
                fewbit.restore_(model)
                sums[name] += kl
                line += f"  {name} {kl:.4f}"
            print(line, flush=True)
    print("sums  " + "  ".join(f"{name} {value:.4f}" for name, value in sums.items()))
    foem = min(v for k, v in sums.items() if k.startswith("foem"))
    found = [(name, sums[name]) for name in ("gptaq 0.5", "qronos 0.5")]
    return [(f"{name} {kl:.4f} <= FOEM {foem:.4f}", kl <= foem) for name, kl in found]


def models(folders: list[Path]) -> list[tuple[str, bool]]:
    """The shared models on their protocol's 8192 tokens, and a wide one on as many; no folders."""
    found = []
    cases = []
    for name in ("opt-tiny", "llama-tiny"):
        path = SHARED / "models" / name
        ids = calibrate.tokenize(
            calibrate.read_text(SHARED / "data" / "books_calibration.txt"),
            checkpoint.load_tokenizer(path),
        )
        cases.append((name, checkpoint.load_float(path), ids))
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=2048, intermediate_size=5632, num_hidden_layers=1,
        num_attention_heads=16, num_key_value_heads=8,
    )
    cases.append(("hidden 2048", transformers.LlamaForCausalLM(config).eval(), cases[1][2]))
    for name, model, ids in cases:
        data = calibrate.cut(ids, 256, 32, "books_calibration.txt")
        ratio = whole_model(name, model, data, "gptq")[0]
        text = f"{name}: gptq's solves {ratio:.2f} of one forward pass <= 0.5"
        found.append((text, ratio <= 0.5))
        if name != "hidden 2048":
            ratio = whole_model(name, model, data, "qronos")[1]
            text = f"{name}: qronos' solves {ratio:.2f} of its calibration's passes <= 0.5"
            found.append((text, ratio <= 0.5))
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("speed", "model", "successors", "bars"))
    parser.add_argument("folders", nargs="*", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "speed":
        best = speed()
        found = [
            (f"{best['ratio']:.3f} of eager's time <= 1/3", best["ratio"] <= 1 / 3),
            (f"peak {best['peak / Hessian']:.2f} Hessians <= 1.5", best["peak / Hessian"] <= 1.5),
        ]
    else:
        what = {"model": models, "successors": successors, "bars": bars}[arguments.what]
        found = what(arguments.folders)
    for text, good in found:
        print(f"{'met   ' if good else 'MISSED'} {text}")
    return 0 if all(good for _, good in found) else 1


if __name__ == "__main__":
    sys.exit(main())
