"""Shifting: take the mean of every channel out of what is quantised, and give it to biases.

With c [channels] the mean of an input x over tokens, x W^T + b = (x - c) W^T + (b + W c): the norm
(or the value projection) loses c from its bias, the readers gain W c. A per-token grid then spans
only what differs between tokens (X. Wei et al., Outlier Suppression+, 2023, who take the middle of
the range; the mean leaves least energy, and a rotation mixes the channels anyway).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..families import Family, decoder_layers
from . import LayerContext, Transform
from .edges import Edge, edges
from .fold import float64
from .rows import input_rows

ROWS = 512  # tokens that a mean is taken over


class Shift(Transform):
    """On every edge where source and readers have biases: LayerNorm, and values, whose weights in
    an attention add up to 1. The mean is that of the calibration's token sample."""

    needs_stats = True
    recollect = True

    @torch.no_grad()
    def layer(self, layer: nn.Module, context: LayerContext) -> None:
        for edge in edges(layer, context.family, context.config):
            sample = context.stats[edge.readers[0]].sample
            if sample is None or not len(sample) or not shiftable(layer, edge, context.family):
                continue
            mean = sample.double().mean(0)
            shift(layer, edge, mean)
            share = float(mean.square().sum() / sample.double().square().mean(0).sum())
            context.records.append({"transform": "shift", "edge": str(edge), "energy": share})


def shiftable(layer: nn.Module, edge: Edge, family: Family) -> bool:
    """Whether a constant can move along ``edge``: nothing but a sum with weights 1 in between."""
    values = {sub.inner for sub in family.sublayers if sub.heads}
    modules = [layer.get_submodule(path) for path in (edge.source, *edge.readers, *edge.also)]
    biased = all(getattr(module, "bias", None) is not None for module in modules)
    return biased and (edge.kind == "norm" or edge.source in values)


@torch.no_grad()
def shift(layer: nn.Module, edge: Edge, mean: Tensor) -> None:
    """Take ``mean`` float64 [in_features of the readers] out of their input, in place."""
    source = layer.get_submodule(edge.source)
    readers = [layer.get_submodule(path) for path in (*edge.readers, *edge.also)]
    c = edge.to_source(mean)
    with float64([source, *readers]):
        rows = slice(None) if edge.rows is None else edge.rows
        source.bias.data[rows] -= c
        for reader in readers:
            reader.bias.data += reader.weight.data @ edge.to_readers(c)


@torch.no_grad()
def shift_model(model: nn.Module, family: Family, batches: list[Tensor]) -> None:
    """Shift every layer of a float model at once, by the means of its own inputs, in place."""
    layers = decoder_layers(model, family)
    found = [
        (layer, edge) for layer in layers for edge in edges(layer, family, model.config)
        if shiftable(layer, edge, family)
    ]
    readers = {i: layer.get_submodule(edge.readers[0]) for i, (layer, edge) in enumerate(found)}
    for i, x in input_rows(model, readers, batches, ROWS).items():
        shift(*found[i], x.double().mean(0))
