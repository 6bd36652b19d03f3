"""Measure perplexity, agreement with the float model, tasks, speed and memory."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from ..report import REPORT
from . import Result

USAGE = "DIR --text FILE [options]"
EXAMPLE = "fewbit eval OUT --text text.txt --window 2048 --against MODEL_DIR"


def arguments(parser) -> None:
    add = parser.add_argument
    add("model", metavar="DIR", help="float or quantised model directory")
    add("--text", metavar="FILE", help="UTF-8 text for perplexity, agreement and speed")
    add("--window", type=int, default=2048, metavar="N", help="tokens a window (2048)")
    add("--stride", type=int, metavar="N", help="tokens between windows (= window)")
    add("--limit", type=int, metavar="N", help="at most this many windows, or task samples")
    add("--against", metavar="MODEL_DIR", help="float original: KL divergence, top-1 agreement")
    add("--speed", action="store_true", help="tokens a second, memory")
    add("--tasks", metavar="A,B", help="tasks of lm-eval, by name")
    add("--task-dir", metavar="DIR", help="folder with more lm-eval tasks")
    add("--save", action="store_true", help=f"add the results to {REPORT} and README.md")


def run(options) -> Result:
    from .. import card
    from ..calibrate import read_text, tokenize
    from ..checkpoint import load_any, load_tokenizer
    from ..evaluate import agreement, lm_eval_tasks, perplexity, speed
    from ..report import Report
    from ..shards import Shards

    if options.text is None and (options.tasks is None or options.against or options.speed):
        raise UsageError("--text FILE is needed for everything but --tasks")
    report = Report.load(Path(options.model) / REPORT) if options.save else None
    text = None if options.text is None else read_text(options.text)
    Shards(options.model)
    tokenizer = load_tokenizer(options.model)
    model = load_any(options.model)
    found = {}
    if text is not None:
        _check_window(model, options.window)
        tokens = tokenize(text, tokenizer)
        found["perplexity"] = perplexity(
            model, tokens, options.window, options.stride, options.limit
        )
        if options.against:
            reference = load_any(options.against)
            found["against"] = agreement(model, reference, tokens, options.window, options.limit)
        if options.speed:
            found["speed"] = speed(model, tokens, min(128, options.window // 2), 32)
    data = {key: value.to_dict() for key, value in found.items()}
    lines = [f"{key:<11} {value!s}" for key, value in found.items()]
    if options.tasks:
        names = options.tasks.split(",")
        data["tasks"] = lm_eval_tasks(model, tokenizer, names, options.limit, options.task_dir)
        for task, values in data["tasks"].items():
            shown = ", ".join(f"{key} {value:.4f}" for key, value in values.items())
            lines.append(f"{task:<11} {shown}")
    if report is not None:
        name = None if options.text is None else Path(options.text).name
        report.evaluations.append({"text": name, **data})
        report.save(Path(options.model) / REPORT)
        card.write(options.model, report)
    return Result(data, "\n".join(lines))


def _check_window(model, window: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and window > limit:
        raise UsageError(
            f"--window {window} is above the model's {limit} positions: use --window {limit}"
        )
