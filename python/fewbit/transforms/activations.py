"""Quantise what flows between weights: inputs of linears per token, keys and values per head."""

from __future__ import annotations

from torch import nn

from ..errors import UsageError
from ..families import Family
from ..kv import attach_kv, head_dim, require_interface
from ..online import ActivationQuant, attach
from ..scheme import FLOAT_BITS, Scheme
from . import LayerContext, Transform
from .grids import fit_grid


class QuantizeActivations(Transform):
    """The scheme's activation and KV bits, pseudo-quantised on the decoder's linears.

    Acts after an online Hadamard transform. ``symmetric`` and ``clip`` are the grid's; None clips
    to 0.9 of the range of inputs and 0.95 of that of keys and values up to 4 bits (QuaRot's
    values), where the finer step is worth the cut, and not at all above. ``fit``: instead, each
    input gets the kind of grid and the clip with the least output error on the calibration's token
    sample (grids.py). A layer is solved on the float inputs that it gets; the next one is
    calibrated on what its quantised inputs have done.
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
        fit: bool = False,
    ) -> None:
        self.symmetric, self.clip, self.fit = symmetric, clip, fit
        self.kv_symmetric, self.kv_clip = kv_symmetric, kv_clip

    @property
    def needs_stats(self) -> bool:
        return self.fit

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
            for paths in family.inputs():
                symmetric, clip = self._grid(layer, paths, context)
                for path in paths:
                    quant = ActivationQuant(
                        scheme.activation_bits, symmetric, clip, scheme.activations
                    )
                    attach(layer.get_submodule(path), "online_quant", quant)
        if scheme.kv_bits < FLOAT_BITS:
            for sub in family.sublayers:
                if sub.heads:
                    online = attach_kv(
                        layer.get_submodule(sub.writes.rpartition(".")[0]),
                        head_dim(context.config),
                        bits=scheme.kv_bits,
                        symmetric=self.kv_symmetric,
                        clip=_clip(self.kv_clip, scheme.kv_bits, 0.95),
                    )
                    online.to(layer.get_submodule(sub.writes).weight.device)

    def _grid(
        self, layer: nn.Module, paths: tuple[str, ...], context: LayerContext
    ) -> tuple[bool, float]:
        """Symmetric or not, and the clip, of the input that the linears at ``paths`` share."""
        bits = context.scheme.activation_bits
        samples = [context.stats[p].sample for p in paths if p in context.stats and self.fit]
        samples = [x for x in samples if x is not None and len(x)]
        if not samples:  # an expert that no token was sent to
            return self.symmetric, _clip(self.clip, bits, 0.9)
        weights = [layer.get_submodule(path).weight for path in paths]
        grid = fit_grid(samples[0], weights, bits, context.scheme.activations)
        context.records.append({"transform": "activations", "paths": paths, **grid._asdict()})
        return grid.symmetric, grid.clip


def _clip(given: float | None, bits: int, low: float) -> float:
    return given if given is not None else low if bits <= 4 else 1.0
