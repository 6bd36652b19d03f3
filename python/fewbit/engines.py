"""Which engine loads a checkpoint: each one's published constraints, as data that can be printed.

Read from the loaders of vLLM 0.33, TGI (2026-01), LMDeploy 0.16 and transformers 5.23; no engine is
run here. A verdict is about format and shapes, not about whether an engine knows the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from .scheme import FLOAT_BITS, Scheme

KERNEL_GROUPS = (-1, 32, 64, 128)
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Verdict(NamedTuple):
    """``loads``, and why not, or what to know."""

    engine: str
    loads: bool
    reason: str = ""

    def __str__(self) -> str:
        if self.loads:
            return f"{self.engine}: loads" + (f" ({self.reason})" if self.reason else "")
        return f"{self.engine}: refused because {self.reason}"


class Facts(NamedTuple):
    """What a verdict rests on: the format's name, and scheme and shape of each quantised Linear."""

    format: str
    schemes: Mapping[str, Scheme]
    shapes: Mapping[str, tuple[int, int]]
    skipped: tuple[str, ...] = ()  # Linears left float, the head apart

    def all_schemes(self) -> list[Scheme]:
        return sorted(set(self.schemes.values()), key=str)


def validate(facts: Facts) -> list[Verdict]:
    """One Verdict per engine."""
    return [
        Verdict(engine, why is None, note if why is None else why)
        for engine, rules in ENGINES.items()
        for why, note in [rules(facts)]
    ]


Answer = tuple[str | None, str]  # why it is refused, or what to know when it loads


def _vllm(facts: Facts) -> Answer:
    for why in _unequal_fused(facts):
        return why, ""
    for name, scheme in facts.schemes.items():
        n, k = facts.shapes[name]
        group = scheme.group_of(k)
        if facts.format in ("gptq", "gptq_v2"):
            if scheme.bits not in (4, 8) or not scheme.symmetric:
                return f"GPTQ must be symmetric with 4 or 8 bits, {name} is {scheme}", ""
            if scheme.group_size not in KERNEL_GROUPS:
                return f"group_size must be one of {KERNEL_GROUPS}, {name} is {scheme}", ""
        elif facts.format == "compressed-tensors":
            if not scheme.symmetric and (scheme.bits != 4 or n % 8):
                what = f"{name} is {scheme} with {n} outputs"
                return f"asymmetric weights need 4 bits and outputs in eights, {what}", ""
        elif facts.format == "int-quantized" and scheme.activation_bits == FLOAT_BITS:
            return "int-quantized needs quantised activations", ""
        if k % group:
            return f"{name}: {k} inputs are not a multiple of group_size {group}", ""
    if facts.format == "llm-int8":
        return "LLM.int8() files need the out-of-tree vllm-bnb-plugin", ""
    if facts.format == "gguf":
        return "GGUF needs an out-of-tree plugin", ""
    if facts.format in ("smooth_quant", "fewbit"):
        return f"it does not read {facts.format}", ""
    rows, columns = (16, 16) if facts.format == "int-quantized" else (128, 64)
    odd = [name for name, (n, k) in facts.shapes.items() if n % rows or k % columns]
    note = f"slower kernels for {len(odd)} layers off the {rows} x {columns} grid"
    return None, note if odd else ""


def _tgi(facts: Facts) -> Answer:
    if facts.format not in ("awq", "gptq", "compressed-tensors", "int-quantized"):
        return f"it does not read {facts.format}", ""
    if facts.format in ("awq", "gptq") and facts.skipped:
        return f"it expects every decoder linear quantised, {facts.skipped[0]} is float", ""
    for name, scheme in facts.schemes.items():
        if facts.format == "compressed-tensors":
            if scheme.bits not in (4, 8) or not scheme.symmetric:
                return f"it reads symmetric 4 and 8-bit weights, {name} is {scheme}", ""
        kernel = scheme.group_size in KERNEL_GROUPS and scheme.symmetric
        if facts.format == "gptq" and scheme.bits != 4 and not (scheme.bits == 8 and kernel):
            return f"its kernels run 4 bits, or symmetric 8 bits; {name} is {scheme}", ""
    static = any(s.activations == "static" for s in facts.schemes.values())
    note = "activations are scaled dynamically all the same" if static else ""
    return None, note if facts.format == "int-quantized" else ""


def _turbomind(facts: Facts) -> Answer:
    sizes = {"awq": (128,), "gptq": (128,), "compressed-tensors": (32, 128)}.get(facts.format)
    if sizes is None:
        return f"it does not read {facts.format}", ""
    if len(facts.all_schemes()) > 1:
        return f"it reads one scheme a model, not {', '.join(map(str, facts.all_schemes()))}", ""
    scheme = facts.all_schemes()[0]
    if scheme.bits != 4 or scheme.group_size not in sizes:
        return f"it needs 4 bits in groups of {' or '.join(map(str, sizes))}, not {scheme}", ""
    if facts.format == "gptq" and not scheme.symmetric:
        return "GPTQ must be symmetric", ""
    return None, "activations in float16"


def _lmdeploy_pytorch(facts: Facts) -> Answer:
    if facts.format not in ("awq", "smooth_quant"):
        return f"it does not read {facts.format}", ""
    return None, ""


def _transformers(facts: Facts) -> Answer:
    if facts.format in ("awq", "gptq", "gptq_v2"):
        return None, "with fewbit imported, or gptqmodel installed"
    if facts.format == "compressed-tensors":
        if all(s.symmetric for s in facts.schemes.values()):
            return None, "with fewbit imported, or compressed-tensors installed"
        return None, "with fewbit imported; compressed-tensors alone needs dequantize=True"
    if facts.format == "int-quantized":
        return (
            None,
            "with fewbit imported, or compressed-tensors installed, which computes in float",
        )
    if facts.format == "llm-int8":
        return None, "with bitsandbytes installed, or by fewbit.load"
    if facts.format == "gguf":
        return None, 'dequantised, with gguf_file="model.gguf"'
    return None, "with fewbit imported"


def _llama_cpp(facts: Facts) -> Answer:
    if facts.format != "gguf":
        return f"it reads GGUF, not {facts.format}", ""
    return None, ""


ENGINES: dict[str, Callable[[Facts], Answer]] = {
    "vLLM": _vllm,
    "TGI": _tgi,
    "LMDeploy TurboMind": _turbomind,
    "LMDeploy PyTorch": _lmdeploy_pytorch,
    "transformers": _transformers,
    "llama.cpp": _llama_cpp,
}


def _unequal_fused(facts: Facts) -> Iterator[str]:
    """Linears that engines fuse must share one scheme, or all be float."""
    float_linears = set(facts.skipped)
    for name, scheme in facts.schemes.items():
        parent, _, child = name.rpartition(".")
        for family in FUSED:
            for other in family if child in family else ():
                full = f"{parent}.{other}"
                if full in float_linears or facts.schemes.get(full, scheme) != scheme:
                    yield f"{name} and {full} are fused and must share one scheme"
