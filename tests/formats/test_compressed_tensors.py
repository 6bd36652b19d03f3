import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import dequantize, random_codes, same

from fewbit import formats
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.formats import bits as fields
from fewbit.formats.compressed_tensors import IntQuantized, PackQuantized
from fewbit.scheme import Codes, Scheme

PACK, INT = PackQuantized(), IntQuantized()
W8A8 = Scheme(8, -1, True, activation_bits=8)


def hexes(words):
    return [f"{w & 0xFFFFFFFF:08X}" for w in words.flatten().tolist()]


def test_worked_vectors():
    # formats.md 4.2.
    q = torch.tensor([[0, 3, 6, 9, 12, 15, 2, 5]] * 8, dtype=torch.uint8)
    zero = torch.arange(8, dtype=torch.uint8)[:, None]
    tensors = PACK.pack(Codes(q, torch.ones(8, 1), zero), Scheme(4, -1, False))
    assert hexes(tensors["weight_packed"][0]) == ["52FC9630"]
    assert hexes(tensors["weight_zero_point"]) == ["76543210"]
    ragged = (torch.arange(13, dtype=torch.uint8))[None]
    zero = torch.full((1, 1), 8, dtype=torch.uint8)
    tensors = PACK.pack(Codes(ragged, torch.ones(1, 1), zero), Scheme(4, -1, True))
    assert hexes(tensors["weight_packed"]) == ["76543210", "000CBA98"]
    assert "weight_zero_point" not in tensors
    assert tensors["weight_shape"].tolist() == [1, 13]


@given(
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([1, 5, 32, 40]),
    st.integers(1, 4),
    st.sampled_from([-1, 32, 64]),
    st.integers(0, 99),
)
def test_round_trip_and_check(bits, symmetric, n, blocks, group_size, seed):
    scheme = Scheme(bits, group_size, symmetric)
    k = 64 * blocks
    codes = random_codes(n, k, scheme, seed)
    tensors = PACK.pack(codes, scheme)
    PACK.check(tensors, scheme, n, k)
    assert same(PACK.unpack(tensors, scheme), codes)
    assert PACK.size({s: t.shape for s, t in tensors.items()}, scheme)[0] == n


@pytest.mark.parametrize("k, padded", [(64, False), (20, True)])
def test_older_three_bit_files_are_read(k, padded):
    # k = 64: the word count tells; k = 20: two words either way, so the version decides.
    scheme = Scheme(3, -1, False)
    codes = random_codes(6, k, scheme)
    tensors = PACK.pack(codes, scheme)
    for name, value, dim in (
        ("weight_packed", codes.q, 1),
        ("weight_zero_point", codes.zero_point, 0),
    ):
        rows = value.movedim(dim, -1)
        words = torch.zeros(len(rows), fields.words_padded(rows.shape[1], 3), dtype=torch.int64)
        for i in range(rows.shape[1]):
            words[:, i // 10] |= rows[:, i].long() << (3 * (i % 10))
        tensors[name] = words.to(torch.int32).movedim(-1, dim)
    old = PackQuantized(padded=padded)
    old.check(tensors, scheme, 6, k)
    assert same(old.unpack(tensors, scheme), codes)


@pytest.mark.parametrize("activations", ["token", "static"])
def test_int_quantized(activations):
    scheme = Scheme(
        8, -1, True, activation_bits=8, activations=activations,
        symmetric_activations=activations == "token",
    )  # fmt: skip
    codes = random_codes(5, 24, scheme)
    extras = {"input_scale": torch.tensor(0.5), "input_zero_point": torch.tensor(3).char()}
    tensors = INT.pack(codes, scheme, **extras)
    assert torch.equal(tensors["weight"].int(), codes.q.int() - 128)
    INT.check(tensors, scheme, 5, 24)
    assert same(INT.unpack(tensors, scheme), codes)
    want = {key: v.reshape(1) for key, v in extras.items()} if activations == "static" else {}
    assert INT.extras(tensors, scheme) == want


@pytest.mark.parametrize(
    "inputs, mode",
    [
        ({"strategy": "token", "dynamic": True, "symmetric": False}, "token"),
        ({"strategy": "tensor", "dynamic": True}, "tensor"),
        ({"strategy": "tensor", "symmetric": False}, "static"),
        ({"dynamic": True}, "token"),
        ({}, None),
        ({"strategy": "group"}, None),
        ({"strategy": "token"}, None),
    ],
)
def test_activation_grids_are_read_or_refused(inputs, mode):
    config = INT.config({"a": W8A8}, [])
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, **inputs}
    if mode is None and inputs:
        with pytest.raises(UnsupportedError, match="activations with strategy"):
            formats.parse(config)
        return
    found = formats.parse(config).scheme_of("a")
    assert found.activations == (mode or "static")
    assert found.symmetric_activations is inputs.get("symmetric", True)


