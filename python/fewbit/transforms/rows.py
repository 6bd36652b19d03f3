"""Rows of the inputs that linears see, while calibration windows run through the whole model."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor, nn

Key = TypeVar("Key", bound=Hashable)


@torch.no_grad()
def input_rows(
    model: nn.Module, linears: dict[Key, nn.Module], batches: list[Tensor], rows: int
) -> dict[Key, Tensor]:
    """Inputs of each of ``linears`` [tokens, width], about ``rows`` tokens at even distances.

    One that no token reaches (an expert) is left out.
    """
    every = max(1, sum(b.numel() for b in batches) // rows)
    found: dict[Key, list[Tensor]] = {key: [] for key in linears}

    def keep(store: list[Tensor]) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            store.append(args[0].detach().reshape(-1, args[0].shape[-1])[::every])

        return hook

    hooks = [m.register_forward_pre_hook(keep(found[key])) for key, m in linears.items()]
    try:
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {key: torch.cat(parts) for key, parts in found.items() if parts}
