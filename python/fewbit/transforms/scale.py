"""Per-channel scales that move between a module and the linears that read it.

For any positive s, (x / s) (W s)^T = x W^T: dividing what produces x (a norm's gain and bias, or
the output channels of a linear) and multiplying the readers' columns leaves the function as it is,
and changes which columns the grid represents well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..families import Family, Sublayer
from ..scheme import Scheme
from ..stats import Stats
from . import LayerContext, Transform


@dataclass
class Edge:
    """One place in a layer where a scale can move: ``source`` is divided, ``readers`` multiplied.

    ``channel`` [in_features of the readers]: the source channel that each input channel reads;
    None when they are the same. Under grouped-query attention several inputs of the output
    projection read one channel of the value projection.
    """

    kind: str  # "norm" or "inner"
    source: str
    readers: tuple[str, ...]
    channel: Tensor | None = None

    def to_source(self, values: Tensor) -> Tensor:
        """Per-input-channel values, averaged over the inputs that read the same source channel."""
        if self.channel is None:
            return values
        count = int(self.channel.max()) + 1
        total = values.new_zeros(count).index_add_(0, self.channel, values)
        return total / torch.bincount(self.channel, minlength=count)

    def to_readers(self, s: Tensor) -> Tensor:
        """A source scale, as the readers' columns see it."""
        return s if self.channel is None else s[self.channel]


def edges(layer: nn.Module, family: Family, config) -> list[Edge]:
    """Every edge of one decoder layer, in the order of the forward pass."""
    found = []
    for sub in family.sublayers:
        found.append(Edge("norm", sub.norm, sub.reads))
        if sub.elementwise:
            channel = _head_channels(layer, sub, config) if sub.heads else None
            found.append(Edge("inner", sub.inner, (sub.writes,), channel))
    return found


def _head_channels(layer: nn.Module, sub: Sublayer, config) -> Tensor | None:
    """Which value channel each input of the output projection reads (grouped-query attention)."""
    source = layer.get_submodule(sub.inner).out_features
    inputs = layer.get_submodule(sub.writes).in_features
    if source == inputs:
        return None
    heads = config.num_attention_heads
    head_dim = inputs // heads
    repeat = inputs // source
    head, position = torch.arange(inputs) // head_dim, torch.arange(inputs) % head_dim
    return (head // repeat) * head_dim + position


@torch.no_grad()
def apply_scale(layer: nn.Module, edge: Edge, s: Tensor, family: Family) -> None:
    """Divide the source by ``s`` [source channels] and multiply the readers' columns, in place."""
    source = layer.get_submodule(edge.source)
    if edge.kind == "norm":
        if family.unit_offset:  # the norm multiplies by 1 + weight
            source.weight.copy_((1.0 + source.weight.float()) / s - 1.0)
        else:
            source.weight.div_(s)
    else:
        source.weight.div_(s[:, None])
    if getattr(source, "bias", None) is not None:
        source.bias.div_(s)
    for path in edge.readers:
        layer.get_submodule(path).weight.mul_(edge.to_readers(s))


class SearchScale(Transform):
    """AWQ: s = mean|x|^ratio, the ratio with the least output error of the quantised readers.

    For every edge and ratio = 0, 1/n, .. (n - 1)/n the loss is sum over the readers of
    ||X (Q(W s) / s - W)^T||^2, computed exactly from the Gram matrix (Stats). Ratio 0 is s = 1, so
    an edge never gets worse than round-to-nearest. J. Lin et al., AWQ, 2023, section 3.2.
    """

    needs_stats = True

    def __init__(self, points: int = 20) -> None:
        self.points = points

    @torch.no_grad()
    def layer(self, layer: nn.Module, context: LayerContext) -> None:
        for edge in edges(layer, context.family, context.config):
            stats = context.stats[edge.readers[0]]
            weight = torch.cat([layer.get_submodule(p).weight.float() for p in edge.readers])
            magnitude = edge.to_source(stats.mean_abs)
            scales = [awq_scale(magnitude, i / self.points) for i in range(self.points)]
            losses = [
                scaled_loss(weight, edge.to_readers(s), stats, context.scheme) for s in scales
            ]
            best = losses.index(min(losses))
            apply_scale(layer, edge, scales[best], context.family)
            reader_scale = edge.to_readers(scales[best])
            for path in edge.readers:
                context.stats[path] = context.stats[path].scaled(reader_scale)
            context.records.append(
                {
                    "transform": "awq",
                    "edge": f"{edge.source} -> {', '.join(edge.readers)}",
                    "ratio": best / self.points,
                    "loss": losses[best],
                    "rtn_loss": losses[0],
                    "losses": losses,
                }
            )


def awq_scale(magnitude: Tensor, ratio: float) -> Tensor:
    """magnitude^ratio, centred so that its extremes multiply to 1; finite for dead channels."""
    s = magnitude.float().clamp(min=1e-4).pow(ratio)
    return s / (s.max() * s.min()).sqrt()


def scaled_loss(weight: Tensor, s: Tensor, stats: Stats, scheme: Scheme) -> float:
    """||X (Q(W s) / s - W)^T||^2 / tokens for ``weight`` [N, K] and ``s`` [K]."""
    q = ops.pseudo_quantize(
        weight * s, scheme.bits, scheme.group_size, scheme.symmetric, scheme.scale_dtype
    )
    return stats.output_loss(q / s - weight)
