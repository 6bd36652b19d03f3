"""Int8Linear and MixedInt8Linear in place of nn.Linear."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from fewbit.errors import UsageError
from fewbit.linear import Int4Linear, Int8Linear, MixedInt8Linear
from fewbit.ops import code_sums, quantize, w8a8_linear
from fewbit.pseudo import PseudoInt8Linear, activation_module, fake_quantize
from fewbit.scheme import Codes, Scheme

MODES = ["token", "asymmetric", "tensor", "static", "static asymmetric"]


def module(mode, linear, bits=8):
    scheme = Scheme.parse(
        f"w{bits}a8", activations=mode.split()[0].replace("asymmetric", "token"),
        symmetric_activations="asymmetric" not in mode,
    )  # fmt: skip
    codes = Codes(*quantize(linear.weight.detach(), bits, -1, True, scheme.scale_dtype))
    fixed = {}
    if "static" in mode:
        fixed["x_scale"] = torch.tensor([0.03])
    if mode == "static asymmetric":
        fixed["x_zero_point"] = torch.tensor([5]).int()
    return Int8Linear(codes, scheme, linear.bias, **fixed)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_follows_the_float_layer(mode, bits):
    linear = nn.Linear(96, 40)
    x = torch.randn(2, 5, 96).clamp(-3, 3)
    packed = module(mode, linear, bits)
    out, weight = packed(x), packed.weight
    # Each activation is within one step of the widest grid used, 3 / 127 or 0.03.
    bound = 0.031 * weight.abs().sum(1) + 1e-4
    want = nn.functional.linear(x, weight, linear.bias)
    assert out.shape == (2, 5, 40) and bool(((out - want).abs() <= bound).all())


def test_asymmetric_uses_the_weight_sums():
    linear = nn.Linear(64, 16, bias=False)
    packed, x = module("asymmetric", linear), torch.rand(3, 64)
    codes = packed.codes()
    want = w8a8_linear(
        x, packed.packed, packed.scale, packed.zero_point, None, 16, 8, -1, False,
        code_sum=code_sums(codes.q, codes.zero_point),
    )  # fmt: skip
    assert torch.equal(packed(x), want)


@pytest.mark.parametrize("scheme", ["w4a4", "w4a4g32"])
def test_four_bits_meet_four_bits(scheme):
    """What PseudoInt8Linear computes in float, to the rounding of its sums."""
    scheme = Scheme.parse(scheme)
    w, bias, x = torch.randn(24, 96), torch.randn(24), torch.randn(2, 5, 96)
    codes = Codes(*quantize(w, 4, scheme.group_size, scheme.symmetric, scheme.scale_dtype))
    packed, pseudo = activation_module(codes, scheme, bias), PseudoInt8Linear(codes, scheme, bias)
    assert type(packed) is Int4Linear
    on_grid = fake_quantize(x, 4, "token")
    size = on_grid.abs() @ packed.weight.abs().T + bias.abs()
    assert packed(x).shape == (2, 5, 24)
    assert bool(((packed(x) - pseudo(x)).abs() <= 100 * 2**-24 * size).all())
    assert type(activation_module(codes, replace(scheme, activations="tensor"), bias)) is (
        PseudoInt8Linear
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", [*MODES, "four"])
def test_compiles_as_one_graph(mode, dynamic):
    torch._dynamo.reset()  # the limit on recompilations counts all modules of a class
    if mode == "four":
        codes = Codes(*quantize(torch.randn(48, 64), 4))
        packed = activation_module(codes, Scheme.parse("w4a4"), None)
    else:
        packed = module(mode, nn.Linear(64, 48))
    compiled = torch.compile(packed, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (1, 3, 20):
        x = torch.randn(rows, 64)
        assert torch.equal(compiled(x), packed(x))


@pytest.mark.timeout(600)
def test_mixed_keeps_outliers():
    linear = nn.Linear(64, 16).requires_grad_(False)
    codes = Codes(*quantize(linear.weight, 8, -1, True))
    scheme = Scheme.parse("w8a8", scale_dtype="float32")
    kept = torch.tensor([5, 9])
    kept_weight = linear.weight[:, kept].T.contiguous()
    x = torch.randn(4, 64).clamp(-3, 3)
    x[:, kept] += 60
    plain = Int8Linear(codes, scheme, linear.bias)(x)
    mixed = MixedInt8Linear(codes, scheme, linear.bias)
    exact = MixedInt8Linear(codes, scheme, linear.bias, kept=kept, kept_weight=kept_weight)
    want = linear(x)
    errors = [float((y - want).abs().max()) for y in (plain, mixed(x), exact(x))]
    assert errors[0] > 2 * errors[1] > 2 * errors[2]
    for layer, dynamic in itertools.product((mixed, exact), (False, True)):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        assert all(torch.equal(compiled(x[:rows]), layer(x[:rows])) for rows in (1, 3))
    assert exact.half().kept_weight.dtype == torch.float32


def test_says_what_is_wrong():
    codes = Codes(*quantize(torch.randn(8, 16), 8, -1, True))
    with pytest.raises(UsageError, match="needs activation_bits 8, got 16"):
        Int8Linear(codes, Scheme(bits=8))
    with pytest.raises(UsageError, match="got 'static' without x_scale"):
        Int8Linear(codes, Scheme.parse("w8a8", activations="static"))
    with pytest.raises(UsageError, match="x_zero_point belongs to static, asymmetric"):
        Int8Linear(codes, Scheme.parse("w8a8"), x_zero_point=torch.tensor([5]).int())
    with pytest.raises(UsageError, match="needs weights of 8 bits, got 4"):
        MixedInt8Linear(Codes(*quantize(torch.randn(8, 16), 4)), Scheme.parse("w4a8"))
