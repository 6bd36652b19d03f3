"""Round to nearest on clipped ranges: give up a group's extremes where the rest gains more.

AWQ's second step. For each group the range [lo, hi] is shrunk to [a lo, b hi]; the loss is that
group's share of the output error, dw_g G_gg dw_g^T with the group's block of the Gram matrix. On an
asymmetric grid the two ends shrink on their own, on a symmetric one together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import UsageError
from ..scheme import MANY, Codes, Scheme, check_int
from ..stats import Stats
from . import Solver

# Endings of the linears that make queries and keys, alone or with the values: their errors meet in
# a product of two activations that the loss here does not see.
QUERY_KEY = ("q_proj", "k_proj", "query_key_value", "c_attn", "qkv_proj")


class Clip(Solver):
    """``points`` shrink factors from 1 down to 1 - ``depth``; the full range is always among them.

    ``skip``: endings of the paths that are not clipped, such as QUERY_KEY.
    """

    needs_stats = True

    def __init__(
        self, points: int = 10, depth: float = 0.5, skip: tuple[str, ...] = ()
    ) -> None:
        check_int("points", points, 1, MANY)
        if not 0 < depth < 1:
            raise UsageError(f"depth must be in 0..1, got {depth}")
        self.points, self.depth, self.skip = points, depth, skip

    def build(
        self, linear: nn.Module, path: str, scheme: Scheme, stats: Stats | None, integer: bool
    ) -> tuple[nn.Module, dict]:
        skipped = path.endswith(tuple(self.skip)) if self.skip else False
        return super().build(linear, path, scheme, None if skipped else stats, integer)

    def solve(self, weight: Tensor, scheme: Scheme, stats: Stats | None) -> tuple[Codes, dict]:
        low, high, info = None, None, {"clipped": False}
        weight = weight.float()
        if stats is not None and weight.numel():
            low, high = clip_range(weight, scheme, stats.gram.float(), self.points, self.depth)
            weight = clamp_groups(weight, low, high, scheme)
            info = {"clipped": True}
        codes = ops.quantize(
            weight, scheme.bits, scheme.group_size, scheme.symmetric, scheme.scale_dtype
        )
        return Codes(*codes), info


def clip_range(
    weight: Tensor, scheme: Scheme, gram: Tensor, points: int, depth: float
) -> tuple[Tensor, Tensor]:
    """(low, high) [out_features, groups] of the clipped range with the least loss per group."""
    rows, columns = weight.shape
    group = scheme.group_of(columns)
    groups = scheme.groups(columns)
    pad = groups * group - columns
    w = torch.nn.functional.pad(weight, (0, pad)).reshape(rows, groups, group)
    g = torch.nn.functional.pad(gram, (0, pad, 0, pad)).reshape(groups, group, groups, group)
    g = g.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, group, group]
    low, high = w.amin(2).clamp(max=0), w.amax(2).clamp(min=0)
    best_low, best_high = low.clone(), high.clone()
    factors = [1 - depth * i / points for i in range(points + 1)]
    best = _group_loss(weight, w, low, high, scheme, g)
    ends = ["both"] if scheme.symmetric else ["both", "low", "high"]
    for end in ends:
        start_low, start_high = best_low.clone(), best_high.clone()
        for f in factors:
            a = start_low if end == "high" else low * f
            b = start_high if end == "low" else high * f
            loss = _group_loss(weight, w, a, b, scheme, g)
            better = loss < best
            best = torch.where(better, loss, best)
            best_low = torch.where(better, a, best_low)
            best_high = torch.where(better, b, best_high)
    return best_low, best_high


def _group_loss(
    weight: Tensor, w: Tensor, low: Tensor, high: Tensor, scheme: Scheme, g: Tensor
) -> Tensor:
    """dw_g G_gg dw_g^T, [out_features, groups]."""
    q = ops.pseudo_quantize(
        clamp_groups(weight, low, high, scheme), scheme.bits, scheme.group_size,
        scheme.symmetric, scheme.scale_dtype,
    )
    q = torch.nn.functional.pad(q, (0, w.shape[1] * w.shape[2] - q.shape[1]))
    dw = (q.reshape(w.shape) - w).transpose(0, 1)  # [groups, rows, group]
    return ((dw @ g) * dw).sum(2).T


def clamp_groups(weight: Tensor, low: Tensor, high: Tensor, scheme: Scheme) -> Tensor:
    """Weights clamped to their group's [low, high]."""
    columns = weight.shape[1]
    index = torch.arange(columns, device=weight.device) // scheme.group_of(columns)
    return torch.minimum(torch.maximum(weight, low[:, index]), high[:, index])
