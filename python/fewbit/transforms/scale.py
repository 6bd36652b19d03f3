"""AWQ: per-channel scales chosen by the output error of the quantised readers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import UsageError
from ..reproducible import total
from ..scheme import MANY, check_int
from . import LayerContext, Transform
from .edges import Edge, apply_scale, edges, fit_range
from .race import Block, race

FORMS = ("search", "duo", "both", "closed-times", "closed-over")


class SearchScale(Transform):
    """AWQ's scales: for every edge, the candidate with the least output error.

    The loss is the sum over the edge's readers of ||X (Q(W s) / s - W)^T||^2, exact from the Gram
    matrix (Stats). s = 1 is always a candidate, so that an edge never gets worse than
    round-to-nearest. Before a solver that compensates errors, the winner, the candidate half-way to
    it and s = 1 meet once more, by the loss that this solver leaves. Candidates by ``form``, with
    r = 0, 1/points, .. (points - 1)/points:

      search        s = mean|x|^r                             (J. Lin et al., AWQ, 2023, sec. 3.2)
      duo           s = mean|x|^r / w^(1 - r)                 w: mean of |w| over its group's max
      both          the two of them
      closed-times  s = (E|x_j| / E|x|)^a (max|w_j| / max|w|)^(1 - a), one candidate, no search
      closed-over   the same with the weight factor below, which is SmoothQuant's direction

    ``alpha`` is a. ``inner``: also scale v -> o (under grouped-query attention too), up -> down and
    fc1 -> fc2 where nothing in between forbids it.
    """

    needs_stats = True

    def __init__(
        self, points: int = 20, form: str = "duo", alpha: float = 0.5, inner: bool = True
    ) -> None:
        if form not in FORMS:
            raise UsageError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        check_int("points", points, 1, MANY)
        if not 0 <= alpha <= 1:
            raise UsageError(f"alpha of a closed form must be in 0..1, got {alpha}")
        self.points, self.form, self.alpha, self.inner = points, form, alpha, inner

    @torch.no_grad()
    def layer(self, layer: nn.Module, context: LayerContext) -> None:
        for edge in edges(layer, context.family, context.config):
            if edge.kind == "inner" and not self.inner:
                continue
            blocks = reader_blocks(layer, edge, context)
            names, scales = self.candidates(edge, blocks, context.scheme.group_size)
            result = race([edge.to_readers(s) for s in scales], blocks, context.scheme)
            chosen, solved = result.best, {}
            if getattr(context.solver, "compensates", False):
                # What rounding gains by a scale, compensation may have gained already.
                for i in sorted({0, chosen // 2, chosen}):
                    solved[i] = sum(
                        solver_loss(b, edge.to_readers(scales[i]), context) for b in blocks
                    )
                chosen = min(solved, key=solved.__getitem__)
            best = fit_range(layer, edge, scales[chosen], context.family)
            apply_scale(layer, edge, best, context.family)
            move_stats(edge, best, context)
            context.records.append(
                {
                    "transform": "awq",
                    "edge": str(edge),
                    "ratio": names[chosen],
                    "loss": result.losses[chosen],
                    "rtn_loss": result.losses[0],
                    "ratios": names,
                    "losses": result.losses,
                    "exact": result.exact,
                    "solver_losses": {str(names[i]): loss for i, loss in solved.items()},
                }
            )

    def candidates(
        self, edge: Edge, blocks: list[Block], group_size: int
    ) -> tuple[list[float | str], list[Tensor]]:
        """Names (the ratio) and scales [source channels]; the first is s = 1."""
        x = edge.to_source(mean_abs(blocks))
        grid = [i / self.points for i in range(self.points)]
        names: list[float | str] = [0.0]
        scales = [torch.ones_like(x)]
        if self.form in ("search", "both"):
            names += grid[1:]
            scales += [awq_scale(x, r) for r in grid[1:]]
        if self.form in ("duo", "both"):
            w = edge.to_source(weight_mean(blocks, group_size))
            names += [f"duo {r}" for r in grid]
            scales += [centred(_floor(x).pow(r) / _floor(w).pow(1 - r)) for r in grid]
        if self.form.startswith("closed"):
            w = edge.to_source(weight_max(blocks), "max")
            direction = 1 if self.form == "closed-times" else -1
            names.append(self.form)
            scales.append(closed_scale(x, w, self.alpha, direction))
        return names, scales


def reader_blocks(layer: nn.Module, edge: Edge, context: LayerContext) -> list[Block]:
    """The readers' weights, those with the same statistics in one block."""
    groups: dict[int, list[str]] = {}
    for path in edge.readers:
        groups.setdefault(id(context.stats[path]), []).append(path)
    return [
        Block(
            torch.cat([layer.get_submodule(p).weight.float() for p in paths]),
            context.stats[paths[0]],
        )
        for paths in groups.values()
    ]


