"""Find the candidate scale with the least loss without measuring every candidate in full.

The loss of a scale is a sum over output rows, each with a quadratic form of the Gram matrix:
sum over rows of dW G dW^T, dW = Q(W s) / s - W. All candidates are measured on a few rows, spread
evenly over the rows' energies; who is worse than the best by more than ``SIGMAS`` standard errors
of the paired difference drops out. For those left a cheap stand-in is computed on all rows, from
G ~ P P^T + D (rank ``RANK`` and a diagonal); what the sample has to tell is then only the
difference between the loss and the stand-in, some 15 times less scattered. The rest see more rows,
and if the rows run out, the last ones are measured in full.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..reproducible import one_thread, total
from ..scheme import Scheme
from ..stats import Stats

SIGMAS = 4.0  # one wrong exclusion in 30000 comparisons of normal errors
FIRST = 48  # rows of the first round
RANK = 64
ROOM = 1 << 26  # elements of the errors that are held at once


class Block(NamedTuple):
    """Rows that read the same inputs: ``weight`` [rows, in_features] float32, and their Stats."""

    weight: Tensor
    stats: Stats

    @property
    def gram(self) -> Tensor:
        """G in the weights' type: candidates differ by more than its rounding."""
        return self.stats.gram.float()


class Result(NamedTuple):
    """``losses`` by candidate: exact where ``exact``, else estimated from the rows it saw."""

    best: int
    losses: list[float]
    exact: list[bool]


