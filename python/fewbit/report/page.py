"""One HTML file from a report: no script, no network, plots as SVG that follow light and dark."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from ..errors import MissingExtraError
from .plots import PLOTS

if TYPE_CHECKING:
    from . import Report

INK = "#123456"  # drawn in this colour, replaced by the page's own
TEMPLATE = Path(__file__).with_name("page.html")


def page(report: Report) -> str:
    """The whole page."""
    name = report.recipe["name"]
    calibration = report.calibration
    source = (
        f"calibrated on {calibration['tokens']:,} tokens of {calibration['source']}"
        if calibration else "without calibration"
    )  # fmt: skip
    if report.converted:
        source += f", converted from {', '.join(report.converted)}"
    sections = (_evaluations, _plots, _fallbacks, _linears, _certificates, _settings)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{name}: {report.model}"),
        subtitle=escape(f"{len(report.linears)} linears, {source}, {report.seconds:.1f} s"),
        tiles="".join(f'<div class="tile"><b>{v}</b>{k}</div>' for k, v in _tiles(report).items()),
        sections="\n".join(section(report) for section in sections),
    )


def _tiles(report: Report) -> dict[str, str]:
    errors = [r.relative_error for r in report.linears] or [0.0]
    return {
        "bits a weight": f"{report.bits_per_weight:.2f}",
        "MiB, was " + f"{report.bytes_before / 2**20:,.1f}": f"{report.bytes_after / 2**20:,.1f}",
        "mean relative error": f"{sum(errors) / len(errors):.1e}",
        "worst relative error": f"{max(errors):.1e}",
        "fallbacks": str(len(report.fallbacks)),
    }


def _evaluations(report: Report) -> str:
    rows = [
        (entry.get("text") or "", what, *_result(what, values), entry.get("format", ""))
        for entry in report.evaluations
        for what, values in entry.items() if what not in ("text", "format")
    ]  # fmt: skip
    if not rows:
        return ""
    head = ("text", "what", "result", "protocol", "measured in format")
    columns = len(head) if report.converted else 4
    return _section("Evaluation", _table(head[:columns], [row[:columns] for row in rows], ()))


def _result(what: str, values: dict) -> tuple[str, str]:
    """A figure, and how it was measured."""
    if what == "perplexity":
        protocol = "{windows} windows of {window} tokens, stride {stride}, no BOS, {predictions} "
        return f"{values['value']:.4f}", protocol.format_map(values) + "predictions"
    if what == "against":
        protocol = "{windows} windows of {window} tokens, no BOS".format_map(values)
        return f"KL {values['kl']:.2e} nats, top-1 {100 * values['top1']:.2f} %", protocol
    if what == "speed":
        protocol = "batch 1, {prompt} + {new} tokens, {threads} threads".format_map(values)
        return f"{values['prefill']:.0f} / {values['decode']:.1f} tokens/s", protocol
    return json.dumps(values), "lm-eval"


def _plots(report: Report) -> str:
    figures = []
    try:
        for plot in PLOTS.values():
            if plot.has(report):
                figures.append(
                    f"<figure><h3>{plot.title}</h3>{svg(plot.draw(report))}"
                    f"<figcaption>{plot.caption}</figcaption></figure>"
                )
    except MissingExtraError as error:
        return f"<p>{escape(str(error))}</p>"
    return f'<div class="plots">{"".join(figures)}</div>'


def svg(figure) -> str:
    """A matplotlib figure as inline SVG whose text and axes have the page's colour."""
    for axes in figure.axes:
        axes.tick_params(which="both", colors=INK)
        axes.patch.set_alpha(0)
        for item in (axes.xaxis.label, axes.yaxis.label, axes.title, *axes.texts):
            item.set_color(INK)
        for spine in axes.spines.values():
            spine.set_color(INK)
        legend = axes.get_legend()
        if legend is not None:
            for text in (*legend.get_texts(), legend.get_title()):
                text.set_color(INK)
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text[text.index("<svg") :], count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # Identifiers are of one figure; on the page they must not meet those of another.
    tag = f"f{id(figure):x}-"
    text = re.sub(r'\bid="', f'id="{tag}', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{tag}", text)
    return text.replace(INK, "currentColor")


def _fallbacks(report: Report) -> str:
    rows = [
        (r.name, r.rung, r.info.get("ladder", ""), r.info.get("reason", ""))
        for r in report.fallbacks
    ]
    if not rows:
        return ""
    return _section("Fallbacks", _table(("linear", "rung", "step", "reason"), rows, (1,)))


def _linears(report: Report) -> str:
    head = ("linear", "scheme", "bits", "KiB before", "after", "relative error", "of", "tokens",
            "rung", "seconds")  # fmt: skip
    rows = [
        (
            r.name, r.scheme, f"{8 * r.bytes_after / max(r.weights, 1):.2f}",
            f"{r.bytes_before / 1024:,.0f}", f"{r.bytes_after / 1024:,.0f}",
            f"{r.relative_error:.2e}", r.measured, f"{r.tokens:,}", r.rung, f"{r.seconds:.2f}",
        )
        for r in report.linears
    ]  # fmt: skip
    table = _table(head, rows, (2, 3, 4, 5, 7, 8, 9))
    return _section("Linears", f"<details><summary>{len(rows)} linears</summary>{table}</details>")


def _certificates(report: Report) -> str:
    if not report.certificates:
        return ""
    rows = [(c["path"], f"{c['error']:.1e}", f"{c['bound']:.1e}") for c in report.certificates]
    note = (
        "<p>The transformed float model computes what the original did: the output of each part "
        "moved by less than rounding explains.</p>"
    )
    table = _table(("part", "moved by", "rounding allows"), rows, (1, 2))
    return _section(
        "Certificates", f"{note}<details><summary>{len(rows)} parts</summary>{table}</details>"
    )


def _settings(report: Report) -> str:
    blocks = {"recipe": report.recipe, "calibration": report.calibration,
              "environment": report.environment}  # fmt: skip
    text = escape(json.dumps(blocks, indent=1))
    title = "Settings and environment"
    return _section(title, f"<details><summary>as JSON</summary><pre>{text}</pre></details>")


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>\n{body}"


def _table(head: Sequence[str], rows: Iterable[Sequence], numbers: Sequence[int]) -> str:
    """``numbers``: the columns that are aligned to the right."""

    def line(cells: Sequence, tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in numbers else ''}>{escape(str(cell))}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{line(head, "th")}</tr>{body}</table></div>'
