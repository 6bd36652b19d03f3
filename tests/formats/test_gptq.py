import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_codes, same

from fewbit import formats
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.formats import bits as fields
from fewbit.formats.gptq import Gptq, GptqV2, column_order
from fewbit.scheme import Codes, Scheme

V1, V2 = Gptq(), GptqV2()
ONE = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def hexes(words):
    return [f"{w & 0xFFFFFFFF:08X}" for w in words.flatten().tolist()]


def test_worked_vectors():
    # formats.md 3.3.
    q = torch.tensor([0, 3, 6, 9, 12, 15, 2, 5] * 4, dtype=torch.uint8).expand(32, 32)
    zero = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8] * 4, dtype=torch.uint8)[:, None]
    codes, scheme = Codes(q, torch.ones(32, 1).half(), zero), Scheme(4, -1)
    v1, v2 = V1.pack(codes, scheme), V2.pack(codes, scheme)
    assert hexes(v1["qweight"][0, :1]) == ["52FC9630"]
    assert hexes(v2["qzeros"][0, :1]) == ["87654321"]
    assert hexes(v1["qzeros"][0, :1]) == ["76543210"]
    for bits, words in ((4, ("77777777", "88888888")), (8, ("7F7F7F7F", "80808080"))):
        scheme = Scheme(bits, -1, True)
        codes = random_codes(32, 32, scheme)
        stored = [hexes(f.pack(codes, scheme)["qzeros"][0, :1])[0] for f in (V1, V2)]
        assert tuple(stored) == words


@given(
    st.sampled_from([V1, V2]),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([-1, 32, 64]),
    st.integers(0, 99),
)
def test_round_trip_and_check(format, bits, symmetric, rows, blocks, group_size, seed):
    scheme = Scheme(bits, group_size, symmetric)
    n, k = 32 * rows, 32 * blocks  # 64 leaves a short last group
    codes = random_codes(n, k, scheme, seed, low=1 if format is V1 else 0)
    tensors = format.pack(codes, scheme)
    format.check(tensors, scheme, n, k)
    assert format.size({s: t.shape for s, t in tensors.items()}, scheme) == (n, k)
    assert same(format.unpack(tensors, scheme), codes)
    assert format.extras(tensors, scheme) == {}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_that_borrowed_are_read(bits):
    # formats.md 3.3: the main writer subtracts one from every field of a word at once.
    scheme = Scheme(bits, -1)
    codes = random_codes(32, 32, scheme)
    assert int(codes.zero_point.min()) == 0 or bits == 8
    codes.zero_point[0] = 0
    tensors = V2.pack(codes, scheme)
    tensors["qzeros"] = (tensors["qzeros"].long() - ONE[bits]).to(torch.int32)
    assert same(V1.unpack(tensors, scheme), codes)
    with pytest.raises(UnsupportedError, match="zero point of 0"):
        V1.pack(codes, scheme)


def test_borrow_vector():
    zero = torch.arange(8, dtype=torch.uint8)[None]
    stored = (fields.pack(zero, 4).long() - 0x11111111).to(torch.int32)
    assert hexes(stored) == ["654320FF"]
    assert torch.equal(V1._zeros(stored, Scheme(4, -1), 8), zero)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("label, truth", [(V1, V2), (V2, V1)])
def test_mislabelled_symmetric_files_are_read_with_a_warning(bits, label, truth):
    scheme = Scheme(bits, 32, True)
    codes = random_codes(32, 64, scheme)
    with pytest.warns(UserWarning, match=f"says {label.name}.* those of {truth.name}"):
        assert same(label.unpack(truth.pack(codes, scheme), scheme), codes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(truth.unpack(truth.pack(codes, scheme), scheme), codes)


def test_desc_act_is_read_as_a_column_order():
    scheme, k = Scheme(4, 32), 96
    codes = random_codes(32, k, scheme, low=1)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0))
    g_idx = torch.empty(k, dtype=torch.int32)
    g_idx[order] = (torch.arange(k) // 32).to(torch.int32)
    tensors = V1.pack(codes, scheme) | {"g_idx": g_idx}  # q columns as in the file
    read, found = V1.unpack(tensors, scheme), V1.extras(tensors, scheme)["order"]
    # Each stored column keeps its own scale: dequantise both ways.
    group = g_idx.long()
    direct = (codes.q - codes.zero_point[:, group].double()) * codes.scale[:, group].double()
    spread = torch.arange(k) // 32
    ours = (read.q - read.zero_point[:, spread].double()) * read.scale[:, spread].double()
    assert torch.equal(direct[:, found], ours)
    with pytest.raises(UnsupportedError, match="activation order"):
        V1.pack(read, scheme, order=found)
    with pytest.raises(CheckpointError, match="into groups of 32"):
        column_order(torch.full((k,), 7, dtype=torch.int32), k, scheme)
    with pytest.raises(CheckpointError, match="into groups of 32"):
        column_order(torch.arange(k, dtype=torch.int32) - 5, k, scheme)


def test_symmetric_label_with_other_zero_points_is_an_error():
    tensors = V1.pack(random_codes(32, 32, Scheme(4, 32), low=1), Scheme(4, 32))
    with pytest.raises(CheckpointError, match="not all 8"):
        V1.unpack(tensors, Scheme(4, 32, True))


@pytest.mark.parametrize("format", [V1, V2])
def test_config_comes_back(format):
    schemes = {"a.0": Scheme(4, 128, True), "a.1": Scheme(4, 128, True), "a.10": Scheme(8, 32)}
    plan = formats.parse(format.config(schemes, ["a.2", "lm_head"]))
    assert type(plan.format) is type(format)
    assert {name: plan.scheme_of(name) for name in schemes} == schemes


@pytest.mark.parametrize(
    "changes, error, why",
    [
        ({"bits": 5}, UnsupportedError, "5 bits"),
        ({"bits": 0}, CheckpointError, "bits must be"),
        ({"bits": "4"}, CheckpointError, "'bits' must be int"),
        ({"group_size": 0}, CheckpointError, "group_size"),
        ({"checkpoint_format": "gptq_p"}, UnsupportedError, "gptq_p"),
        ({"is_marlin_format": True}, UnsupportedError, "not supported"),
        ({"rotation": "hadamard"}, UnsupportedError, "online rotation"),
        ({"dynamic": {"+:(": {}}}, CheckpointError, "pattern"),
        ({"dynamic": {"+:a": 3}}, CheckpointError, "must be an object"),
    ],
)
def test_bad_configs_are_named(changes, error, why):
    config = V1.config({"a": Scheme(4, 128, True)}, [])
    with pytest.raises(error, match=why):
        formats.parse({**config, **changes}).scheme_of("b")