def row_losses(weight: Tensor, scales: Tensor, gram: Tensor, scheme: Scheme) -> Tensor:
    """(Q(w s) / s - w) G (..)^T of each row of ``weight`` [rows, K], for every row s of ``scales``
    [candidates, K]: float64 [candidates, rows]."""
    out = []
    for some in scales.split(max(1, ROOM // max(weight.numel(), 1))):
        for dw in errors_of(weight, some, scheme):
            out.append(((dw @ gram) * dw).sum(1, dtype=torch.float64))
    return torch.stack(out)


def error_of(weight: Tensor, s: Tensor, scheme: Scheme) -> Tensor:
    """Q(W s) / s - W."""
    return errors_of(weight, s.float()[None], scheme)[0]


def errors_of(weight: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """``error_of`` for every row of ``scales``, in one pass over the weight."""
    return ops.scaled_error(
        weight, scales, scheme.bits, scheme.group_size, scheme.symmetric, scheme.scale_dtype
    )


def full_loss(block: Block, s: Tensor, scheme: Scheme) -> float:
    """||X (Q(W s) / s - W)^T||^2 / tokens over all rows.

    G is symmetric: column panel j needs only rows 0..j of G, which halves the product.
    """
    dw, gram = error_of(block.weight, s, scheme), block.gram
    columns, loss = dw.shape[1], 0.0
    panel = max(256, -(-columns // 8))
    for j in range(0, columns, panel):
        end = min(j + panel, columns)
        right = dw[:, j:end]
        loss += total((right @ gram[j:end, j:end]) * right)
        if j:
            product = dw[:, :j] @ gram[:j, j:end]
            loss += 2 * total(product.mul_(right))
    return loss / max(block.stats.tokens, 1)


def race(candidates: list[Tensor], blocks: list[Block], scheme: Scheme) -> Result:
    """The candidate (columns' scale [in_features]) with the least summed loss over ``blocks``."""
    rows = sum(len(b.weight) for b in blocks)
    alive = list(range(len(candidates)))
    losses, exact = [math.nan] * len(candidates), [False] * len(candidates)
    seen = torch.zeros(len(candidates), 0, dtype=torch.float64)  # loss, less the stand-in
    standins: dict[int, Tensor] = {}  # over all rows
    order = torch.zeros(0, dtype=torch.int64)  # rows seen
    for picked in _rounds(blocks, rows):
        fresh = torch.full((len(candidates), len(picked)), math.nan, dtype=torch.float64)
        fresh[alive] = _on_rows(picked, blocks, [candidates[i] for i in alive], scheme)
        if standins:
            for i in alive:
                fresh[i] -= standins[i][picked]
        order = torch.cat([order, picked])
        seen = torch.cat([seen, fresh], 1)
        alive = _keep(alive, seen, standins, losses, rows)
        if len(alive) > 1 and not standins:
            splits = [_split(b.gram) for b in blocks]
            for i in alive:
                standins[i] = _standin(blocks, splits, candidates[i], scheme)
                seen[i] -= standins[i][order]
            alive = _keep(alive, seen, standins, losses, rows)
        if len(alive) == 1:
            break
    if len(alive) > 1:
        for i in alive:
            losses[i] = sum(full_loss(b, candidates[i], scheme) for b in blocks)
            exact[i] = True
    return Result(min(alive, key=lambda i: losses[i]), losses, exact)


def _keep(
    alive: list[int], seen: Tensor, standins: dict[int, Tensor], losses: list[float], rows: int
) -> list[int]:
    """Update the estimates of ``losses``, and drop who is surely worse than the best."""
    base = {i: float(standins[i].mean()) if standins else 0.0 for i in alive}
    for i in alive:
        losses[i] = (float(seen[i].mean()) + base[i]) * rows
    best = min(alive, key=lambda i: losses[i])
    kept = []
    for i in alive:
        d = seen[i] - seen[best]
        gap = float(d.mean()) + base[i] - base[best]
        if i == best or gap <= SIGMAS * float(d.std()) / math.sqrt(d.numel()):
            kept.append(i)
    return kept


def _on_rows(
    picked: Tensor, blocks: list[Block], candidates: list[Tensor], scheme: Scheme
) -> Tensor:
    """Losses [candidates, picked] of the rows ``picked`` (numbered through all blocks)."""
    out, start = torch.zeros(len(candidates), len(picked), dtype=torch.float64), 0
    scales = torch.stack(candidates).float()
    for block in blocks:
        weight, stats = block
        here = (picked >= start) & (picked < start + len(weight))
        if bool(here.any()):
            part = weight[(picked[here] - start).to(weight.device)]
            losses = row_losses(part, scales, block.gram, scheme).cpu()
            out[:, here] = losses / max(stats.tokens, 1)
        start += len(weight)
    return out


def _standin(
    blocks: list[Block], splits: list[tuple[Tensor, Tensor]], s: Tensor, scheme: Scheme
) -> Tensor:
    """||dW P||^2 + dW^2 D of every row."""
    out = []
    for (weight, stats), (p, d) in zip(blocks, splits, strict=True):
        dw = error_of(weight, s, scheme)
        low = (dw @ p).square().sum(1, dtype=torch.float64)
        out.append((low + (dw.square_() @ d)).cpu() / max(stats.tokens, 1))
    return torch.cat(out)


def _split(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(P [K, rank], D [K]) with G ~ P P^T + diag(D): the Nystrom form on G's dominant subspace."""
    size = len(gram)
    generator = torch.Generator().manual_seed(0)
    omega = torch.randn(size, min(RANK, size), generator=generator).to(gram.device)
    for _ in range(2):
        image = gram @ omega
        with one_thread():
            omega = torch.linalg.qr(image).Q
    image = gram @ omega
    with one_thread():
        level, turn = torch.linalg.eigh(omega.T @ image)
    live = level > 1e-6 * level.max().clamp(min=torch.finfo(level.dtype).tiny)
    p = (image @ turn[:, live]) / level[live].sqrt()
    return p, gram.diagonal() - p.square().sum(1)


def _rounds(blocks: list[Block], rows: int) -> list[Tensor]:
    """Disjoint row samples: FIRST, then three times as many as seen so far, up to a quarter.

    Rows are ordered by energy and taken at even distances, so each round sees all sizes of row.
    Empty when the matrices are too small for sampling to pay.
    """
    if blocks[0].weight.shape[1] < 1024:
        return []
    energy = torch.cat([(b.weight.square() @ b.gram.diagonal()).cpu() for b in blocks])
    order = energy.argsort(stable=True)
    free = torch.ones(rows, dtype=torch.bool)
    rounds, total, size = [], 0, FIRST
    while total + size <= rows // 4:
        left = order[free[order]]
        picked = left[((torch.arange(size) + 0.5) * (len(left) / size)).long()]
        free[picked] = False
        rounds.append(picked)
        total += size
        size = 3 * total
    return rounds
