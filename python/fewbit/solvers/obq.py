"""Optimal Brain Quantization: the greedy ancestor of GPTQ, as an oracle for small layers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..errors import HessianError, MissingCalibrationError, UsageError
from ..scheme import MANY, Codes, Scheme, check_int
from ..stats import Stats
from . import Solver

LARGEST = 512  # columns: the cost per row grows with their cube


class OBQ(Solver):
    """One weight at a time, the cheapest next, the rest moved to make up for it, in float64.

    For every row: with H^-1 of the columns still free, round the column q with the least
    (w_q - w'_q)^2 / [H^-1]_qq, move the free ones by -(w_q - w'_q) / [H^-1]_qq [H^-1]_q, and take q
    out of H^-1; a weight that is beyond its range goes first (E. Frantar and D. Alistarh, OBC,
    2022, eq. 5, lemma 1 and section 5). The grids are those of rounding, fitted before.

    ``sweeps`` above 0 make it an oracle: the columns that cost most are also tried first, both
    results go through that many sweeps of coordinate descent, and each row keeps the better one.
    Raises UsageError above 512 columns.
    """

    needs_stats = True

    def __init__(self, damp: float = 0.01, sweeps: int = 0) -> None:
        check_int("sweeps", sweeps, 0, MANY)
        self.damp, self.sweeps = damp, sweeps

    @torch.no_grad()
    def solve(self, weight: Tensor, scheme: Scheme, stats: Stats | None) -> tuple[Codes, dict]:
        if stats is None or stats.gram is None:
            raise MissingCalibrationError("OBQ needs the Gram matrix of the layer's inputs")
        columns = weight.shape[1]
        if columns > LARGEST:
            raise UsageError(f"OBQ is for up to {LARGEST} inputs, got {columns}: use gptq")
        h = stats.gram.double()
        level = h.diagonal().mean()
        if not bool(level > 0) or not bool(h.isfinite().all()):
            raise HessianError("the Hessian is zero or not finite")
        h = h / level + self.damp * torch.eye(columns, dtype=h.dtype, device=h.device)
        grid = (scheme.bits, scheme.group_size, scheme.symmetric, scheme.scale_dtype)
        _, scale, zero_point = ops.quantize(weight, *grid)
        return Codes(self.round(weight, h, scale, zero_point, scheme), scale, zero_point), {}

    def round(
        self, weight: Tensor, h: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme
    ) -> Tensor:
        """Codes on given grids for a Hessian ``h`` float64 [in_features, in_features]."""
        columns = weight.shape[1]
        at = torch.arange(columns) // scheme.group_of(columns)
        s, z = scale.double()[:, at], zero_point.double()[:, at]
        q = greedy(weight, h, s, z, scheme.bits)
        if self.sweeps:
            best = None
            for start in (q, greedy(weight, h, s, z, scheme.bits, cheapest=False)):
                codes = ops.coordinate_descent(
                    weight, h, start, scale, zero_point, scheme.bits, scheme.group_size,
                    self.sweeps,
                )
                d = weight.double() - (codes.double() - z) * s
                loss = ((d @ h) * d).sum(1, keepdim=True)
                q = codes if best is None else torch.where(loss < best, codes, q)
                best = loss if best is None else torch.minimum(best, loss)
        return q


def greedy(
    weight: Tensor, h: Tensor, s: Tensor, z: Tensor, bits: int, cheapest: bool = True
) -> Tensor:
    """Codes uint8 [rows, columns] for steps ``s`` and zero points ``z`` of the same shape."""
    rows, columns = weight.shape
    w = weight.double().clone()
    codes = torch.zeros_like(w)
    # All rows at once; each has its own order, hence its own inverse.
    inverse = torch.linalg.inv(h).expand(rows, columns, columns).clone()
    free = torch.ones(rows, columns, dtype=torch.bool, device=w.device)
    row = torch.arange(rows)
    for _ in range(columns):
        nearest = ((w / s).round() + z).clamp(0, 2**bits - 1)
        error = w - (nearest - z) * s
        stiffness = 1 / inverse.diagonal(dim1=1, dim2=2)
        cost = error.square() * stiffness if cheapest else -stiffness
        if cheapest:  # beyond its range: while others can still make up for it
            cost = torch.where(error.abs() > 0.5001 * s, -error.abs(), cost)
        k = cost.masked_fill(~free, torch.inf).argmin(1)
        codes[row, k] = nearest[row, k]
        line = inverse[row, k] * stiffness[row, k, None]
        moved = w - error[row, k, None] * line
        w = torch.where(free, moved, w)
        w[row, k] = ((nearest - z) * s)[row, k]
        free[row, k] = False
        inverse -= inverse[row, :, k][:, :, None] * line[:, None, :]
        inverse[row, k, k] = 1.0  # rounding leaves it near 0; it is never read again
    return codes.to(torch.uint8)