SOLVED_ROWS = 512  # of a block, for solver_loss


def solver_loss(block: Block, s: Tensor, context: LayerContext) -> float:
    """||X_float W^T - X W'^T||^2 / tokens, less what does not depend on W', when the context's
    solver puts W s on the grid; over at most SOLVED_ROWS rows at even distances."""
    weight, stats = block
    weight = weight[:: -(-len(weight) // SOLVED_ROWS)] * s
    stats = stats.scaled(s)
    codes, _ = context.solver.solve(weight, context.scheme, stats)
    dw = ops.dequantize(*codes, context.scheme.group_size) - weight
    loss = stats.output_loss(dw)
    if stats.cross is not None:  # ||(X_float - X) W^T - X dW^T||^2
        moved = (weight.to(stats.cross.dtype) @ stats.cross) * dw
        loss -= 2 * total(moved) / max(stats.tokens, 1)
    return loss


def move_stats(edge: Edge, s: Tensor, context: LayerContext) -> None:
    """Statistics of the inputs, which are now divided by ``s``; shared ones stay shared."""
    reader_scale, moved = edge.to_readers(s), {}
    for path in edge.readers:
        stats = context.stats[path]
        if id(stats) not in moved:
            moved[id(stats)] = stats, stats.scaled(reader_scale)
        context.stats[path] = moved[id(stats)][1]


def mean_abs(blocks: list[Block]) -> Tensor:
    """Mean |x| over the tokens of all blocks, [in_features]."""
    tokens = max(sum(b.stats.tokens for b in blocks), 1)
    return torch.stack([b.stats.sum_abs for b in blocks]).sum(0) / tokens


def weight_mean(blocks: list[Block], group_size: int) -> Tensor:
    """Mean over rows of |w| over the largest |w| of its group, [in_features]."""
    total, rows = 0.0, 0
    for weight, _ in blocks:
        columns = weight.shape[1]
        group = columns if group_size == -1 else group_size
        for start in range(0, columns, group):
            part = weight[:, start : start + group].abs()
            part = part / part.amax(1, keepdim=True).clamp(min=torch.finfo(part.dtype).tiny)
            weight = weight.clone() if start == 0 else weight
            weight[:, start : start + group] = part
        total, rows = total + weight.sum(0), rows + len(weight)
    return total / rows


def weight_max(blocks: list[Block]) -> Tensor:
    """Largest |w| of each column over all rows, [in_features]."""
    return torch.stack([b.weight.abs().amax(0) for b in blocks]).amax(0)


def _floor(value: Tensor) -> Tensor:
    """Dead channels get the smallest live value's share, never 0: s stays finite."""
    return value.float().clamp(min=1e-4)


def centred(s: Tensor) -> Tensor:
    """s over sqrt(max s min s): its extremes multiply to 1."""
    return s / (s.max() * s.min()).sqrt()


def awq_scale(magnitude: Tensor, ratio: float) -> Tensor:
    """magnitude^ratio, centred; finite for dead channels."""
    return centred(_floor(magnitude).pow(ratio))


def closed_scale(x: Tensor, w: Tensor, alpha: float, direction: int) -> Tensor:
    """(x / mean x)^alpha (w / max w)^(direction (1 - alpha)), centred; no search."""
    x = _floor(x / x.mean().clamp(min=1e-30))
    w = _floor(w / w.max().clamp(min=1e-30))
    return centred(x.pow(alpha) * w.pow(direction * (1 - alpha)))
