"""``fewbit bench accuracy``: every method on every scheme, one protocol, one table.

A cell loads the float model afresh, quantises it, and measures perplexity and KL divergence from
the float model on the same windows, bits per weight, seconds and peak memory. Results are written
after every cell: a second call with the same protocol goes on where the first one stopped, and one
beside it takes the cells that nobody is at, so two calls fill a table on two cores.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..calibrate import Windows, cut, read_text, tokenize
from ..checkpoint import load_float, load_tokenizer
from ..errors import FewbitError, MissingExtraError, UsageError
from ..evaluate import compare, log_probabilities
from ..memory import peak, reset_peak
from ..pipeline import environment, quantize_


class Method(NamedTuple):
    """A row of the table: what it is called, and the arguments of ``quantize_``; ``samples``:
    calibration windows where they are not the table's (tune learns from them)."""

    label: str
    method: str
    options: dict = {}
    samples: int | None = None


CLAIM = ".claim"
FIT = {"fit_activations": True}
FIT_SMOOTH = {**FIT, "alpha": "auto"}
WEIGHT_ONLY = (
    Method("rtn", "rtn"),
    Method("mixed 1 %", "mixed"),
    Method("awq closed form", "awq", {"form": "closed-times", "clip": False}),
    Method("awq search", "awq", {"form": "search", "clip": False}),
    Method("awq search+clip", "awq", {"form": "search"}),
    Method("awq", "awq"),
    Method("gptq", "gptq"),
    Method("gptaq", "gptq", {"target": "gptaq"}),
    Method("qronos", "qronos"),
    Method("awq+gptq", "awq+gptq"),
    Method("awq+qronos", "awq+qronos"),
    Method("quarot+gptq", "quarot+gptq"),
    Method("quarot+qronos", "quarot+qronos"),
    Method("auto", "auto"),
    Method("quarot+qronos+tune 512", "quarot+qronos+tune", samples=512),
    Method("auto+tune 512", "auto+tune", samples=512),
)
EIGHT_BIT_ACTIVATIONS = (
    Method("rtn", "rtn"),
    Method("llm-int8", "llm-int8"),
    Method("smoothquant", "smoothquant"),
    Method("smoothquant auto", "smoothquant", {"alpha": "auto"}),
    Method("smoothquant+gptq", "smoothquant+gptq"),
    Method("smoothquant+qronos", "smoothquant+qronos"),
    Method("quarot+gptq", "quarot+gptq"),
    Method("auto", "auto"),
)
ROTATED = (  # these quantise the KV cache as well
    Method("quarot", "quarot"),
    Method("quarot+gptq", "quarot+gptq"),
    Method("quarot+qronos", "quarot+qronos"),
    Method("spinquant", "spinquant", {"weights": True}),
    Method("spinquant+gptq", "spinquant+gptq"),
    Method("quarot+qronos fitted", "quarot+qronos", FIT),
    Method("quarot+smooth+qronos fitted", "quarot+smoothquant+qronos", FIT_SMOOTH),
    Method("spinquant+smooth+qronos fitted", "spinquant+smoothquant+qronos", FIT_SMOOTH),
    Method("auto", "auto"),
    Method("auto+tune 512", "auto+tune", samples=512),
)
FOUR_BIT_ACTIVATIONS = (
    Method("rtn", "rtn"),
    Method("smoothquant", "smoothquant"),
    Method("smoothquant+gptq", "smoothquant+gptq"),
    *ROTATED,
)
TABLE: dict[str, tuple[Method, ...]] = {
    "w4a16g128": (*WEIGHT_ONLY, Method("qronos+tune 512", "qronos+tune", samples=512)),
    "w3a16g128": WEIGHT_ONLY,
    "w2a16g64": WEIGHT_ONLY,
    "w8a8": EIGHT_BIT_ACTIVATIONS,
    "w4a8": tuple(m for m in EIGHT_BIT_ACTIVATIONS if m.method != "llm-int8"),
    "w4a4": FOUR_BIT_ACTIVATIONS,
    "w4a4kv4": ROTATED,
}


