import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_codes, same

from fewbit import formats
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.formats.awq import VERSIONS, Gemm, Gemv, GemvFast
from fewbit.scheme import Codes, Scheme

GEMM = Gemm()


def hexes(words):
    return [f"{w & 0xFFFFFFFF:08X}" for w in words.flatten().tolist()]


def test_worked_vectors():
    # formats.md 2.1.
    column = torch.tensor([0, 7, 14, 5, 12, 3, 10, 1], dtype=torch.uint8)
    q = torch.stack((column, column)).T.contiguous()
    zero = torch.arange(8, dtype=torch.uint8)[:, None]
    tensors = GEMM.pack(Codes(q, torch.ones(8, 1).half(), zero), Scheme(4, -1))
    assert hexes(tensors["qweight"]) == ["1357ACE0"] * 2
    assert hexes(tensors["qzeros"]) == ["75316420"]
    # formats.md 2.2.
    row = torch.tensor([[0xEA673FB7 - (1 << 32)]], dtype=torch.int32)
    stored = {"qweight": row, "qzeros": row, "scales": torch.ones(1, 8).half()}
    assert Gemv().unpack(stored, Scheme(4, -1)).q.tolist() == [[7, 11, 15, 3, 7, 6, 10, 14]]


@given(
    st.booleans(),
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from([-1, 16, 32]),
    st.integers(0, 99),
)
def test_round_trip_and_check(symmetric, rows, blocks, group_size, seed):
    scheme = Scheme(4, group_size, symmetric)
    n, k = 8 * rows, 32 * blocks
    codes = random_codes(n, k, scheme, seed)
    tensors = GEMM.pack(codes, scheme)
    GEMM.check(tensors, scheme, n, k)
    assert GEMM.size({s: t.shape for s, t in tensors.items()}, scheme) == (n, k)
    assert same(GEMM.unpack(tensors, scheme), codes)


def test_config_comes_back():
    schemes = {"model.a": Scheme(4, 128), "model.b": Scheme(4, 128)}
    plan = formats.parse(GEMM.config(schemes, ["lm_head"]))
    assert type(plan.format) is Gemm and plan.scheme_of("model.a") == Scheme(4, 128)
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}
    assert formats.parse(old).scheme_of("x") == Scheme(4, 64)
    llm = formats.parse({"quant_method": "awq", "backend": "llm-awq", "bits": 4})
    assert llm.format.zeros == "scaled_zeros"


def test_refusals_are_by_name():
    with pytest.raises(UnsupportedError, match="4-bit"):
        GEMM.pack(random_codes(8, 32, Scheme(3, 32)), Scheme(3, 32))
    with pytest.raises(UnsupportedError, match="7 outputs"):
        GEMM.pack(random_codes(7, 32, Scheme(4, 32)), Scheme(4, 32))
    with pytest.raises(UnsupportedError, match="float16, which would change"):
        GEMM.pack(random_codes(8, 32, Scheme(4, 32), dtype=torch.float32), Scheme(4, 32))
    with pytest.raises(UnsupportedError, match="one scheme a model"):
        GEMM.config({"a": Scheme(4, 32), "b": Scheme(4, 64)}, [])
    with pytest.raises(UnsupportedError, match="also skip model.head_b"):
        GEMM.config({"model.head_b": Scheme(4, 32)}, ["head"])
    with pytest.raises(UnsupportedError, match="3 bits"):
        formats.parse({"quant_method": "awq", "bits": 3})
    with pytest.raises(UnsupportedError, match="'marlin'"):
        formats.parse({"quant_method": "awq", "bits": 4, "version": "marlin"})


def test_gemv_fast_rejects_zeros_off_the_grid():
    k, scheme = 64, Scheme(4, 64)
    tensors = {
        "qweight": torch.zeros(1, k, dtype=torch.int16),
        "scales": torch.ones(16, 4).half(),
        "qzeros": torch.full((16, 4), -16.0).half(),
    }
    GemvFast().check(tensors, scheme, 4, k)
    with pytest.raises(CheckpointError, match="not 4-bit zero points"):
        GemvFast().unpack(tensors, scheme)
    with pytest.raises(CheckpointError, match="inputs in 64s"):
        GemvFast().check(tensors, scheme, 4, 32)


def test_versions_have_names():
    assert set(VERSIONS) == {"gemm", "gemv", "gemv_fast", "llm-awq"}
