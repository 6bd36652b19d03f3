"""The figures of a report; matplotlib is imported when one is drawn.

Each works in black and white too: markers and line styles differ with colours, which are those of
M. Okabe and K. Ito (2008), told apart with every common colour vision.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ..errors import MissingExtraError
from . import kind_of, layer_of

if TYPE_CHECKING:
    from . import Report

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = "osD^vPX"
BEFORE, AFTER = dict(color="#d55e00", marker="v"), dict(color="#0072b2", marker="o")
CURVES = {  # transform: keys of the candidates, of their losses, of the chosen one; label of x
    "awq": ("ratios", "losses", "ratio", "exponent r of the activation scale"),
    "smooth": ("alphas", "errors", "alpha", "migration strength alpha"),
}


class Plot(NamedTuple):
    """``title`` and ``caption`` for the page; ``has``: is there anything to draw."""

    title: str
    caption: str
    has: Callable[[Report], bool]
    draw: Callable[[Report], object]


def axes(width: float = 4.6, height: float = 3.2):
    """One matplotlib Axes on a Figure of its own, without pyplot's global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("plots need matplotlib: pip install 'fewbit[report]'") from None

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            """What a notebook shows of a figure that is not pyplot's."""
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=110)
            return buffer.getvalue()

    figure = Shown(figsize=(width, height), layout="constrained")
    found = figure.subplots()
    found.spines[["top", "right"]].set_visible(False)
    found.grid(alpha=0.25)
    return found


def outliers(report: Report):
    """max / median of the channel maxima, per linear."""
    ax = axes()
    from matplotlib.ticker import LogFormatter

    for label, style in (("before", BEFORE), ("after", AFTER)):
        ratios = [record[label]["ratio"] for record in report.outliers]
        ax.plot(range(len(ratios)), ratios, linestyle="", label=label, markersize=5, **style)
    ax.set(yscale="log", xlabel="linear, in model order", ylabel="largest / median channel")
    ax.yaxis.set_major_formatter(LogFormatter())  # 3, not 3 x 10^0
    ax.yaxis.set_minor_formatter(LogFormatter())
    ax.axhline(1, color="#7f7f7f", linewidth=0.8)
    ax.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return ax.figure


def channels(report: Report):
    """Channel maxima in falling order, of the inputs that had the strongest outliers."""
    ax = axes()
    inputs = {tuple(r["before"]["profile"]): r for r in report.outliers}.values()  # q, k, v: one
    worst = sorted(inputs, key=lambda r: -r["before"]["ratio"])[:3]
    for colour, record in zip(COLOURS, worst, strict=False):
        for label, line in (("before", "--"), ("after", "-")):
            profile = record[label]["profile"]
            part = [100 * i / (len(profile) - 1) for i in range(len(profile))]
            name = f"{layer_of(record['path'])}.{kind_of(record['path'])} {label}"
            ax.plot(part, profile, line, color=colour, label=name)
    ax.set(yscale="log", xlabel="channels, largest first (%)", ylabel="max |x| of a channel")
    ax.legend(frameon=False, fontsize="small")
    return ax.figure


