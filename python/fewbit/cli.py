"""The command line: the same words as the Python arguments, one sentence for every error.

Exit codes: 0 done, 2 wrong use, 3 stopped but resumable, 4 not supported.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import __version__
from .errors import CheckpointError, FewbitError, UsageError

_EXAMPLES = {
    "quantize": "fewbit quantize MODEL_DIR -o OUT --method awq --calibration text.txt",
    "eval": "fewbit eval OUT --text text.txt --window 2048",
    "inspect": "fewbit inspect OUT",
    "convert": "fewbit convert OUT OUT_AWQ --to awq",
    "doctor": "fewbit doctor",
    "demo": "fewbit demo -o demo_out",
    "bench": "fewbit bench accuracy MODEL_DIR --text test.txt --calibration other.txt -o OUT",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        if options.threads is not None:
            if options.threads < 1:
                raise UsageError(f"--threads must be at least 1, got {options.threads}")
            torch.set_num_threads(options.threads)
        result = options.run(options)
    except FewbitError as error:
        print(f"fewbit {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"fewbit {options.command}: interrupted, nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if options.json:
        print(json.dumps(result, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fewbit", description="Quantise language models after training, on a CPU or a GPU."
    )
    parser.add_argument("--version", action="version", version=f"fewbit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".",
            epilog=f"example: {_EXAMPLES[name]}",
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("--quiet", action="store_true", help="no progress, no tables")
        sub.add_argument("--threads", type=int, metavar="N", help="CPU threads")
        return sub

    sub = command("quantize", _quantize, "turn a model directory into a quantised one")
    sub.add_argument("model", metavar="MODEL_DIR", help="float model: config.json, safetensors")
    sub.add_argument("-o", "--output", required=True, metavar="OUT", help="directory to write")
    sub.add_argument("--method", default="awq", help="rtn, awq, ... or a stack as awq+gptq")
    sub.add_argument("--scheme", help="grid as text, e.g. w4a16g128; or the next three options")
    sub.add_argument("--bits", type=int, help="bits of a weight (4)")
    sub.add_argument("--group-size", type=int, help="weights per scale, -1 for rows (128)")
    sub.add_argument("--symmetric", action="store_true", default=None, help="fixed zero point")
    sub.add_argument("--calibration", metavar="FILE", help="UTF-8 text to calibrate on")
    sub.add_argument("--window", type=int, default=512, help="calibration tokens a window (512)")
    sub.add_argument("--samples", type=int, default=32, help="calibration windows (32)")
    sub.add_argument("--format", default="compressed-tensors", help="layout on disk")
    sub.add_argument(
        "--dtype", choices=["source", "float16", "bfloat16", "float32"], default="source",
        help="type of what stays float (as in MODEL_DIR)",
    )

    sub = command("eval", _eval, "measure perplexity on a text")
    sub.add_argument("model", metavar="DIR", help="float or quantised model directory")
    sub.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    sub.add_argument("--window", type=int, default=2048, help="tokens a window (2048)")
    sub.add_argument("--stride", type=int, help="tokens between windows (= window)")
    sub.add_argument("--limit", type=int, help="at most this many windows")

    sub = command("inspect", _inspect, "say what a quantised directory holds")
    sub.add_argument("model", metavar="DIR")

    sub = command("convert", _convert, "rewrite a quantised directory in another format")
    sub.add_argument("model", metavar="DIR")
    sub.add_argument("output", metavar="OUT")
    sub.add_argument("--to", required=True, metavar="FORMAT", help="awq, gptq, gguf, ...")
    sub.add_argument("--max-shard-size", type=int, default=5_000_000_000, metavar="BYTES")
    sub.add_argument(
        "--allow-rounding", action="store_true", help="GGUF: float16 minima of asymmetric groups"
    )

    command("doctor", _doctor, "check this installation")

    sub = command("bench", _bench, "measure every method on every scheme: table, JSON and plot")
    sub.add_argument("what", choices=["accuracy"])
    sub.add_argument("model", metavar="MODEL_DIR", help="float model directory")
    sub.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to score")
    sub.add_argument("--calibration", required=True, metavar="FILE", help="another UTF-8 text")
    sub.add_argument("-o", "--output", required=True, metavar="OUT", help="directory; resumed")
    sub.add_argument("--schemes", nargs="+", metavar="S", help="columns, e.g. w4a16g128 w4a4")
    sub.add_argument("--methods", nargs="+", metavar="M", help="rows, e.g. rtn awq gptq")
    sub.add_argument("--window", type=int, default=256, help="tokens a window (256)")
    sub.add_argument("--windows", type=int, default=64, help="windows that are scored (64)")
    sub.add_argument("--samples", type=int, default=32, help="calibration windows (32)")

    sub = command("demo", _demo, "quantise the embedded model and show what changed")
    sub.add_argument("-o", "--output", default="fewbit_demo", help="directory for table and plot")
    return parser


def _quantize(options) -> dict:
    from . import formats
    from .checkpoint import check_fits, load, load_float, load_tokenizer, save
    from .convert import verdicts
    from .pipeline import quantize_
    from .recipes import build
    from .shards import Shards

    recipe = build(options.method, _scheme(options))
    formats.get(options.format)
    _check_output(options.output)
    if options.calibration is None and recipe.needs_stats:
        raise UsageError(f"method {options.method!r} needs --calibration FILE")
    if options.calibration is not None:
        from .calibrate import read_text

        read_text(options.calibration)
    source_dtype = _stored_dtype(Shards(options.model))
    model = load_float(options.model)
    check_fits(model, recipe, options.format)
    tokenizer = load_tokenizer(options.model)
    calibration = None if options.calibration is None else Path(options.calibration)
    report = quantize_(
        model, recipe, calibration=calibration, tokenizer=tokenizer, window=options.window,
        samples=options.samples, keep_float=False, progress=not options.quiet,
    )
    dtype = source_dtype if options.dtype == "source" else getattr(torch, options.dtype)
    model.to(dtype)
    save(model, options.output, options.format, tokenizer)
    load(options.output)  # what was written is a whole checkpoint
    report.save(Path(options.output) / "fewbit_report.json")
    engines = "\n".join(f"  {verdict}" for verdict in verdicts(options.output))
    _say(options, f"{report}\n  written   {options.output} ({options.format})\n{engines}")
    return report.to_dict()


def _scheme(options):
    from .scheme import Scheme

    names = ("bits", "group_size", "symmetric")
    given = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    return Scheme.parse(options.scheme or "w4a16g128", **given)


def _check_output(path: str) -> None:
    """Before hours of work: an output that cannot be written, or would be overwritten."""
    out = Path(path)
    if out.exists() and not out.is_dir():
        raise UsageError(f"the output {path!r} exists and is not a directory")
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"the output directory {path!r} is not empty")
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise UsageError(f"the output {path!r} cannot be written: no permission in {parent}")


def _stored_dtype(shards) -> torch.dtype:
    """The float type that most of a directory's bytes are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for entry in shards.entries.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    if not sizes:
        raise CheckpointError(f"{shards.path} holds no float tensors")
    return max(sizes, key=sizes.__getitem__)


