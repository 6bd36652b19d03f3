"""Say what quantize would take: memory, disk, time."""

from __future__ import annotations

from . import Result
from .quantize import run_arguments, settings

USAGE = "MODEL_DIR [options of quantize]"
EXAMPLE = "fewbit estimate MODEL_DIR --method gptq --calibration text.txt"


def arguments(parser) -> None:
    run_arguments(parser)


def run(options) -> Result:
    from ..stream import plan_directory

    plan = plan_directory(**settings(options)[1])
    return Result(plan.to_dict(), str(plan))
