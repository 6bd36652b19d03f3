"""PackedLinear in place of nn.Linear: same shapes, dtypes, dtype moves, and torch.compile."""

import copy

import pytest
import torch
from torch import nn

from fewbit import ops
from fewbit.linear import PackedLinear
from fewbit.scheme import Scheme


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_from_linear_multiplies_with_the_quantised_weight(bits):
    linear = nn.Linear(72, 40)
    packed = PackedLinear.from_linear(linear, Scheme(bits=bits, group_size=32))
    want = ops.pseudo_quantize(linear.weight.detach(), bits, 32, False, "float16")
    assert torch.equal(packed.weight, want)
    x = torch.randn(2, 5, 72)
    out = packed(x)
    assert out.shape == (2, 5, 40)
    torch.testing.assert_close(out, nn.functional.linear(x, want, linear.bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input(dtype):
    packed = PackedLinear.from_linear(nn.Linear(64, 16), "w4a16g32").to(dtype)
    out = packed(torch.randn(3, 64, dtype=dtype))
    assert out.dtype == dtype and bool(out.isfinite().all())


def test_scales_keep_their_type_when_the_model_moves():
    packed = PackedLinear.from_linear(nn.Linear(64, 16), "w4a16g32")
    before = packed.weight
    for dtype in (torch.float16, torch.float32, torch.float64, torch.float32):
        packed.to(dtype)
        assert packed.scale.dtype == torch.float16 and torch.equal(packed.weight, before)


def test_state_dict_and_deepcopy_round_trip():
    a = PackedLinear.from_linear(nn.Linear(64, 16), "w4a16g32")
    b = PackedLinear.from_linear(nn.Linear(64, 16), "w4a16g32")
    b.load_state_dict(a.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(a(x), b(x)) and torch.equal(a(x), copy.deepcopy(a)(x))


def test_size_is_what_the_formula_says():
    packed = PackedLinear.from_linear(nn.Linear(1024, 512, bias=False), "w4a16g128")
    weights, groups = 1024 * 512, 512 * 8
    assert packed.nbytes() == weights // 2 + groups * (2 + 1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    torch._dynamo.reset()
    model = nn.Sequential(
        PackedLinear.from_linear(nn.Linear(64, 48), "w4a16g32"),
        nn.ReLU(),
        PackedLinear.from_linear(nn.Linear(48, 16), "w3a16g16"),
    )
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (1, 3, 20):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


def test_exports_with_a_dynamic_batch():
    packed = PackedLinear.from_linear(nn.Linear(64, 48), "w4a16g32")
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(packed, (torch.randn(4, 64),), dynamic_shapes=({0: rows},))
    x = torch.randn(9, 64)
    assert torch.equal(exported.module()(x), packed(x))
