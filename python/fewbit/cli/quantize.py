"""Turn a float model directory into a quantised one."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from .. import recipe_file
from ..distributed import BACKENDS
from ..errors import MissingCalibrationError, UsageError
from ..recipe_file import DEFAULTS, RECIPE
from . import Result

USAGE = "MODEL_DIR -o OUT [options]"
EXAMPLE = "fewbit quantize MODEL_DIR -o OUT --method awq --calibration text.txt"
DTYPES = ("source", "float16", "bfloat16", "float32")


def arguments(parser) -> None:
    run_arguments(parser)
    add = parser.add_argument
    add("-o", "--output", required=True, metavar="OUT", help="directory to write")
    add("--restart", action="store_true", default=False, help="forget an unfinished run to OUT")


def run_arguments(parser) -> None:
    """What a run depends on: the same options for ``estimate``."""
    from ..formats import WRITERS
    from ..recipes import METHODS

    # Without defaults: what is not said here may be said by the recipe file.
    add = parser.add_argument
    parser.argument_default = argparse.SUPPRESS
    add("model", metavar="MODEL_DIR", nargs="?", help="config.json and safetensors, float")
    add("--recipe", metavar="FILE", help=f"TOML, as {RECIPE} in OUT; flags override it")
    add("--method", metavar="M", help=f"{', '.join(METHODS)}, stacked with + (awq)")
    add("--set", action="append", metavar="NAME=VALUE", help="option of the method, repeatable")
    add("--scheme", metavar="S", help="grid as text (w4a16g128); or the next three options")
    add("--bits", type=int, metavar="N", help="bits of a weight")
    add("--group-size", type=int, metavar="N", help="weights a scale, -1 for rows")
    add("--symmetric", action="store_true", help="fixed zero point")
    add("--calibration", metavar="FILE", help="UTF-8 text to calibrate on")
    add("--window", type=int, metavar="N", help="calibration tokens a window (512)")
    add("--samples", type=int, metavar="N", help="calibration windows (32)")
    add("--format", metavar="F", help=f"{', '.join(WRITERS)} ({DEFAULTS['format']})")
    add("--dtype", choices=DTYPES, metavar="TYPE", help=f"of floats: {', '.join(DTYPES)}")
    add("--memory", metavar="BYTES", default=None, help="limit of this process, e.g. 3GiB")
    add("--device", choices=tuple(BACKENDS), default="cpu", help="where layers are computed")


def settings(options) -> tuple[dict, dict]:
    """What flags and recipe file say, and the same as arguments of the library."""
    given = recipe_file.merge(vars(options))
    recipe = recipe_file.build(given)
    if given["model"] is None:
        raise UsageError("MODEL_DIR is missing, and no recipe file names a model")
    if given["calibration"] is None and recipe.needs_stats:
        raise MissingCalibrationError(f"method {given['method']!r} needs --calibration FILE")
    if given["calibration"] is not None:
        from ..calibrate import read_text

        read_text(given["calibration"])
    return given, {
        "path": given["model"],
        "method": recipe,
        "calibration": None if given["calibration"] is None else Path(given["calibration"]),
        "window": given["window"],
        "samples": given["samples"],
        "format": given["format"],
        "dtype": None if given["dtype"] == "source" else getattr(torch, given["dtype"]),
        "memory": None if options.memory is None else byte_count(options.memory),
        "device": options.device,
    }


def byte_count(text: str) -> int:
    """'3GiB', '1.5 GB' or '800MiB' as bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"--memory {text!r} is not a number of bytes such as 3GiB or 800MB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def run(options) -> Result:
    from ..conversion import verdicts
    from ..reproducible import strict
    from ..stream import quantize_directory

    strict()
    given, named = settings(options)
    out = Path(options.output)
    repeat = recipe_file.text(out / RECIPE, given, named["method"].scheme)
    report = quantize_directory(
        **named,
        output=out,
        restart=options.restart,
        progress=not options.quiet,
        files={RECIPE: repeat.encode()},
    )
    engines = "\n".join(f"  {verdict}" for verdict in verdicts(out))
    text = f"{report}\n  written   {out} ({given['format']})\n{engines}"
    return Result(report.to_dict(), text)
