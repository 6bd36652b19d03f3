"""Per-channel scales that move between a module and the linears that read it.

For any positive s, (x / s) (W s)^T = x W^T: dividing what produces x (a norm's gain and bias, or
the output channels of a linear) and multiplying the readers' columns leaves the function as it is,
and changes which columns the grid represents well.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..scheme import Scheme
from ..stats import Stats
from . import LayerContext, Transform
from .edges import apply_scale, edges


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
