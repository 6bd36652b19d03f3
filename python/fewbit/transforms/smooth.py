"""SmoothQuant: move the outliers of activations into the weights that read them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import UsageError
from ..pseudo import fake_quantize
from ..reproducible import total
from ..scheme import FLOAT_BITS, Scheme
from . import LayerContext, Transform
from .edges import Edge, apply_scale, edges, fit_range
from .race import Block
from .scale import move_stats, reader_blocks, weight_max

GRID = tuple(i / 20 for i in range(21))


class Smooth(Transform):
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha) on every edge (G. Xiao et al., 2023, eq. 4).

    max|w_j| runs over all readers of the edge. ``alpha``: a number in 0..1, or "auto": for each
    edge the value of ``GRID`` (or no smoothing) with the least output error of quantised weights
    and activations on the calibration's token sample. ``inner``: also smooth the inputs of output
    and down projections, through v, up and fc1 edges. Channels that are zero in the activations or
    in all readers keep s = 1.
    """

    needs_stats = True

    def __init__(self, alpha: float | str = 0.5, inner: bool = True) -> None:
        if alpha != "auto" and not (isinstance(alpha, (int, float)) and 0 <= alpha <= 1):
            raise UsageError(f'alpha must be in 0..1 or "auto", got {alpha!r}')
        self.alpha, self.inner = alpha, inner

    @torch.no_grad()
    def layer(self, layer: nn.Module, context: LayerContext) -> None:
        for edge in edges(layer, context.family, context.config):
            if edge.kind == "inner" and not self.inner:
                continue
            blocks = reader_blocks(layer, edge, context)
            x = torch.stack([b.stats.max_abs for b in blocks]).amax(0)
            x, w = edge.to_source(x, "max"), edge.to_source(weight_max(blocks), "max")
            record = {"transform": "smooth", "edge": str(edge), "alpha": self.alpha}
            if self.alpha == "auto":
                record |= search_alpha(edge, blocks, x, w, context.scheme)
            if record["alpha"] is not None:
                s = smooth_scale(x, w, record["alpha"])
                s = fit_range(layer, edge, s, context.family)
                apply_scale(layer, edge, s, context.family)
                move_stats(edge, s, context)
            after = torch.stack([context.stats[p].max_abs for p in edge.readers]).amax(0)
            record["outlier"] = [_peak(x), _peak(edge.to_source(after, "max"))]
            context.records.append(record)


def smooth_scale(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """x^alpha / w^(1 - alpha) for max|x| and max|w| by channel; 1 where either is 0."""
    live = (x > 0) & (w > 0)
    x, w = (torch.where(live, v.float(), 1.0).clamp(min=1e-5) for v in (x, w))
    return torch.where(live, x.pow(alpha) / w.pow(1 - alpha), 1.0)


def search_alpha(
    edge: Edge, blocks: list[Block], x: Tensor, w: Tensor, scheme: Scheme
) -> dict[str, object]:
    """The alpha of GRID (None: no smoothing) with the least output error, and all errors."""
    choices: list[float | None] = [None, *GRID]
    errors = []
    for alpha in choices:
        s = torch.ones_like(x, dtype=torch.float32) if alpha is None else smooth_scale(x, w, alpha)
        errors.append(sum(smoothed_error(b, edge.to_readers(s), scheme) for b in blocks))
    best = min(range(len(errors)), key=errors.__getitem__)
    return {"alpha": choices[best], "alphas": choices, "errors": errors}


def smoothed_error(block: Block, s: Tensor, scheme: Scheme) -> float:
    """||Qx(X / s) Q(W s)^T - X W^T||^2 on the token sample of the block's statistics."""
    weight, stats = block
    sample = stats.sample
    if sample is None or not len(sample):
        return 0.0
    q = ops.pseudo_quantize(
        weight * s, scheme.bits, scheme.group_size, scheme.symmetric, scheme.scale_dtype
    )
    scaled, bits = sample / s, scheme.activation_bits
    if bits < FLOAT_BITS:
        top = 2 ** (bits - 1) - 1
        scale = ((stats.max_abs / s).max() / top).clamp(min=1e-30)
        # A call holds more tokens than the sample: its scale is the calibration's largest value.
        mode = "token" if scheme.activations == "token" else "static"
        scaled = fake_quantize(scaled, bits, mode, scale)
    return total((scaled @ q.T - sample @ weight.T).square())


def _peak(level: Tensor) -> float:
    """The largest channel over the median one."""
    return float(level.max() / level.median().clamp(min=1e-30))
