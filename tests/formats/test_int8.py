"""LLM.int8(), LMDeploy's smooth_quant, and the 4-bit codebooks of bitsandbytes."""

import json

import pytest
import torch
from strategies import random_codes, same

from fewbit import formats
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.formats.bitsandbytes import LLM_INT8, Bnb4, LlmInt8, row_absmax
from fewbit.formats.compressed_tensors import IntQuantized
from fewbit.formats.smooth_quant import SmoothQuant

ALL = [LlmInt8(), SmoothQuant(), IntQuantized()]


@pytest.mark.parametrize("a", ALL, ids=lambda f: f.name)
@pytest.mark.parametrize("b", ALL, ids=lambda f: f.name)
def test_the_three_convert_into_each_other(a, b):
    codes = random_codes(6, 40, LLM_INT8, dtype=torch.float16)
    stored = a.pack(codes._replace(scale=codes.scale.float()), LLM_INT8)
    a.check(stored, LLM_INT8, 6, 40)
    again = b.pack(a.unpack(stored, LLM_INT8), LLM_INT8)
    b.check(again, LLM_INT8, 6, 40)
    assert same(b.unpack(again, LLM_INT8), a.unpack(stored, LLM_INT8))


@pytest.mark.parametrize("format", ALL, ids=lambda f: f.name)
def test_config_comes_back(format):
    plan = formats.parse(format.config({"a": LLM_INT8}, ["lm_head"]))
    assert type(plan.format) is type(format)
    found = plan.scheme_of("a")
    assert (found.bits, found.group_size, found.symmetric, found.activation_bits) == (8, -1, 1, 8)


def test_row_maximum_is_exact_or_refused():
    scb = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 10
    assert torch.equal(row_absmax(scb / 127) / 127, scb / 127)
    for dtype in (torch.float16, torch.bfloat16):
        scale = (scb / 127).to(dtype)
        assert torch.equal((row_absmax(scale) / 127).to(dtype), scale)
    with pytest.raises(UnsupportedError, match="no float32 row maximum"):
        row_absmax(scb)  # about one float32 in 120 has none


def four_bit(n, k, kind="nf4", nested=False, **changes):
    g = torch.Generator().manual_seed(1)
    blocks, state = -(-n * k // 64), {"blocksize": 64, "dtype": "float32", "shape": [n, k]}
    codes = torch.randint(0, 16, (n * k,), generator=g)
    packed = codes[0::2] << 4 | codes[1::2]
    table = torch.linspace(-1, 1, 16)
    absmax = torch.rand(blocks, generator=g)
    tensors = {"weight": packed.to(torch.uint8)[:, None], "weight.quant_map": table}
    if nested:
        inner = torch.randint(0, 256, (blocks,), generator=g, dtype=torch.uint8)
        outer, map256 = torch.rand(-(-blocks // 256), generator=g), torch.linspace(-1, 1, 256)
        absmax = map256[inner.int()] * outer.repeat_interleave(256)[:blocks] + 0.25
        tensors |= {"weight.nested_absmax": outer, "weight.nested_quant_map": map256}
        state |= {"nested_blocksize": 256, "nested_offset": 0.25, "nested_dtype": "float32"}
    tensors["weight.absmax"] = inner if nested else absmax
    text = json.dumps(state | changes).encode()
    key = f"weight.quant_state.bitsandbytes__{kind}"
    tensors[key] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors, (table[codes] * absmax.repeat_interleave(64)[: n * k]).view(n, k)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_floats_are_dequantised(kind, nested):
    tensors, want = four_bit(6, 96, kind, nested)
    assert torch.equal(Bnb4().weight(tensors, 6, 96, "w"), want)
    with pytest.raises(UnsupportedError, match="not on a uniform grid"):
        Bnb4().unpack(tensors, LLM_INT8)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"blocksize": 0}, "blocksize 0"),
        ({"blocksize": 1 << 40}, "blocksize"),
        ({"shape": [6, 97]}, "quant_state says"),
        ({"dtype": "Tensor"}, "'Tensor'"),
        ({"nested_blocksize": 256}, "nested_offset"),
        ({"nested_blocksize": 256, "nested_offset": 0.0}, "w.weight.absmax"),
    ],
)
def test_a_damaged_quant_state_is_named(changes, why):
    tensors, _ = four_bit(6, 96, **changes)
    with pytest.raises(CheckpointError, match=why):
        Bnb4().weight(tensors, 6, 96, "w")


def test_bitsandbytes_config_must_choose():
    with pytest.raises(CheckpointError, match="exactly one"):
        formats.parse({"quant_method": "bitsandbytes"})
    plan = formats.parse({"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert isinstance(plan.format, Bnb4)
    plan = formats.parse(LlmInt8().config({"a": LLM_INT8}, []))
    assert plan.format.threshold == 0
    section = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert formats.parse(section).format.threshold == 6.0
    assert formats.parse(section | {"llm_int8_threshold": 5}).format.threshold == 5.0
    with pytest.raises(CheckpointError, match="at least 0"):
        formats.parse(section | {"llm_int8_threshold": -1})