def run(
    model_dir: str | Path,
    text: str | Path,
    calibration: str | Path,
    output: str | Path,
    *,
    schemes: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    window: int = 256,
    windows: int = 64,
    samples: int = 32,
    batch: int = 8,
    say=print,
) -> dict:
    """Fill ``output``/accuracy.json, .md and .png, and return the former's content.

    ``text`` is scored on its first ``windows`` windows of ``window`` tokens, without overlap or
    BOS; ``calibration`` gives the first ``samples`` windows. ``schemes`` and ``methods`` choose
    columns and rows of TABLE. A cell that a method refuses holds the reason. Raises UsageError for
    a name that TABLE lacks, and when ``output`` holds results of another protocol.
    """
    cells = _chosen(schemes, methods)
    tokenizer = load_tokenizer(model_dir)
    tokens = tokenize(read_text(text), tokenizer)
    test = cut(tokens, window, windows, Path(text).name)
    ids, source = tokenize(read_text(calibration), tokenizer), Path(calibration).name
    data = cut(ids, window, samples, source)
    protocol = {
        "model": Path(model_dir).name,
        "weights": _digest_of(model_dir),
        "text": test.source,
        "text_sha256": test.digest(),
        "calibration": data.source,
        "calibration_sha256": data.digest(),
        "window": window,
        "windows": windows,
        "samples": samples,
        "dtype": "float32",
    }
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    store = output / "accuracy.json"
    result = {"protocol": protocol, "environment": environment(), "float": None, "cells": []}
    if store.exists():
        result = json.loads(store.read_text(encoding="utf-8"))
        if result["protocol"] != protocol:
            differs = [k for k, v in protocol.items() if result["protocol"].get(k) != v]
            raise UsageError(
                f"{store} holds results of another protocol ({', '.join(differs)} differ): choose "
                "another output directory"
            )
    done = _done(store)
    todo = [(s, m) for s, m in cells if (s, m.label) not in done]
    if list(output.glob(f".*{CLAIM}")):  # beside another call: the longest first, to end with it
        todo.sort(key=lambda cell: (cell[1].samples is None, "auto" not in cell[1].method))
    spool = output / f"float_log_probabilities.{os.getpid()}.f16"
    if todo:
        model = load_float(model_dir)
        shape = (windows, window, model.get_output_embeddings().weight.shape[0])
        size = windows * window * shape[2]
        # Mapped, so that a large vocabulary does not count as memory.
        reference = torch.from_file(str(spool), shared=True, size=size, dtype=torch.float16)
        reference = reference.reshape(shape)
        log_probabilities(model, test, reference, batch)
        result["float"] = compare(model, test, reference, batch).perplexity
        del model
    try:
        for i, (scheme, method) in enumerate(todo):
            with _claimed(output / f".{scheme} {method.label}{CLAIM}") as mine:
                if not mine or (scheme, method.label) in _done(store):
                    continue
                seen = data if method.samples is None else cut(ids, window, method.samples, source)
                cell = _measure(model_dir, scheme, method, seen, test, reference, batch)
                with _locked(output):
                    result["cells"] = _merged(store, [*result["cells"], cell])
                    _replace(store, json.dumps(result, indent=1) + "\n")
            say(f"[{i + 1}/{len(todo)}] {_line(cell)}")
    finally:
        spool.unlink(missing_ok=True)
    with _locked(output):
        result["cells"] = _merged(store, result["cells"])
        _replace(output / "accuracy.md", markdown(result))
        plot(result).savefig(output / "accuracy.png", dpi=120)
    return result


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether no other process holds ``path``; the system lets go of what a dead one held."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:  # who has opened it meanwhile gets it, and sees what is stored by then
            path.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _done(store: Path) -> set[tuple[str, str]]:
    return {(c["scheme"], c["label"]) for c in _stored(store)}


def _stored(store: Path) -> list[dict]:
    return json.loads(store.read_text(encoding="utf-8"))["cells"] if store.exists() else []


def _chosen(
    schemes: Sequence[str] | None, methods: Sequence[str] | None
) -> list[tuple[str, Method]]:
    labels = list(dict.fromkeys(m.label for rows in TABLE.values() for m in rows))
    for name, given, known in (("scheme", schemes, list(TABLE)), ("method", methods, labels)):
        for value in given or ():
            if value not in known:
                raise UsageError(f"{name} {value!r} is not in the table; {', '.join(known)} are")
    return [
        (scheme, method)
        for scheme, rows in TABLE.items() if schemes is None or scheme in schemes
        for method in rows if methods is None or method.label in methods
    ]


