"""The command line: the same words as the Python arguments, one sentence for every error.

One module a command: the first line of its docstring is its help, ``EXAMPLE`` its example,
``USAGE`` what follows its name, ``arguments(parser)`` its options, ``run(options)`` its Result.
Exit codes: 0 done, 2 wrong use, 3 stopped but resumable, 4 not supported.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .. import __version__, interrupt
from ..errors import FewbitError, ResumableStop
from ..scheme import MANY, check_int

COMMANDS = (
    "quantize", "estimate", "eval", "inspect", "convert", "report", "doctor", "explain", "demo",
    "bench",
    "completion",
)  # fmt: skip


class Result(NamedTuple):
    """What a command found: ``data`` for --json, ``text`` for a person."""

    data: dict
    text: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        if options.threads is not None:
            check_int("--threads", options.threads, 1, MANY)
            torch.set_num_threads(options.threads)
        with interrupt.prompt(lambda: _stopped(options), ResumableStop.exit_code):
            result = options.run(options)
        if int(os.environ.get("RANK", "0")) > 0:  # of torchrun's processes the first one speaks
            return 0
        if options.json:
            print(json.dumps(result.data, indent=1))
        elif not options.quiet:
            print(result.text)
    except FewbitError as error:
        print(f"fewbit {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(_stopped(options), file=sys.stderr)
        return ResumableStop.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _stopped(options) -> str:
    """What to say after Ctrl-C."""
    kept = ""
    if options.command == "quantize":
        from ..journal import folder_of

        if (Path(options.output) / "config.json").exists():  # it appears whole, by one rename
            kept = f"; {options.output} is finished all the same"
        elif folder_of(options.output).exists():
            kept = f"; finished layers are in {folder_of(options.output)}, the same command goes on"
    return f"fewbit {options.command}: interrupted{kept}"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; completion scripts are made from it too."""
    parser = argparse.ArgumentParser(
        prog="fewbit", description="Quantise language models after training, on a CPU or a GPU.",
        formatter_class=_formatter, epilog="fewbit COMMAND --help shows an example of each.",
    )
    parser.add_argument("--version", action="version", version=f"fewbit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __name__)
        text = module.__doc__.partition("\n")[0]
        sub = commands.add_parser(
            name, help=text[0].lower() + text[1:].rstrip("."), description=text,
            usage=f"fewbit {name} {module.USAGE}", epilog=f"example: {module.EXAMPLE}",
            formatter_class=_formatter,
        )
        sub.set_defaults(run=module.run)
        module.arguments(sub)
        sub.argument_default = None  # a command may have left its own options without defaults
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("--quiet", action="store_true", help="no progress, no tables")
        sub.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=26)