def test_symmetric_activations_have_no_zero_point():
    scheme = Scheme(8, -1, True, activation_bits=8, activations="static")
    extras = {"input_scale": torch.ones(1), "input_zero_point": torch.tensor([0]).char()}
    tensors = INT.pack(random_codes(5, 24, scheme), scheme, **extras)
    assert INT.extras(tensors, scheme).keys() == {"input_scale"}
    tensors["input_zero_point"] += 1
    with pytest.raises(CheckpointError, match="must be 0"):
        INT.extras(tensors, scheme)


def test_one_scale_a_tensor_is_read():
    tensors = {"weight": torch.randint(-128, 128, (4, 8)).char(), "weight_scale": torch.ones(1)}
    INT.check(tensors, W8A8, 4, 8)
    w = dequantize(INT.unpack(tensors, W8A8), W8A8)
    assert torch.equal(w, tensors["weight"].double())


@pytest.mark.parametrize("format", [PACK, INT])
def test_config_comes_back_as_the_same_schemes(format):
    kind = {"activation_bits": 8} if format is INT else {}
    a, b = Scheme(8, -1, True, **kind), Scheme(4, 32, False)
    schemes = {"model.a": a, "model.b": a, "model.c": a if format is INT else b}
    plan = formats.parse(format.config(schemes, ["lm_head"]))
    assert type(plan.format) is type(format)
    assert {name: plan.scheme_of(name) for name in schemes} == schemes


def test_lossless_writing_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="not a multiple of group_size 64"):
        PACK.pack(random_codes(4, 96, Scheme(4, 64)), Scheme(4, 64))
    with pytest.raises(UnsupportedError, match="weight only"):
        PACK.pack(random_codes(4, 96, W8A8), W8A8)
    with pytest.raises(UnsupportedError, match="8-bit symmetric"):
        INT.pack(random_codes(4, 64, Scheme(4, 64)), Scheme(4, 64))
    with pytest.raises(UnsupportedError, match="a code of 16 is above 15"):
        bad = random_codes(4, 64, Scheme(4, 64))
        bad.q[1, 1] = 16
        PACK.pack(bad, Scheme(4, 64))
    with pytest.raises(UnsupportedError, match="every zero point must be 8"):
        PACK.pack(random_codes(4, 64, Scheme(4, 64)), Scheme(4, 64, True))


def test_tensors_that_disagree_with_the_config_are_named():
    scheme = Scheme(4, 64)
    tensors = PACK.pack(random_codes(8, 128, scheme), scheme)
    with pytest.raises(CheckpointError, match=r"w.weight_packed is torch.int32 \[8, 16\]"):
        PACK.check(tensors, scheme, 8, 256, "w")
    with pytest.raises(CheckpointError, match="w.weight_scale is missing"):
        PACK.check({"weight_packed": tensors["weight_packed"]}, scheme, 8, 128, "w")
    for shape in ([8, 1 << 40], [8, -128], [9, 128]):
        with pytest.raises(CheckpointError, match="weight_shape says|codes need"):
            PACK.unpack({**tensors, "weight_shape": torch.tensor(shape)}, scheme)


def weights(**changes):
    return {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32, **changes}


@pytest.mark.parametrize(
    "changes, error, why",
    [
        ({"config_groups": {}}, CheckpointError, "1 to 10000"),
        ({"config_groups": {"a": 3}}, CheckpointError, "must be an object"),
        ({"format": "marlin-24"}, UnsupportedError, "marlin-24"),
        ({"transform_config": {"config_groups": {"R4": {}}}}, UnsupportedError, "transform"),
        ({"sparsity_config": {"format": "sparse-24"}}, UnsupportedError, "sparse"),
        ({"weights": weights(type="float")}, UnsupportedError, "'float'"),
        ({"weights": weights(num_bits=0)}, CheckpointError, "bits must be in 2..8"),
        ({"weights": weights(group_size=-7)}, CheckpointError, "group_size"),
        ({"weights": weights(symmetric=1)}, CheckpointError, "'symmetric' must be bool"),
        ({"config_groups": {"a": {"weights": {}, "targets": [1]}}}, CheckpointError, "targets"),
        ({"quant_method": "magic"}, UnsupportedError, "'magic'"),
        ({"quant_method": None}, CheckpointError, "quant_method"),
    ],
)
def test_bad_configs_are_named(changes, error, why):
    config = PACK.config({"a": Scheme(4, 32, True)}, [])
    config["config_groups"]["group_0"] |= {
        key: value for key, value in changes.items() if key == "weights"
    }
    config["config_groups"]["group_0"]["format"] = None
    with pytest.raises(error, match=why):
        formats.parse({**config, **changes})
