"""Turn a float model directory into a quantised one."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from .. import recipe_file
from ..errors import AlreadyQuantizedError, MissingCalibrationError, OutputError, UsageError
from . import Result

USAGE = "MODEL_DIR -o OUT [options]"
EXAMPLE = "fewbit quantize MODEL_DIR -o OUT --method awq --calibration text.txt"
DTYPES = ("source", "float16", "bfloat16", "float32")
REPORT, RECIPE = "fewbit_report.json", "fewbit_recipe.toml"


def arguments(parser) -> None:
    # Without defaults: what is not said here may be said by the recipe file.
    add = parser.add_argument
    parser.argument_default = argparse.SUPPRESS
    add("model", metavar="MODEL_DIR", nargs="?", help="config.json and safetensors, float")
    add("-o", "--output", required=True, metavar="OUT", help="directory to write")
    add("--recipe", metavar="FILE", help=f"TOML, as {RECIPE} in OUT; flags override it")
    add("--method", help="rtn, awq, gptq, ... or a stack as awq+gptq (awq)")
    add("--set", action="append", metavar="NAME=VALUE", help="option of the method, repeatable")
    add("--scheme", help="grid as text (w4a16g128); or the next three options")
    add("--bits", type=int, metavar="N", help="bits of a weight")
    add("--group-size", type=int, metavar="N", help="weights a scale, -1 for rows")
    add("--symmetric", action="store_true", help="fixed zero point")
    add("--calibration", metavar="FILE", help="UTF-8 text to calibrate on")
    add("--window", type=int, metavar="N", help="calibration tokens a window (512)")
    add("--samples", type=int, metavar="N", help="calibration windows (32)")
    add("--format", help="layout on disk (compressed-tensors)")
    add("--dtype", choices=DTYPES, metavar="TYPE", help=f"of what stays float: {', '.join(DTYPES)}")


def run(options) -> Result:
    from .. import formats
    from ..checkpoint import check_fits, load, load_float, load_tokenizer, save
    from ..conversion import verdicts
    from ..pipeline import quantize_
    from ..shards import Shards

    given = recipe_file.merge(vars(options))
    recipe = recipe_file.build(given)
    formats.get(given["format"])
    check_output(options.output)
    if given["model"] is None:
        raise UsageError("MODEL_DIR is missing, and no recipe file names a model")
    if given["calibration"] is None and recipe.needs_stats:
        raise MissingCalibrationError(f"method {given['method']!r} needs --calibration FILE")
    if given["calibration"] is not None:
        from ..calibrate import read_text

        read_text(given["calibration"])
    source_dtype = _stored_dtype(Shards(given["model"]))
    model = load_float(given["model"])
    check_fits(model, recipe, given["format"])
    tokenizer = load_tokenizer(given["model"])
    calibration = None if given["calibration"] is None else Path(given["calibration"])
    report = quantize_(
        model, recipe, calibration=calibration, tokenizer=tokenizer, window=given["window"],
        samples=given["samples"], keep_float=False, progress=not options.quiet,
    )
    model.to(source_dtype if given["dtype"] == "source" else getattr(torch, given["dtype"]))
    save(model, options.output, given["format"], tokenizer, report=report)
    load(options.output)  # what was written is a whole checkpoint
    out = Path(options.output)
    report.save(out / REPORT)
    recipe_file.write(out / RECIPE, given, recipe.scheme)
    engines = "\n".join(f"  {verdict}" for verdict in verdicts(out))
    text = f"{report}\n  written   {out} ({given['format']})\n{engines}"
    return Result(report.to_dict(), text)


def check_output(path: str) -> None:
    """Before hours of work: an output that cannot be written, or would be overwritten."""
    out = Path(path)
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {path!r} exists and is not a directory")
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"the output directory {path!r} is not empty")
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"the output {path!r} cannot be written: no permission in {parent}")


def _stored_dtype(shards) -> torch.dtype:
    """The float type that most of a directory's bytes are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for entry in shards.entries.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    if not sizes:
        raise AlreadyQuantizedError(f"{shards.path} holds no float tensors")
    return max(sizes, key=sizes.__getitem__)
