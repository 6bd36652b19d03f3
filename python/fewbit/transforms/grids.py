"""The activation grid of a linear, chosen by what it does to the linear's output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..online import clipped_grid

CLIPS = tuple(step / 20 for step in range(12, 21))


class Grid(NamedTuple):
    """``error``: mean over tokens of ||(Q(x) - x) W^T||^2, summed over the readers."""

    symmetric: bool
    clip: float
    error: float


@torch.no_grad()
def fit_grid(x: Tensor, weights: list[Tensor], bits: int, per: str = "token") -> Grid:
    """The grid of x [tokens, K] with the least error of the outputs of ``weights`` [N, K] each:
    symmetric or not, with the range clipped to one of ``CLIPS``.

    One grid serves all readers of an input, which is quantised once. ``per`` "tensor": the range is
    the whole sample's.
    """
    gram = sum(w.float().mT @ w.float() for w in weights)
    rows = x.float() if per == "token" else x.float().reshape(1, -1)
    found = []
    for symmetric in (True, False):
        for clip in CLIPS:
            dx = (clipped_grid(rows, bits, symmetric, clip) - rows).reshape(x.shape)
            error = float(((dx @ gram) * dx).sum(dtype=torch.float64)) / max(len(x), 1)
            found.append(Grid(symmetric, clip, error))
    return min(found, key=lambda grid: grid.error)
