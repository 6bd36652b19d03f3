"""GPTQ and its successors: one column loop (ops.gptq), four choices.

* which column comes first (``order``),
* which grid a group gets (``fit``, ``clip``),
* which output the rounded layer should have (``target``),
* what happens afterwards (``sweeps``).
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from .. import ops
from ..errors import HessianError, MissingCalibrationError, UsageError
from ..scheme import MANY, Codes, Scheme, check_int
from ..stats import Stats
from . import Solver
from .factor import RUNGS, Factor, by_rows, factorize, scaled

ORDERS = ("columns", "activation", "groups", "backward")
FITS = ("range", "mse", "hessian")
TARGETS = ("weight", "gptaq", "qronos")


class GPTQ(Solver):
    """Error-compensating rounding (E. Frantar et al., 2022; cpp/include/fewbit/gptq.h).

    ``damp``: share of the mean diagonal added to the Hessian. ``order``: "columns", left to right;
    "activation", largest diagonal first, groups fitted beforehand so that they stay in place on
    disk (act-order with static groups); "groups", the same between groups and inside each of them,
    groups fitted in order (group-aware order); "backward", right to left (Babai, LDLQ). ``fit``:
    the "range" of a group as published, or out of ``points`` ranges down to a fifth of it the one
    with the least squared error ("mse"), weighted by V_kk^2 ("hessian"). ``clip`` False widens a
    group until no target leaves its grid, the condition of Babai's error bound (J. Chen et al.,
    2025).

    ``target``: the layer's output on the inputs it gets from the model quantised so far ("weight"),
    or the float model's output: "gptaq" moves each column's mismatch into the columns behind it (Y.
    Li et al., 2025, eq. 15), "qronos" aims at the least-squares weight from the start (S. Zhang et
    al., 2025, prop. 3.1), by ``strength`` of the way; both need Stats.cross. FOEM (X. Zheng et
    al., 2025: errors (t_k - w'_k) - beta (t_k - w_k), and beta of t_k+1 - w_k+1 taken back) is left
    out: on held-out text it is behind these two (tests/bench_gptq.py successors; README, Results).

    ``sweeps`` of coordinate descent follow: each code in turn to the best value given all others.
    ``strict`` makes every rung of the ladder an error.
    """

    needs_stats = True
    compensates = True

    def __init__(
        self,
        damp: float = 0.01,
        order: str = "groups",
        fit: str = "hessian",
        points: int = 40,
        clip: bool = True,
        target: str = "weight",
        strength: float = 0.5,
        sweeps: int = 0,
        block: int = 128,
        strict: bool = False,
    ) -> None:
        for name, value, allowed in (
            ("order", order, ORDERS), ("fit", fit, FITS), ("target", target, TARGETS)
        ):
            if value not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        check_int("points", points, 1, MANY)
        check_int("sweeps", sweeps, 0, MANY)
        check_int("block", block, 1, 256)
        for name, value in (("damp", damp), ("strength", strength)):
            if not 0.0 <= value <= 1.0:
                raise UsageError(f"{name} must be in 0..1, got {value!r}")
        self.damp, self.order, self.fit, self.points = damp, order, fit, points
        self.clip, self.target, self.strength, self.sweeps = clip, target, strength, sweeps
        self.block, self.strict = block, strict
        self._last: tuple[weakref.ref, tuple, Factor | None] | None = None

    @property
    def needs_cross(self) -> bool:
        return self.target != "weight"

    def to_dict(self) -> dict:
        fields = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return {"name": type(self).__name__, **fields}

    @torch.no_grad()
    def solve(self, weight: Tensor, scheme: Scheme, stats: Stats | None) -> tuple[Codes, dict]:
        if stats is None or stats.gram is None:
            raise MissingCalibrationError("GPTQ needs the Gram matrix of the layer's inputs")
        unseen = stats.routed and stats.tokens == 0
        factor = None if unseen else self._factor(stats, scheme)
        if factor is None:
            reason = "no token is routed to this expert" if unseen else "the Hessian is not finite"
            info = {"rung": len(RUNGS) - 1, "ladder": RUNGS[-1], "reason": reason}
        else:
            info = factor.info()
        if stats.tokens < weight.shape[1]:
            info["few_tokens"] = f"{stats.tokens} for {weight.shape[1]} inputs"
        if self.strict and info["rung"] > 0:
            raise HessianError(
                f"strict: the Hessian needs rung {info['rung']} ({info['ladder']}) of the ladder"
                + (f": {info['reason']}" if "reason" in info else "")
            )
        grid = (scheme.bits, scheme.group_size, scheme.symmetric, scheme.scale_dtype)
        if factor is None:
            return Codes(*ops.quantize(weight, *grid)), info
        if self.needs_cross and stats.routed and stats.cross is None:
            info["target"] = "weight: the float model's router sends this expert other tokens"
            goal = weight
        else:
            goal = self._goal(weight, stats, factor)
        codes = self._round(goal, grid, factor)
        if not self.clip:
            codes, info["widened"] = self._widen(goal, codes, grid, factor)
        if self.sweeps:
            h = scaled(stats.gram, factor.exponent, factor.c.dtype)
            h.diagonal().add_(factor.damp * float(h.diagonal().mean()))
            q = ops.coordinate_descent(goal, h, *codes, *grid[:2], self.sweeps)
            codes = codes._replace(q=q)
        return codes, info

    def _factor(self, stats: Stats, scheme: Scheme) -> Factor | None:
        """The factor of one Hessian, computed once for all linears that share their input."""
        key = (scheme.group_size, self.damp, self.order)
        if self._last is not None and self._last[1] == key:
            seen = self._last[0]()
            # A transform may have given each reader its own copy of the same statistics.
            if seen is not None and (seen is stats or torch.equal(seen.gram, stats.gram)):
                return self._last[2]
        self._last = None  # frees the old one before the new one is made
        order = self._order(stats.gram, scheme)
        factor = factorize(stats.gram, self.damp, order)
        self._last = (weakref.ref(stats, self._forget), key, factor)
        return factor

    def _forget(self, stats: weakref.ref) -> None:
        """A factor is as large as a Gram matrix: it goes when its statistics go."""
        if self._last is not None and self._last[0] is stats:
            self._last = None

    def _order(self, gram: Tensor, scheme: Scheme) -> Tensor | None:
        columns, diagonal = gram.shape[0], gram.diagonal()
        if self.order == "columns":
            return None
        if self.order == "backward":
            return torch.arange(columns - 1, -1, -1, device=gram.device)
        if self.order == "activation":
            return torch.argsort(diagonal, descending=True, stable=True)
        group = scheme.group_of(columns)
        runs = torch.arange(columns, device=gram.device).split(group)
        runs = sorted(runs, key=lambda run: -float(diagonal[run].max()))
        return torch.cat([run[torch.argsort(-diagonal[run], stable=True)] for run in runs])

    def _round(
        self, goal: Tensor, grid: tuple, factor: Factor, scale=None, zero_point=None
    ) -> Codes:
        return Codes(*ops.gptq(
            goal, factor.c, *grid,
            fit="before" if self.order == "activation" else "in_order",
            points=0 if self.fit == "range" else self.points,
            importance=factor.importance if self.fit == "hessian" else None,
            order=factor.order, scale=scale, zero_point=zero_point, block=self.block,
        ))

    def _goal(self, weight: Tensor, stats: Stats, factor: Factor) -> Tensor:
        """The weight to be rounded. With D = (X_float - X)^T X and H = V V^T, in solving order:

        qronos: w + w D H^-1, the least-squares solution of w X_float = w' X;
        gptaq:  w (I + P), P = striu(D V^-T) V^-1, row q of D against the columns behind q only.
        """
        if self.target == "weight":
            return weight
        if stats.cross is None:
            raise MissingCalibrationError(f"target {self.target} needs Stats.cross, got none")
        # float64 throughout: a shift of the weights is small, and inherits H's condition.
        order, d, w = factor.order, stats.cross, weight.double()
        if order is not None:
            d, w = d[order[:, None], order], w[:, order]
        d, v = scaled(d, factor.exponent, torch.float64), factor.v

        def over_vt(b: Tensor) -> Tensor:  # b V^-T
            return torch.linalg.solve_triangular(v.mT, b, upper=False, left=False)

        def over_v(b: Tensor) -> Tensor:  # b V^-1
            return torch.linalg.solve_triangular(v, b, upper=True, left=False)

        if self.target == "qronos":
            shift = by_rows(lambda rows: over_v(over_vt(rows @ d)), w)
        else:
            p = by_rows(over_v, by_rows(over_vt, d).triu_(1))
            shift = by_rows(lambda rows: rows @ p, w)
        goal = (w + self.strength * shift).float()
        return goal if order is None else torch.empty_like(goal).index_copy_(1, order, goal)

    def _widen(
        self, goal: Tensor, codes: Codes, grid: tuple, factor: Factor
    ) -> tuple[Codes, int]:
        """Widen the groups whose targets leave their grid, until none does; and how many did."""
        bits, group_size, symmetric, scale_dtype = grid
        group = goal.shape[1] if group_size == -1 else group_size
        at = torch.arange(goal.shape[1], device=goal.device) // group
        if factor.order is not None:
            at = at[factor.order]
        w = goal.to(factor.c.dtype)
        w = w if factor.order is None else w[:, factor.order]
        widened = torch.zeros_like(codes.scale, dtype=torch.bool)
        for _ in range(64):  # 1.1^64 > 400 times the range
            back = ops.dequantize(*codes, group_size).to(w.dtype)
            back = back if factor.order is None else back[:, factor.order]
            targets = back + by_rows(lambda d: d @ factor.c, w - back)
            q = (targets / codes.scale.float()[:, at]).round() + codes.zero_point.float()[:, at]
            outside = ((q < 0) | (q > 2**bits - 1)).float()
            clipped = torch.zeros_like(codes.scale).float().index_add_(1, at, outside) > 0
            if not bool(clipped.any()):
                break
            widened |= clipped
            rows = clipped.any(1)
            scale = torch.where(clipped, codes.scale.float() * 1.1, codes.scale.float())[rows]
            scale = scale.to(codes.scale.dtype).float()
            part = self._round(goal[rows], grid, factor, scale, codes.zero_point[rows])
            for whole, new in zip(codes, part, strict=True):
                whole[rows] = new
        return codes, int(widened.sum())