def _measure(
    model_dir: str | Path, scheme: str, method: Method, data: Windows, test: Windows,
    reference: Tensor, batch: int,
) -> dict:
    cell = {"scheme": scheme, "label": method.label, "method": method.method,
            "options": method.options, "samples": len(data.batches)}
    model = load_float(model_dir)
    before, started, busy = reset_peak(), time.monotonic(), time.process_time()
    try:
        report = quantize_(
            model, method.method, scheme, data, keep_float=False, progress=False, **method.options
        )
    except FewbitError as error:
        return cell | {"refused": str(error)}
    seconds, busy = time.monotonic() - started, time.process_time() - busy
    memory = peak() - before
    weights = sum(r.bytes_before for r in report.linears) // 4  # loaded as float32
    score = compare(model, test, reference, batch)
    return cell | {
        "perplexity": score.perplexity,
        "kl": score.kl,
        "bits": 8 * report.bytes_after / weights,
        "bytes": report.bytes_after,
        "seconds": seconds,
        "cpu_seconds": busy,
        "extra_peak_bytes": memory,
    }


def _digest_of(model_dir) -> str:
    """SHA-256 of the files that hold the weights."""
    digest = hashlib.sha256()
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _merged(store: Path, cells: list[dict]) -> list[dict]:
    """The cells in the order of TABLE, with those that another process has stored meanwhile."""
    known = {(c["scheme"], c["label"]): c for c in (*_stored(store), *cells)}
    rows = [(scheme, method.label) for scheme, methods in TABLE.items() for method in methods]
    order = {row: i for i, row in enumerate(rows)}
    return [known[key] for key in sorted(known, key=lambda key: order.get(key, len(order)))]


def _replace(path: Path, text: str) -> None:
    """Write whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _line(cell: dict) -> str:
    head = f"{cell['scheme']:<10} {cell['label']:<20}"
    if "refused" in cell:
        return f"{head} refused: {cell['refused']}"
    return (
        f"{head} perplexity {cell['perplexity']:9.3f}  KL {cell['kl']:.4f}  "
        f"{cell['bits']:.2f} bits  {cell['seconds']:.1f} s"
    )


def markdown(result: dict) -> str:
    """The table with its protocol."""
    p, base = result["protocol"], result["float"]
    lines = [
        f"# {p['model']}",
        "",
        f"Perplexity and mean KL divergence from the float model: {p['text']}, the first "
        f"{p['windows']} windows of {p['window']} tokens, no overlap, no BOS, float32 arithmetic. "
        f"Calibration: the first {p['samples']} windows of {p['calibration']} (as many as its "
        "name ends with, where a row has a number). Bits of a weight of the quantised linears, "
        "their scales, zero points and biases included; seconds, on "
        f"{result['environment']['threads']} threads; peak memory beyond the loaded model.",
        "",
        f"Float: {base:.2f}.",
    ]
    for scheme in dict.fromkeys(c["scheme"] for c in result["cells"]):
        cells = [c for c in result["cells"] if c["scheme"] == scheme]
        best = min((c["perplexity"] for c in cells if "refused" not in c), default=None)
        lines += [
            "",
            f"| {scheme} | perplexity | above float | KL | bits | s | MiB |",
            "|---|---|---|---|---|---|---|",
        ]
        for c in cells:
            if "refused" in c:
                lines.append(f"| {c['label']} | {c['refused']} | | | | | |")
                continue
            value = f"{c['perplexity']:.2f}"
            value = f"**{value}**" if c["perplexity"] == best else value
            lines.append(
                f"| {c['label']} | {value} | {100 * (c['perplexity'] / base - 1):.1f} % | "
                f"{c['kl']:.4f} | {c['bits']:.2f} | {c['seconds']:.1f} | "
                f"{c['extra_peak_bytes'] / 2**20:.0f} |"
            )
    return "\n".join(lines) + "\n"


def plot(result: dict):
    """A matplotlib figure: perplexity above the float model's, by method, one panel a scheme."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("plots need matplotlib: pip install 'fewbit[report]'") from None
    base = result["float"]
    measured = [c for c in result["cells"] if "refused" not in c]
    schemes = list(dict.fromkeys(c["scheme"] for c in measured))
    figure = Figure(figsize=(9, 1 + 2.4 * len(schemes)), layout="constrained")
    panels = figure.subplots(len(schemes), 1, squeeze=False)[:, 0]
    for axes, scheme in zip(panels, schemes, strict=True):
        cells = [c for c in measured if c["scheme"] == scheme]
        above = [100 * max(c["perplexity"] / base - 1, 1e-4) for c in cells]
        bars = axes.barh([c["label"] for c in cells], above, color="#0072b2")
        axes.bar_label(bars, [f"{v:.1f}" for v in above], padding=2)
        axes.set_xscale("log")
        axes.invert_yaxis()
        axes.set_title(f"{scheme}: % of perplexity above float ({base:.2f})")
    return figure
