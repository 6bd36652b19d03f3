"""The activation grid of a linear, chosen by what it does to the linear's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..families import Family, decoder_layers
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


@torch.no_grad()
def sample_rows(
    model: nn.Module, family: Family, paths: list[str], batches: list[Tensor], rows: int = 512
) -> list[dict[str, Tensor]]:
    """By layer: inputs of the linears at ``paths``, about ``rows`` [tokens, width] at even
    distances."""
    every = max(1, sum(b.numel() for b in batches) // rows)
    found: list[dict[str, list]] = []
    hooks = []

    def keep(store: list) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            store.append(args[0].detach().reshape(-1, args[0].shape[-1])[::every])

        return hook

    for layer in decoder_layers(model, family):
        found.append({path: [] for path in paths})
        hooks += [
            layer.get_submodule(path).register_forward_pre_hook(keep(store))
            for path, store in found[-1].items()
        ]
    try:
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [{path: torch.cat(x) for path, x in layer.items() if x} for layer in found]
