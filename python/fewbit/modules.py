"""From a stored Linear to the module that runs it, and back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .errors import CheckpointError, FormatLimitError, UnsupportedError
from .formats import Format
from .formats.bitsandbytes import Bnb4, LlmInt8
from .linear import MixedInt8Linear, PackedLinear
from .pseudo import activation_module
from .scheme import FLOAT_BITS, Codes, Scheme
from .shards import Shards
from .solvers.mixed import MixedLinear
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
    if isinstance(stored.format, LlmInt8) and stored.format.threshold > 0:
        return MixedInt8Linear(codes, scheme, bias, stored.format.threshold)
    if scheme.activation_bits < FLOAT_BITS:
        scale, zero_point = extras.get("input_scale"), extras.get("input_zero_point")
        return activation_module(
            codes,
            scheme,
            bias,
            None if scale is None else scale.float(),
            None if zero_point is None else zero_point.int(),
        )
    if "kept" in extras:
        return MixedLinear(codes, scheme, bias, extras["kept"], extras["kept_weight"])
    if "order" in extras:
        return OrderedLinear(codes, scheme, bias, extras["order"])
    return PackedLinear(codes, scheme, bias)


def format_for(format: Format, modules: Iterable[PackedLinear]) -> Format:
    """``format`` as it must be to say all that the modules do: LLM.int8() has one threshold."""
    if not isinstance(format, LlmInt8):
        return format
    found = {m.threshold if isinstance(m, MixedInt8Linear) else 0.0 for m in modules}
    if len(found) > 1:
        raise FormatLimitError(f"LLM.int8() holds one threshold a model, not {sorted(found)}")
    return LlmInt8(*found)


def module_tensors(module: PackedLinear, format: Format, name: str) -> dict[str, Tensor]:
    """What the format stores for a module; UnsupportedError names the module that does not fit."""
    try:
        return format.pack(module.codes(), module.scheme, **extras(module))
    except UnsupportedError as error:
        raise type(error)(f"{name}: {error.message}") from error


def extras(module: PackedLinear) -> dict[str, Tensor]:
    """What a module has beside its codes, by the names in ``formats.base.EXTRAS``."""
    zero_point = getattr(module, "x_zero_point", None)
    found = {
        "order": getattr(module, "order", None),
        "input_scale": getattr(module, "x_scale", None),
        "input_zero_point": None if zero_point is None else zero_point.to(torch.int8),
        "threshold": getattr(module, "threshold", None),
        "kept": getattr(module, "kept", None),
        "kept_weight": getattr(module, "kept_weight", None),
    }
    return {key: value for key, value in found.items() if value is not None}


def _float_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
