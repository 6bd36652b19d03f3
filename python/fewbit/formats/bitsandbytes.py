"""bitsandbytes: LLM.int8() (read and written), NF4 and FP4 (read, as float weights).

LLM.int8() of a Linear with N outputs, K inputs:
    weight int8 [N, K]; SCB float32 [N] = absmax of a row, w = weight * SCB / 127;
    weight_format uint8 scalar 0 ("row")
NF4 / FP4, flattened row major in blocks of ``blocksize``:
    weight uint8 [N K / 2, 1]           two codes a byte, the first one in the high half
    weight.absmax float32 [blocks]      or uint8 indices into weight.nested_quant_map, scaled by
                                        weight.nested_absmax and shifted by nested_offset
    weight.quant_map float32 [16]       the value of each code
    weight.quant_state.bitsandbytes__nf4 (or __fp4)   uint8, UTF-8 JSON
Outlier columns of LLM.int8() are found at run time; nothing about them is stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError, FormatLimitError, UnreadFormatError
from ..scheme import Scheme
from .base import FLOATS, Format, Plan, Rule, Spec, field, only_scheme, require_codes
from .compressed_tensors import IntQuantized, per_token

LLM_INT8 = Scheme(8, -1, True, "float32", activation_bits=8)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MAX_STATE = 4096  # bytes of the JSON beside a 4-bit weight


class LlmInt8(IntQuantized):
    """``threshold``: activation columns that reach it meet the weight in float; 0 means none."""

    name = "llm-int8"
    layout = "LLM.int8()"
    mark = "SCB"
    suffixes = ("weight", "SCB", "weight_format")
    holds = ("threshold",)  # in the config

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = threshold

    def expected(self, n, k, scheme):
        return {
            "weight": Spec((torch.int8,), (n, k)),
            "SCB": Spec((torch.float32,), (n,)),
            "weight_format": Spec((torch.uint8,), (), optional=True),
        }

    def refuse(self, scheme, n, k):
        if not per_token(scheme):
            return f"LLM.int8() means symmetric 8-bit activations scaled per token, not {scheme}"
        return super().refuse(scheme, n, k)

    def pack(self, codes, scheme, **extras):
        require_codes(self, codes, scheme, extras)
        return {
            "weight": (codes.q ^ 0x80).view(torch.int8),
            "SCB": row_absmax(codes.scale.flatten()),
            "weight_format": torch.zeros((), dtype=torch.uint8),
        }

    def unpack(self, tensors, scheme):
        if "weight_format" in tensors and int(tensors["weight_format"]) != 0:
            raise UnreadFormatError("LLM.int8() weights must be stored by row (weight_format 0)")
        scale = tensors["SCB"] / 127
        return super().unpack({"weight": tensors["weight"], "weight_scale": scale}, scheme)

    def extras(self, tensors, scheme):
        return {}

    def check(self, tensors, scheme, n, k, name="weight"):
        Format.check(self, tensors, scheme, n, k, name)

    def config(self, schemes, ignore):
        only_scheme(schemes, "LLM.int8()")
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "load_in_4bit": False,
            "_load_in_8bit": True,
            "_load_in_4bit": False,
            "llm_int8_threshold": self.threshold,
            "llm_int8_skip_modules": list(ignore),
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
        }


class Bnb4(Format):
    """4-bit floats of a codebook: no uniform grid, so there are no Codes, only a float weight."""

    name = "bitsandbytes-4bit"
    mark = "weight.absmax"
    suffixes = (
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4",
        "weight.quant_state.bitsandbytes__fp4",
    )
    writable = False

    def size(self, shapes, scheme):
        raise FormatLimitError(f"{self.name} keeps a weight's shape in its quant_state")

    def unpack(self, tensors, scheme):
        raise FormatLimitError(
            "NF4 and FP4 codes are not on a uniform grid, so no other format can hold them; load "
            "the model and quantise it again"
        )

    def weight(self, tensors: Mapping[str, Tensor], n: int, k: int, name: str) -> Tensor:
        """The dequantised weight [n, k], in the dtype that the quant_state names."""
        state = _state(tensors, name)
        block, dtype = state["blocksize"], getattr(torch, state["dtype"])
        blocks = -(-n * k // block)
        nested = "nested_blocksize" in state
        want = {
            "weight": Spec((torch.uint8,), ((n * k + 1) // 2, 1)),
            "weight.absmax": Spec((torch.uint8 if nested else torch.float32,), (blocks,)),
            "weight.quant_map": Spec((torch.float32,), (16,)),
        }
        if nested:
            outer = -(-blocks // state["nested_blocksize"])
            want["weight.nested_absmax"] = Spec((torch.float32,), (outer,))
            want["weight.nested_quant_map"] = Spec((torch.float32,), (256,))
        if state["shape"] != [n, k]:
            raise CheckpointError(f"{name}: quant_state says {state['shape']}, not {[n, k]}")
        for suffix, spec in want.items():
            tensor = tensors.get(suffix)
            if tensor is None or tensor.dtype not in spec.dtypes or tensor.shape != spec.shape:
                raise CheckpointError(f"{name}.{suffix} must be {list(spec.shape)} for {[n, k]}")
        absmax = tensors["weight.absmax"]
        if nested:
            value = tensors["weight.nested_quant_map"][absmax.int()]
            outer = tensors["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])
            absmax = value * outer[:blocks] + state["nested_offset"]
        packed = tensors["weight"].flatten()
        codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[: n * k]
        w = tensors["weight.quant_map"][codes.int()]
        return (w * absmax.repeat_interleave(block)[: n * k]).to(dtype).view(n, k)


def _state(tensors: Mapping[str, Tensor], name: str) -> dict:
    """The JSON beside a 4-bit weight, with every field that is used checked."""
    prefix = "weight.quant_state.bitsandbytes__"
    found = [tensors[prefix + kind] for kind in ("nf4", "fp4") if prefix + kind in tensors]
    if len(found) != 1 or found[0].dtype != torch.uint8 or found[0].numel() > MAX_STATE:
        raise CheckpointError(f"{name} has no usable {prefix}nf4 or fp4 tensor")
    try:
        state = json.loads(bytes(found[0].flatten().tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: its quant_state is not JSON: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{name}: its quant_state must be an object")
    nested = "nested_blocksize" in state
    for key in ("blocksize", "nested_blocksize")[: 1 + nested]:
        if field(state, key, int) not in BLOCKSIZES:
            raise CheckpointError(f"{name}: {key} {state[key]} is not one of {BLOCKSIZES}")
    if field(state, "dtype", str) not in [str(d).removeprefix("torch.") for d in FLOATS]:
        raise CheckpointError(f"{name}: dtype {state['dtype']!r} is not supported")
    if nested:
        state["nested_offset"] = float(field(state, "nested_offset", (int, float)))
    field(state, "shape", list)
    return state


def row_absmax(scale: Tensor) -> Tensor:
    """float32 SCB with SCB / 127 == scale exactly; UnsupportedError where there is none.

    A scale of at most 17 significant bits (every float16 and bfloat16 one) has 127 * scale for its
    SCB. For others the neighbours are tried; those that came from an SCB find it.
    """
    want, scb = scale.float(), scale.double().mul(127).float()
    for candidate in (scb, scb.nextafter(scb.new_tensor(0.0)), scb.nextafter(scb + 1)):
        scb = torch.where(scb / 127 == want, scb, candidate)
    if not torch.equal(scb / 127, want) or not torch.equal(want.to(scale.dtype), scale):
        raise FormatLimitError(
            "some float32 scales have no float32 row maximum with SCB / 127 equal to them; "
            "quantise with scale_dtype='float16'"
        )
    return scb


def parse(config: Mapping) -> Plan:
    """The Plan of a ``quant_method: bitsandbytes`` config."""
    four = field(config, "load_in_4bit", bool, False)
    if four is field(config, "load_in_8bit", bool, False):
        raise CheckpointError("exactly one of load_in_8bit and load_in_4bit must be true")
    threshold = field(config, "llm_int8_threshold", (int, float), 6.0)
    if not threshold >= 0:
        raise CheckpointError(f"llm_int8_threshold must be at least 0, got {threshold}")
    if four:
        return Plan(Bnb4(), (Rule("all", "", Scheme(4, 64)),))
    return Plan(LlmInt8(float(threshold)), (Rule("all", "", LLM_INT8),))
