"""The README's tables of what was measured: python scripts/accuracy_table.py

tests/results/accuracy holds, by model, the accuracy.json that `fewbit bench accuracy` writes, and
tests/results/peers.json, methods.json, rotation.json and kernels.json what tests/bench_peers.py,
bench_methods.py, bench_rotation.py and bench_all.py do. Without arguments the tables are printed;
``--write`` puts them into README.md and its translations, between their marks; ``--add FILE ..``
takes cells over from accuracy.json files first.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from fewbit.bench.accuracy import TABLE
from readmes import ROOT, write

RESULTS = ROOT / "tests" / "results"
MODELS = ["opt-tiny", "opt-tiny-outliers", "llama-tiny", "llama-tiny-outliers"]
GOALS = {"w4a16g128": 0.5, "w3a16g128": 2.0, "w2a16g64": 15.0, "w4a4": 5.0}  # % above float


def stored(name: str) -> dict:
    path = RESULTS / "accuracy" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cells": []}


def add(path: Path) -> None:
    """Cells of an accuracy.json into the results; newer ones replace older ones."""
    new = json.loads(path.read_text(encoding="utf-8"))
    name = new["protocol"]["model"]
    old = stored(name)
    if old["cells"] and old["protocol"] != new["protocol"]:
        raise SystemExit(f"{path} follows another protocol than the stored results of {name}")
    cells = {(c["scheme"], c["label"]): c for c in (*old["cells"], *new["cells"])}
    order = {row: i for i, row in enumerate(rows())}
    merged = [cells[key] for key in sorted(cells, key=lambda key: order.get(key, len(order)))]
    target = RESULTS / "accuracy" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**new, "cells": merged}, indent=1) + "\n", encoding="utf-8")


def rows() -> list[tuple[str, str]]:
    return [(scheme, method.label) for scheme, methods in TABLE.items() for method in methods]


def perplexities(name: str) -> dict[tuple[str, str], float]:
    return {
        (c["scheme"], c["label"]): c["perplexity"]
        for c in stored(name)["cells"] if "perplexity" in c
    }


def shown(value: float | None, best: bool = False) -> str:
    if value is None:
        return ""
    text = f"{value:.2f}" if value < 1000 else f"{value:.1e}".replace("e+0", "e")
    return f"**{text}**" if best else text


def accuracy_table(models: list[str]) -> str:
    """A row for every cell that one of ``models`` has; the least of a scheme in bold."""
    found = {name: perplexities(name) for name in models}
    least = {
        (name, scheme): min((v for (s, _), v in found[name].items() if s == scheme), default=None)
        for name in models for scheme in TABLE
    }
    lines = ["| books_test perplexity | " + " | ".join(models) + " |"]
    lines.append("|---|" + "---|" * len(models))
    lines.append("| float | " + " | ".join(shown(stored(n).get("float")) for n in models) + " |")
    for scheme, label in rows():
        values = [found[name].get((scheme, label)) for name in models]
        if any(v is not None for v in values):
            cells = (
                shown(v, v is not None and v == least[name, scheme])
                for name, v in zip(models, values, strict=True)
            )
            lines.append(f"| {scheme} {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def goal_table(models: list[str]) -> str:
    """By scheme: how far the best row of each model is above float."""
    lines = ["| % above float, best row | goal | " + " | ".join(models) + " |"]
    lines.append("|---|---|" + "---|" * len(models))
    for scheme, goal in GOALS.items():
        cells = []
        for name in models:
            measured = [v for (s, _), v in perplexities(name).items() if s == scheme]
            above = 100 * (min(measured) / stored(name)["float"] - 1) if measured else None
            cells.append("" if above is None else f"{above:.2f}")
        lines.append(f"| {scheme} | {goal:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def auto_table(models: list[str]) -> str:
    """By scheme: KL divergence and perplexity of auto over the least that a row has which chooses
    nothing and learns nothing afterwards."""
    lines = ["| auto over the best single recipe: KL, perplexity | " + " | ".join(models) + " |"]
    lines.append("|---|" + "---|" * len(models))
    for scheme in TABLE:
        shares = []
        for name in models:
            found = {
                c["label"]: c for c in stored(name)["cells"]
                if c["scheme"] == scheme and "tune" not in c["label"] and c.get("kl") is not None
            }
            auto = found.pop("auto", None)
            share = (auto[key] / min(c[key] for c in found.values())
                     for key in ("kl", "perplexity")) if auto and found else ()  # fmt: skip
            shares.append(", ".join(f"{x:.3f}" for x in share))
        if any(shares):
            lines.append(f"| {scheme} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def peer_table() -> str:
    """What bench_peers.py keeps: perplexity, and seconds of processor time."""
    results = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))
    models = list(dict.fromkeys(key.split()[0] for key in results))
    lines = ["| perplexity, seconds | " + " | ".join(models) + " |", "|---|" + "---|" * len(models)]
    for scheme in dict.fromkeys(key.split()[1] for key in results):
        found = {
            tuple(key.split(maxsplit=2)[::2]): cell for key, cell in results.items()
            if key.split()[1] == scheme and "perplexity" in cell
        }
        for label in dict.fromkeys(label for _, label in found):
            cells = []
            for name in models:
                cell = found.get((name, label))
                best = min((c["perplexity"] for (n, _), c in found.items() if n == name), default=0)
                cells.append("" if cell is None else (
                    f"{shown(cell['perplexity'], cell['perplexity'] == best)}, "
                    f"{cell['cpu_seconds']:.1f} s"
                ))  # fmt: skip
            lines.append(f"| {scheme} {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread_table(models: list[str], rows: dict[str, dict[str, list[float]]]) -> str:
    """Mean and standard deviation of what each row has of each model."""
    lines = ["| books_test perplexity | " + " | ".join(models) + " |"]
    lines.append("|---|" + "---|" * len(models))
    for label, found in rows.items():
        cells = []
        for name in models:
            values = found.get(name, [])
            spread = shown(statistics.stdev(values)) if len(values) > 1 else "0.00"
            cell = shown(statistics.mean(values)) if values else ""
            if spread != "0.00":  # float is the same with any outliers
                cell += f" \u00b1 {spread}"
            cells.append(cell)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seeds_table(path: Path) -> str:
    """What bench_methods.py and bench_rotation.py keep."""
    results = json.loads(path.read_text(encoding="utf-8"))
    return spread_table(results["models"], results["rows"])


def draws_table(models: list[str]) -> str:
    """Rows that were measured on every draw of the outliers: X-outliers, X-1-outliers, .."""
    found = {
        name: [perplexities(path.stem) for path in
               (RESULTS / "accuracy").glob(name.replace("-outliers", "*-outliers.json"))]
        for name in models
    }  # fmt: skip
    kept = {
        (scheme, label): {
            name: [draw[scheme, label] for draw in draws] for name, draws in found.items()
            if len(draws) > 1 and all((scheme, label) in draw for draw in draws)
        }
        for scheme, label in rows()
    }
    return spread_table(models, {f"{s} {label}": v for (s, label), v in kept.items() if v})


def kernels_table() -> str:
    """What bench_all.py keeps: ratios on one and on two threads, in italics below their bar."""
    results = json.loads((RESULTS / "kernels.json").read_text(encoding="utf-8"))
    lines = ["| ratio, 1 and 2 threads | bar | " + " | ".join(results) + " |"]
    lines.append("|---|---|" + "---|" * len(results))
    bars = {row: cell["bar"] for found in results.values() for row, cell in found["rows"].items()}
    for row, bar in bars.items():
        cells = []
        for found in results.values():
            cell = found["rows"].get(row, {})
            values = [cell[threads] for threads in ("1", "2") if threads in cell]
            cells.append(", ".join(f"{v:.2f}" if v >= bar else f"*{v:.2f}*" for v in values))
        lines.append(f"| {row} | {bar:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    found = {"accuracy": accuracy_table(MODELS), "goals": goal_table(MODELS)}
    found["auto"] = auto_table(MODELS)
    found["draws"] = draws_table([name for name in MODELS if name.endswith("-outliers")])
    for name, made in (("peers", peer_table), ("kernels", kernels_table)):
        if (RESULTS / f"{name}.json").exists():
            found[name] = made()
    for name in ("methods", "rotation"):
        if (path := RESULTS / f"{name}.json").exists():
            found[name] = seeds_table(path)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--add", nargs="+", type=Path, default=[], metavar="FILE")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    for path in arguments.add:
        add(path)
    if arguments.write:
        write(tables())
    else:
        print("\n\n".join(tables().values()))


if __name__ == "__main__":
    main()
