"""The plain versions run on whatever device their arguments are on: what a card without a verified
kernel depends on. Without a card, two stand-ins: meta tensors in, meta tensors of the right shape
out; and the CPU with `meta` as the default device, where a tensor made without saying where would
not mix with the arguments."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

from fewbit import ops, reference

# Their result depends on values (which columns are outliers, which group a column is in).
NEEDS_VALUES = {"gptq", "int8_mixed_linear"}


def arguments():
    w, x = torch.randn(20, 64), torch.randn(3, 64)
    codes = reference.quantize(w, 4, 32, False, "float32")
    codes8 = reference.quantize(w, 8, 32, False, "float32")
    packed, packed8 = reference.pack(*codes, 4, 32), reference.pack(*codes8, 8, 32)
    words = reference.pack_fields(codes[0], 4)
    sums = reference.code_sums(codes8[0], codes8[2], 32)
    h = x.T @ x + 64 * torch.eye(64)
    base = torch.eye(4)
    signs = torch.ones(64, dtype=torch.int8)
    c = torch.triu(torch.randn(64, 64), 1) * 0.01
    columns = torch.tensor([1, 5])
    return {
        "quantize": (w, 4, 32, False, "float16"),
        "dequantize": (*codes, 32, "float16"),
        "pseudo_quantize": (w, 4, 32, True, "bfloat16"),
        "pseudo_quantize_": (w.clone(), 4, 32, False, "float32"),
        "scaled_error": (w, torch.rand(3, 64) + 0.5, 4, 32, False, "float32"),
        "act_stats": (x, torch.zeros(64, dtype=torch.float64), torch.zeros(64)),
        "gram": (x, torch.zeros(64, 64)),
        "gptq": (w, c, 4, 32, False, "float32", "in_order", 4, h.diagonal(), None, None, None, 128),
        "coordinate_descent": (w, h, *codes, 4, 32, 1),
        "hadamard": (x, [base], signs),
        "hadamard_quantize": (x, [base], signs, 4, 0.9),
        "pack": (*codes, 4, 32),
        "unpack": (*packed, 20, 64, 4, 32),
        "pack_fields": (codes[0], 4, False),
        "unpack_fields": (words, 4, 64, False),
        "quantize_per_token": (x, False, None, None),
        "norm_quantize": (x, torch.ones(64), torch.ones(64), 1e-5, False, True),
        "w4a16_linear": (x, *packed, torch.zeros(20), 20, 4, 32),
        "w4a4_linear": (x, *packed, torch.zeros(20), 20, 32, None, None),
        "w8a8_linear": (x, *packed8, None, 20, 8, 32, False, None, None, sums),
        "int8_mixed_linear": (x, *packed8, None, 20, 32, 1.5, None, columns, torch.randn(2, 20)),
    }


def tensors(result):
    return result if isinstance(result, tuple) else () if result is None else (result,)


def test_every_operator_is_here():
    assert set(arguments()) == set(ops.__all__)


@pytest.mark.parametrize("name", sorted(set(ops.__all__) - NEEDS_VALUES))
def test_meta_in_meta_out(name):
    given = arguments()[name]
    on_meta = tree_map_only(torch.Tensor, lambda a: a.to("meta"), given)
    want, got = (tensors(getattr(reference, name)(*a)) for a in (given, on_meta))
    assert len(want) == len(got)
    for w, g in zip(want, got, strict=True):
        assert g.device.type == "meta" and g.shape == w.shape and g.dtype == w.dtype


@pytest.mark.parametrize("name", ops.__all__)
def test_new_tensors_are_made_beside_the_arguments(name):
    given, again = arguments()[name], None
    copies = tree_map_only(torch.Tensor, torch.Tensor.clone, given)
    want = tensors(getattr(reference, name)(*given))
    with torch.device("meta"):
        again = tensors(getattr(reference, name)(*copies))
    for w, g in zip(want, again, strict=True):
        assert g.device.type == "cpu" and torch.equal(w, g)
