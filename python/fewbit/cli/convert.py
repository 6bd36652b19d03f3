"""Rewrite a quantised directory in another format, without loss."""

from __future__ import annotations

from . import Result
from .inspect import engines

USAGE = "DIR OUT --to FORMAT [options]"
EXAMPLE = "fewbit convert OUT OUT_AWQ --to awq"


def arguments(parser) -> None:
    from ..formats import WRITERS

    add = parser.add_argument
    add("model", metavar="DIR", help="quantised model directory")
    add("output", metavar="OUT", help="directory to write")
    add("--to", required=True, metavar="FORMAT", help=", ".join((*WRITERS, "gguf")))
    add("--max-shard-size", type=int, default=5_000_000_000, metavar="BYTES", help="of one file")
    add("--allow-rounding", action="store_true", help="GGUF: float16 minima of asymmetric groups")


def run(options) -> Result:
    from ..conversion import convert
    from ..journal import check_output

    check_output(None, options.output)
    done = convert(
        options.model, options.output, options.to,
        max_shard_size=options.max_shard_size, rounding=options.allow_rounding,
    )
    data = {
        "from": done.source, "to": done.target, "linears": done.modules, "bytes": done.nbytes,
        "notes": done.notes, "engines": engines(done.verdicts),
    }
    return Result(data, str(done))
