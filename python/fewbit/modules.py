"""From a stored Linear to the module that runs it, and back."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from .errors import CheckpointError, UnsupportedError
from .formats import Format
from .formats.bitsandbytes import Bnb4, LlmInt8
from .linear import PackedLinear
from .pseudo import activation_module
from .scheme import FLOAT_BITS, Codes, Scheme
from .shards import Shards
from .stored import Stored


class OrderedLinear(PackedLinear):
    """A PackedLinear whose columns were put in activation order (GPTQ ``desc_act``).

    ``order`` int64 [in_features]: column j of the codes multiplies input order[j].
    """

    def __init__(self, codes: Codes, scheme: Scheme, bias: Tensor | None, order: Tensor) -> None:
        super().__init__(codes, scheme, bias)
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., self.order])

    @property
    def weight(self) -> Tensor:
        return super().weight[:, torch.argsort(self.order)]


def build_linear(
    stored: Stored, shards: Shards, bias: Tensor | None, place: nn.Module
) -> nn.Module:
    """The module for one stored Linear, of the sizes of ``place``; the bias is the model's.

    Raises CheckpointError when the stored sizes are others.
    """
    n, k = place.out_features, place.in_features
    if isinstance(stored.format, Bnb4):
        weight = stored.format.weight(stored.tensors(shards), n, k, stored.name)
        return _float_linear(weight, bias)
    if (stored.out_features, stored.in_features) != (n, k):
        raise CheckpointError(
            f"{stored.name} is stored as {stored.out_features} x {stored.in_features}, the model "
            f"has {n} x {k}"
        )
    codes, extras = stored.codes(shards)
    scheme = stored.scheme
    if scheme.activation_bits < FLOAT_BITS:
        why = _keeps_float(stored, extras)
        if why is None:
            scale = extras.get("input_scale")
            scale = None if scale is None else scale.float()
            return activation_module(codes, scheme, bias, scale)
        warnings.warn(f"{stored.name}: activations stay float: {why}", stacklevel=2)
    if "order" in extras:
        return OrderedLinear(codes, scheme, bias, extras["order"])
    return PackedLinear(codes, scheme, bias)


def _keeps_float(stored: Stored, extras: dict[str, Tensor]) -> str | None:
    """Why activations are not quantised although the scheme says so, or None."""
    if isinstance(stored.format, LlmInt8):
        return "LLM.int8() keeps outlier columns float, and this loader keeps all of them"
    if "input_zero_point" in extras:
        return "asymmetric static activations have no kernel"
    return None


def module_tensors(module: PackedLinear, format: Format, name: str) -> dict[str, Tensor]:
    """What the format stores for a module; UnsupportedError names the module that does not fit."""
    extras = {"order": module.order} if isinstance(module, OrderedLinear) else {}
    if getattr(module, "x_scale", None) is not None:
        extras["input_scale"] = module.x_scale
    try:
        return format.pack(module.codes(), module.scheme, **extras)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from error


def _float_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