def _eval(options) -> dict:
    from .calibrate import read_text, tokenize
    from .checkpoint import load_any, load_tokenizer
    from .evaluate import perplexity
    from .shards import Shards

    text = read_text(options.text)
    Shards(options.model)
    tokens = tokenize(text, load_tokenizer(options.model))
    model = load_any(options.model)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and options.window > limit:
        raise UsageError(
            f"--window {options.window} is above the model's {limit} positions: "
            f"use --window {limit}"
        )
    result = perplexity(model, tokens, options.window, options.stride, options.limit)
    _say(options, f"perplexity {result}")
    return result.to_dict()


def _inspect(options) -> dict:
    from . import formats
    from .convert import verdicts
    from .shards import Shards
    from .stored import find

    shards = Shards(options.model)
    if "quantization_config" not in shards.config:
        raise CheckpointError(f"{options.model} is not quantised")
    plan = formats.parse(shards.config["quantization_config"])
    stored = find(shards, plan)
    schemes: dict[str, int] = {}
    for linear in stored.values():
        schemes[str(linear.scheme)] = schemes.get(str(linear.scheme), 0) + 1
    weights = sum(s.out_features * s.in_features for s in stored.values())
    names = {full for s in stored.values() for full in s.names.values()}
    packed = sum(shards.entries[n].nbytes for n in names)
    total = sum(e.nbytes for e in shards.entries.values())
    result = {
        "model": shards.config.get("model_type"),
        "format": plan.format.name,
        "schemes": schemes,
        "linears": len(stored),
        "weights": weights,
        "bytes_packed": packed,
        "bytes_total": total,
        "bits_per_weight": 8 * packed / max(weights, 1),
    }
    found = verdicts(options.model)
    lines = [f"{key:<16} {value}" for key, value in result.items()] + [str(v) for v in found]
    result["engines"] = {v.engine: {"loads": v.loads, "reason": v.reason} for v in found}
    _say(options, "\n".join(lines))
    return result


def _convert(options) -> dict:
    from .convert import convert

    _check_output(options.output)
    done = convert(
        options.model, options.output, options.to,
        max_shard_size=options.max_shard_size, rounding=options.allow_rounding,
    )
    _say(options, str(done))
    return {
        "from": done.source, "to": done.target, "linears": done.modules, "bytes": done.nbytes,
        "engines": {v.engine: {"loads": v.loads, "reason": v.reason} for v in done.verdicts},
    }


def _doctor(options) -> dict:
    from .doctor import examine

    findings = examine()
    for finding in findings:
        _say(options, str(finding))
    return {f.what: {"state": f.state, "fix": f.fix} for f in findings}


def _demo(options) -> dict:
    from .demo.run import run

    return run(Path(options.output), show=not options.quiet and not options.json)


def _bench(options) -> dict:
    from .bench.accuracy import markdown, run

    result = run(
        options.model, options.text, options.calibration, options.output, schemes=options.schemes,
        methods=options.methods, window=options.window, windows=options.windows,
        samples=options.samples, say=lambda line: _say(options, line),
    )
    _say(options, f"\n{markdown(result)}")
    return result


def _say(options, text: str) -> None:
    if not options.quiet and not options.json:
        print(text)


