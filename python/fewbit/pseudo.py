"""Linears with quantised activations, computed in float: the reference of the integer modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import MissingCalibrationError, UsageError
from .linear import Int4Linear, Int8Linear, PackedLinear
from .scheme import FLOAT_BITS, Codes, Scheme
from .stats import Stats


def fake_quantize(x: Tensor, bits: int, mode: str, scale: Tensor | None = None) -> Tensor:
    """x [tokens, channels] on a symmetric grid of ``bits`` and back, in the type of x.

    ``mode``: "token" (scale = max|row| / (2^(bits-1) - 1)), "tensor" (of the whole call), or
    "static" (``scale`` [1] from calibration; values beyond are clamped). Rounds half to even.
    """
    top = 2 ** (bits - 1) - 1
    h = x.float()
    if mode == "static":
        s = scale
    elif x.numel() == 0:
        return x
    else:
        level = h.abs().amax(-1, keepdim=True) if mode == "token" else h.abs().amax()
        s = (level / top).clamp(min=torch.finfo(torch.float32).tiny)
    return ((h / s).round().clamp(-top, top) * s).to(x.dtype)


class PseudoInt8Linear(PackedLinear):
    """PackedLinear whose input is put on its integer grid first, and multiplied in float32.

    What ``Int8Linear`` and ``Int4Linear`` compute in integers, up to the rounding of float32 sums;
    it also serves the activation widths that have no integer kernel. ``x_scale`` [1] float32
    belongs to ``scheme.activations`` = "static".
    """

    keeps_type = ("scale", "x_scale")

    def __init__(
        self, codes: Codes, scheme: Scheme, bias: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        super().__init__(codes, scheme, bias)
        if (scheme.activations == "static") != (x_scale is not None):
            raise UsageError('x_scale belongs to activations="static" and is needed there')
        self.register_buffer("x_scale", x_scale)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        scheme = self.scheme
        flat = fake_quantize(flat, scheme.activation_bits, scheme.activations, self.x_scale)
        return super().forward(flat).reshape(*x.shape[:-1], self.out_features)


def static_scale(stats: Stats | None, bits: int) -> Tensor:
    """One activation scale from calibration: max|x| / (2^(bits-1) - 1), float32 [1]."""
    if stats is None:
        raise MissingCalibrationError('activations="static" need calibration: pass calibration=')
    top = 2 ** (bits - 1) - 1
    return (stats.max_abs.max() / top).clamp(min=torch.finfo(torch.float32).tiny).reshape(1)


def packed_module(
    codes: Codes, scheme: Scheme, bias: Tensor | None, stats: Stats | None, integer: bool
) -> nn.Module:
    """The module that runs ``codes``: with ``integer`` on the scheme's quantised activations.

    The Report names the class.
    """
    if not integer:  # activations and keys are on their grid beside it (online.py), or nowhere
        scheme = Scheme.parse(scheme, activation_bits=FLOAT_BITS, kv_bits=FLOAT_BITS)
    if scheme.activation_bits == FLOAT_BITS:
        return PackedLinear(codes, scheme, bias)
    scale = None
    if scheme.activations == "static":
        scale = static_scale(stats, scheme.activation_bits)
    return activation_module(codes, scheme, bias, scale)


def require_activations(scheme: Scheme, integer: bool) -> None:
    """UsageError for an activation grid that no module of a run can have."""
    if scheme.activation_bits == FLOAT_BITS or scheme.symmetric_activations:
        return
    if not integer or scheme.activation_bits != 8 or scheme.activations != "token":
        raise UsageError(
            "symmetric_activations=False needs 8-bit activations scaled per token, and a method "
            f"that does not rotate; got {scheme} with activations={scheme.activations!r}"
        )


def activation_module(
    codes: Codes,
    scheme: Scheme,
    bias: Tensor | None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
) -> PackedLinear:
    """Activations of 8 bits run in integers (Int8Linear), and of 4 bits per token with weights of
    4 bits (Int4Linear); other widths in PseudoInt8Linear."""
    if scheme.activation_bits == 8:
        return Int8Linear(codes, scheme, bias, x_scale, x_zero_point)
    if scheme.activation_bits == scheme.bits == 4 and scheme.activations == "token":
        return Int4Linear(codes, scheme, bias)
    return PseudoInt8Linear(codes, scheme, bias, x_scale)