def errors(report: Report):
    """Relative output error by layer, one line a kind of linear."""
    ax = axes()
    kinds: dict[str, list] = {}
    for record in report.linears:
        kinds.setdefault(kind_of(record.name), []).append(record)
    for i, (kind, records) in enumerate(kinds.items()):
        ax.plot(
            [layer_of(r.name) for r in records], [max(r.relative_error, 1e-12) for r in records],
            color=COLOURS[i % 7], marker=MARKERS[i % 7], markersize=4, linewidth=1, label=kind,
        )  # fmt: skip
    measured = report.linears[0].measured
    ax.set(yscale="log", xlabel="decoder layer", ylabel=f"relative {measured} error (energy)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, fontsize="small", ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    return ax.figure


def searches(report: Report) -> list[dict]:
    """The transform records that hold a curve: more than no transform and one candidate."""
    known = [r for r in report.transforms if CURVES.get(r.get("transform"), ("",))[0] in r]
    return [r for r in known if len(r[CURVES[r["transform"]][0]]) > 2]


def place(candidate: float | str | None) -> tuple[str, float] | None:
    """Form and exponent of a candidate; None for "no transform" and what has no exponent."""
    form, _, exponent = candidate.rpartition(" ") if isinstance(candidate, str) else ("", "", "")
    if candidate is None or (isinstance(candidate, str) and not form):
        return None
    return form, float(exponent or candidate)


def sweep(report: Report):
    """Perplexity over the values of the option that was swept; the best is marked."""
    ax, found = axes(), report.sweep
    values = found["values"]
    numbers = all(isinstance(v, (int, float)) for v in values)
    xs = values if numbers else list(range(len(values)))
    ax.plot(xs, found["perplexity"], color=AFTER["color"], marker="o", markersize=4, linewidth=1)
    best = values.index(found["best"])
    ax.plot([xs[best]], [found["perplexity"][best]], "s", color=BEFORE["color"], label="best")
    ax.axhline(found["float"], color="#7f7f7f", linestyle="--", label="float")
    if not numbers:
        ax.set_xticks(xs, [str(v) for v in values], rotation=30, ha="right", fontsize="small")
    ax.set(xlabel=found["option"], ylabel="perplexity, held-out")
    ax.legend(frameon=False)
    return ax.figure


def search(report: Report):
    """Loss relative to no transform, over the searched exponent; the chosen points are marked."""
    ax = axes()
    edges: dict[str, str] = {}
    for record in searches(report):
        candidates, losses, chosen, label = CURVES[record["transform"]]
        base = record[losses][0] if record[losses][0] > 0 else 1.0
        curves: dict[str, dict[float, float]] = {}
        for candidate, loss in zip(record[candidates], record[losses], strict=True):
            if found := place(candidate):
                curves.setdefault(found[0], {})[found[1]] = loss / base
        edge = kind_of(record["edge"].partition(" -> ")[0])
        colour = edges.setdefault(edge, COLOURS[len(edges) % 7])
        drawn = [curve for curve in curves.values() if len(curve) > 1]
        for curve, line in zip(drawn, ("-", "--"), strict=False):
            ax.plot(*zip(*curve.items(), strict=True), line, color=colour, linewidth=1, alpha=0.7)
        form, x = place(record[chosen]) or ("", 0.0)
        ax.plot([x], [curves.get(form, {}).get(x, 1.0)], "o", color=colour, markersize=5)
        ax.set_xlabel(label)
    for edge, colour in edges.items():
        ax.plot([], [], color=colour, marker="o", label=edge)
    ax.axhline(1, color="#7f7f7f", linewidth=0.8)
    ax.set(ylabel="loss / loss without transform", yscale="log")
    ax.legend(frameon=False, fontsize="small", title="scaled output of")
    return ax.figure


def sizes(report: Report):
    """MiB of the linears, by kind."""
    ax = axes()
    kinds = list(dict.fromkeys(kind_of(r.name) for r in report.linears))
    for offset, key, style in ((-0.2, "bytes_before", BEFORE), (0.2, "bytes_after", AFTER)):
        held = [
            sum(getattr(r, key) for r in report.linears if kind_of(r.name) == kind) / 2**20
            for kind in kinds
        ]
        ax.bar(
            [i + offset for i in range(len(kinds))], held, 0.4, color=style["color"],
            label=key.removeprefix("bytes_"),
        )  # fmt: skip
    ax.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right", fontsize="small")
    ax.set_ylabel("size of all layers (MiB)")
    ax.legend(frameon=False)
    return ax.figure


PLOTS = {
    "outliers": Plot(
        "Activation outliers", "How far the largest channel stands out of the median one, in the "
        "input of each linear, before and after the transforms. 1 is flat.",
        lambda r: bool(r.outliers), outliers,
    ),
    "channels": Plot(
        "Channels of the worst inputs", "Largest value of each channel, in falling order. Scales "
        "lower the peak; rotations spread it over all channels.",
        lambda r: bool(r.outliers), channels,
    ),
    "errors": Plot(
        "Error of each linear", "Energy of the output error over the energy of the output, on the "
        "calibration inputs.", lambda r: bool(r.linears), errors,
    ),
    "search": Plot(
        "Search of the scales", "Loss over the searched exponent, relative to no transform; the "
        "chosen points are marked. Below the line the transform helps.",
        lambda r: bool(searches(r)), search,
    ),
    "sweep": Plot(
        "Sweep", "Perplexity of calibration text that was held back, over the values of one "
        "option; the best is marked.", lambda r: bool(r.sweep), sweep,
    ),
    "sizes": Plot(
        "Size", "Bytes of the quantised linears, scales and zero points included.",
        lambda r: bool(r.linears), sizes,
    ),
}  # fmt: skip
