"""On-disk formats, one file each: pure functions between Codes and stored tensors.

``get(name)`` is the writer for ``--to NAME``; ``parse(quantization_config)`` is the Plan by which
a checkpoint is read. Nothing here opens a file or builds a module.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import CheckpointError, UnreadFormatError, UnsupportedError
from . import awq, bitsandbytes, compressed_tensors, gptq, own, smooth_quant
from .base import Format, Plan, Rule, Spec, field

__all__ = ["Format", "Plan", "Rule", "Spec", "WRITERS", "get", "parse"]

WRITERS: dict[str, Format] = {
    format.name: format
    for format in (
        compressed_tensors.PackQuantized(),
        compressed_tensors.IntQuantized(),
        awq.Gemm(),
        gptq.Gptq(),
        gptq.GptqV2(),
        bitsandbytes.LlmInt8(),
        smooth_quant.SmoothQuant(),
        own.Own(),
    )
}
READERS = {
    "compressed-tensors": compressed_tensors.parse,
    "awq": awq.parse,
    "gptq": gptq.parse,
    "bitsandbytes": bitsandbytes.parse,
    "smooth_quant": smooth_quant.parse,
    "fewbit": own.parse,
}


def get(name: str) -> Format:
    """The format that is written under ``name``."""
    if name not in WRITERS:
        raise UnsupportedError(f"format {name!r} is not known; {', '.join(WRITERS)} are")
    return WRITERS[name]


def parse(config: Mapping) -> Plan:
    """How a checkpoint with this ``quantization_config`` is stored."""
    if not isinstance(config, Mapping):
        raise CheckpointError(f"quantization_config must be an object, got {config!r:.80}")
    method = field(config, "quant_method", str)
    if method not in READERS:
        raise UnreadFormatError(
            f"quant_method {method!r} is not supported; {', '.join(READERS)} are"
        )
    return READERS[method](config)
