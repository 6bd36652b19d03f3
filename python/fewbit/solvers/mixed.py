"""Dense and sparse: a few input columns stay float, the rest goes on the grid.

AWQ's first observation (J. Lin et al., 2023, section 2.1): 0.1 to 1 % of the columns, chosen by
what activations do, carry most of the error. Here it is a method: those columns are left out
before the grid is fitted, so that they do not stretch its groups either. A solver that compensates
errors may move them into the float columns too, which take them up without rounding.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError, UsageError
from ..linear import PackedLinear
from ..scheme import Codes, Scheme, check_int
from ..stats import Stats
from . import Solver
from .rtn import RTN

CHOICES = ("activation", "random", "weight", "hessian")


class MixedLinear(PackedLinear):
    """y = x W_q^T + x[kept] W_kept^T + b.

    ``kept`` int64 [n] columns in ascending order, ``kept_weight`` [out_features, n] in the float
    type of the original weight; the codes of those columns stand for 0. Stored in fewbit's own
    format (formats/own.py).
    """

    def __init__(
        self, codes: Codes, scheme: Scheme, bias: Tensor | None, kept: Tensor, kept_weight: Tensor
    ) -> None:
        super().__init__(codes, scheme, bias)
        self.register_buffer("kept", kept)
        self.register_buffer("kept_weight", kept_weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[..., self.kept] @ self.kept_weight.to(x.dtype).T

    @property
    def weight(self) -> Tensor:
        """The weight in use, float32 [out_features, in_features]."""
        w = super().weight
        w[:, self.kept] = self.kept_weight.float()
        return w

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kept={len(self.kept)}"


class Mixed(Solver):
    """Keep ``fraction`` of the input columns float and solve the rest R with ``base``.

    Under plain rounding the kept columns k stay as they are. With a base that compensates, the best
    W_k for given codes Q is W_k + ((W_R - Q) G_Rk + W D_k) G_kk^-1, G = X^T X, D = Stats.cross; it
    leaves the rest the Schur complement G_RR - G_Rk G_kk^-1 G_kR as its Hessian.

    ``by``: "activation" (mean |x|), "hessian" (diagonal of X^T X), "weight" (mean |w| of the
    column) or "random" (``seed``). At least one column is kept.
    """

    leaves = ("kept", "kept_weight")

    def __init__(
        self, fraction: float = 0.01, by: str = "activation", seed: int = 0,
        base: Solver | None = None,
    ) -> None:
        if by not in CHOICES:
            raise UsageError(f"by must be one of {', '.join(CHOICES)}, got {by!r}")
        if not 0 < fraction <= 1:
            raise UsageError(f"fraction must be above 0 and at most 1, got {fraction}")
        check_int("seed", seed, 0, 2**32 - 1)
        self.fraction, self.by, self.seed = fraction, by, seed
        self.base = RTN() if base is None else base
        self._last: tuple[Stats, Tensor, Stats] | None = None  # linears that read one input share

    @property
    def needs_stats(self) -> bool:
        return self.by in ("activation", "hessian") or self.base.needs_stats

    @property
    def needs_cross(self) -> bool:
        return self.base.needs_cross

    def to_dict(self) -> dict:
        fields = {k: v for k, v in super().to_dict().items() if not k.startswith("_")}
        return {**fields, "base": self.base.to_dict()}

    def salient(self, weight: Tensor, stats: Stats | None) -> Tensor:
        """The columns to keep, int64, ascending."""
        columns = weight.shape[1]
        count = min(max(1, round(columns * self.fraction)), columns)
        if self.by == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return torch.randperm(columns, generator=generator)[:count].sort().values
        if self.by == "activation":
            level = stats.mean_abs
        elif self.by == "hessian":
            level = stats.gram.diagonal()
        else:
            level = weight.float().abs().mean(0)
        return level.topk(count).indices.sort().values

    def build(
        self, linear: nn.Module, path: str, scheme: Scheme, stats: Stats | None, integer: bool
    ) -> tuple[nn.Module, dict]:
        if integer:
            raise UnsupportedError(
                f"mixed keeps float columns and float activations; scheme {scheme} quantises them"
            )
        weight = linear.weight.detach()
        kept = self.salient(weight, stats)
        rest = weight.clone()
        rest[:, kept] = 0
        moves = self.base.compensates and stats is not None and len(kept) < weight.shape[1]
        codes, info = self.base.solve(rest, scheme, self._rest(stats, kept) if moves else stats)
        q = codes.q.clone()
        q[:, kept] = codes.zero_point[:, kept // scheme.group_of(weight.shape[1])]  # exactly 0
        module = MixedLinear(
            Codes(q, codes.scale, codes.zero_point), scheme, linear.bias, kept,
            weight[:, kept].clone(),
        )
        if moves:
            taken = _take_up(weight, weight - module.weight, stats, kept)
            module.kept_weight.copy_(taken)
        return module, {**info, "kept": kept.tolist()}

    def _rest(self, stats: Stats, kept: Tensor) -> Stats:
        """What the rest's solver sees: no more of what the kept columns will take up."""
        if self._last is not None and self._last[0] is stats and torch.equal(self._last[1], kept):
            return self._last[2]
        away = torch.linalg.solve(_inner(stats, kept), stats.gram[kept])
        sums = [
            None if m is None else m - m[:, kept] @ away for m in (stats.gram, stats.cross)
        ]
        for m in sums:
            if m is not None:
                m[kept], m[:, kept] = 0, 0
        self._last = stats, kept, replace(stats, gram=sums[0], cross=sums[1])
        return self._last[2]


def _inner(stats: Stats, kept: Tensor) -> Tensor:
    """G_kk, raised where it is singular in its own precision."""
    inner = stats.gram[kept][:, kept].clone()
    unit = torch.finfo(inner.dtype)
    inner.diagonal().add_(max(16 * unit.eps * float(inner.diagonal().mean()), unit.tiny))
    return inner


def _take_up(weight: Tensor, error: Tensor, stats: Stats, kept: Tensor) -> Tensor:
    """The kept columns [out_features, n] with the least output error; ``error`` is W - Q."""
    moved = error.to(stats.gram.dtype) @ stats.gram[:, kept]
    if stats.cross is not None:
        moved += weight.to(stats.cross.dtype) @ stats.cross[:, kept]
    change = torch.linalg.solve(_inner(stats, kept), moved.T).T
    return (weight[:, kept].to(change.dtype) + change).to(weight.dtype)
