"""Quantise what flows between weights: inputs of linears per token, keys and values per head."""

from __future__ import annotations

from torch import nn

from ..errors import UsageError
from ..families import Family
from ..kv import attach_kv, head_dim, require_interface
from ..online import ActivationQuant, attach
from ..scheme import FLOAT_BITS, Scheme
from . import LayerContext, Transform


class QuantizeActivations(Transform):
    """The scheme's activation and KV bits, pseudo-quantised on the decoder's linears.

    Acts after an online Hadamard transform. ``symmetric`` and ``clip`` are the grid's; None clips
    to 0.9 of the range of inputs and 0.95 of that of keys and values up to 4 bits (QuaRot's
    values), where the finer step is worth the cut, and not at all above. A layer is solved on the
    float inputs that it gets; the next one is calibrated on what its quantised inputs have done.
    """

    quantizes_activations = True
    online = True
    last = True

    def __init__(
        self,
        symmetric: bool = True,
        clip: float | None = None,
        kv_symmetric: bool = False,
        kv_clip: float | None = None,
    ) -> None:
        self.symmetric, self.clip = symmetric, clip
        self.kv_symmetric, self.kv_clip = kv_symmetric, kv_clip

    def check(self, model: nn.Module, family: Family, scheme: Scheme) -> None:
        if scheme.kv_bits < FLOAT_BITS:
            require_interface(model, f"a KV cache of {scheme.kv_bits} bits")
        if scheme.activation_bits < FLOAT_BITS and scheme.activations == "static":
            raise UsageError(
                'activations "static" need a scale from calibration; here they are "token" or '
                '"tensor"'
            )

    def layer(self, layer: nn.Module, context: LayerContext) -> None:
        scheme, family = context.scheme, context.family
        if scheme.activation_bits < FLOAT_BITS:
            for path in family.linears():
                bits = scheme.activation_bits
                clip = _clip(self.clip, bits, 0.9)
                quant = ActivationQuant(bits, self.symmetric, clip, scheme.activations)
                attach(layer.get_submodule(path), "online_quant", quant)
        if scheme.kv_bits < FLOAT_BITS:
            for sub in family.sublayers:
                if sub.heads:
                    attach_kv(
                        layer.get_submodule(sub.writes.rpartition(".")[0]),
                        head_dim(context.config),
                        bits=scheme.kv_bits,
                        symmetric=self.kv_symmetric,
                        clip=_clip(self.kv_clip, scheme.kv_bits, 0.95),
                    )


def _clip(given: float | None, bits: int, low: float) -> float:
    return given if given is not None else low if bits <= 4 else 1.0
