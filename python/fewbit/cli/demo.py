"""Quantise the embedded model and show what changed."""

from __future__ import annotations

from pathlib import Path

from . import Result

USAGE = "[-o DIR]"
EXAMPLE = "fewbit demo -o demo_out"


def arguments(parser) -> None:
    parser.add_argument(
        "-o", "--output", default="fewbit_demo", metavar="DIR", help="for figures and plot"
    )


def run(options) -> Result:
    from ..demo.run import run, table

    result = run(Path(options.output))
    return Result(result, table(result))
