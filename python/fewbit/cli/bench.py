"""Measure every method on every scheme: table, JSON and plot."""

from __future__ import annotations

from . import Result

USAGE = "accuracy MODEL_DIR --text FILE --calibration FILE -o OUT [options]"
EXAMPLE = "fewbit bench accuracy MODEL_DIR --text test.txt --calibration other.txt -o OUT"


def arguments(parser) -> None:
    add = parser.add_argument
    add("what", choices=["accuracy"], metavar="accuracy", help="what to measure")
    add("model", metavar="MODEL_DIR", help="float model directory")
    add("--text", required=True, metavar="FILE", help="UTF-8 text to score")
    add("--calibration", required=True, metavar="FILE", help="another UTF-8 text")
    add("-o", "--output", required=True, metavar="OUT",
        help="directory; resumed, and shared with calls beside it")  # fmt: skip
    add("--schemes", nargs="+", metavar="S", help="columns, e.g. w4a16g128 w4a4")
    add("--methods", nargs="+", metavar="M", help="rows, e.g. rtn awq gptq")
    add("--window", type=int, default=256, metavar="N", help="tokens a window (256)")
    add("--windows", type=int, default=64, metavar="N", help="windows that are scored (64)")
    add("--samples", type=int, default=32, metavar="N", help="calibration windows (32)")


def run(options) -> Result:
    from ..bench.accuracy import markdown, run

    shown = not options.quiet and not options.json
    result = run(
        options.model, options.text, options.calibration, options.output, schemes=options.schemes,
        methods=options.methods, window=options.window, windows=options.windows,
        samples=options.samples, say=print if shown else lambda line: None,
    )
    return Result(result, f"\n{markdown(result)}")
