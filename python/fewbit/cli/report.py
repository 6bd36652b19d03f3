"""Write the report of a run as one HTML file, and print its summary."""

from __future__ import annotations

from pathlib import Path

from ..report import REPORT
from . import Result

USAGE = "OUT [-o FILE]"
EXAMPLE = "fewbit report OUT -o report.html"


def arguments(parser) -> None:
    add = parser.add_argument
    add("source", metavar="OUT", help=f"directory with a {REPORT}, or the file itself")
    add("-o", "--output", metavar="FILE", help="HTML to write (OUT/fewbit_report.html)")


def run(options) -> Result:
    from ..report import Report

    source = Path(options.source)
    source = source / REPORT if source.is_dir() else source
    report = Report.load(source)
    target = Path(options.output) if options.output else source.with_suffix(".html")
    report.save_html(target)
    return Result({**report.to_dict(), "html": str(target)}, f"{report}\n  written   {target}")
