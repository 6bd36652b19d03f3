"""Choose one option of a method by what it does to text that the method has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from .calibrate import Windows, windows
from .errors import CalibrationError, UsageError
from .evaluate import perplexity
from .pipeline import quantize_
from .report import Report
from .scheme import Scheme
from .undo import restore_


def sweep_(
    model: nn.Module,
    method: str,
    scheme: Scheme | str,
    calibration,
    tokenizer=None,
    *,
    option: str,
    values: Sequence,
    held_out: int = 8,
    window: int = 512,
    samples: int | None = 32,
    keep_float: bool = True,
    progress: bool = True,
    **options,
) -> Report:
    """``quantize_`` with the value of ``option`` that has the least perplexity, in place.

        sweep_(model, "smoothquant", "w8a8", text, tokenizer, option="alpha", values=(0.5, 0.7))

    The last ``held_out`` calibration windows measure and are not calibrated on. The result's
    ``sweep`` holds the curve: option, values, perplexity of each, that of the float model, and the
    best value, the sweet spot. Other arguments are those of ``quantize_``.
    """
    if not values:
        raise UsageError(f"there are no values of {option} to compare")
    data = windows(calibration, tokenizer, window, samples)
    if not 0 < held_out < len(data.batches):
        raise CalibrationError(
            f"held_out must leave windows to calibrate on: got {held_out} of {len(data.batches)}"
        )
    seen, unseen = (
        Windows(data.batches[part], data.masks[part], data.source)
        for part in (slice(-held_out), slice(-held_out, None))
    )
    base, curve = held_out_perplexity(model, unseen), []
    for value in values:
        quantize_(model, method, scheme, seen, progress=False, **{**options, option: value})
        curve.append(held_out_perplexity(model, unseen))
        restore_(model)
    best = min(range(len(curve)), key=curve.__getitem__)
    chosen = {**options, option: values[best]}
    report = quantize_(
        model, method, scheme, seen, keep_float=keep_float, progress=progress, **chosen
    )
    report.sweep = {
        "option": option, "values": list(values), "perplexity": curve, "float": base,
        "best": values[best],
    }
    return report


def held_out_perplexity(model: nn.Module, data: Windows) -> float:
    """Over all predictions of the windows' real tokens."""
    total = count = 0
    for ids, mask in zip(data.batches, data.masks, strict=True):
        row = ids.reshape(-1) if mask is None else ids[mask]
        if len(row) > 1:
            result = perplexity(model, row, len(row))
            total, count = total + result.nll * result.predictions, count + result.predictions
    if not count:
        raise CalibrationError("the held-out windows have no two tokens in a row to predict")
    return math.exp(min(total / count, 700.0))
