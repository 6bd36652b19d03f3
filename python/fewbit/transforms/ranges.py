"""Rotations that make the largest channel of every token small, from activations alone.

The step of a per-token grid is the token's largest |x|, so the error of quantised inputs is, up to
a factor, the mean of max_j (x R)_j^2. Its smooth form, the p-norm in place of the maximum, is
minimised over the Stiefel manifold on a sample of real tokens; no pass through the network is
needed, so a step costs one product of 1024 tokens with R. Inputs of a norm's readers count with
the energy of those readers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..families import Family, decoder_layers
from ..reproducible import total
from .fold import norm_readers
from .rows import input_rows
from .stiefel import Stiefel

POWER = 8  # of the norm: flat enough to see all large channels, steep enough to follow the largest
TOKENS = 1024  # per step
ROWS = 65536  # of activations kept, over all layers


@torch.no_grad()
def sample_inputs(
    model: nn.Module, family: Family, batches: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Inputs of all norms' readers [tokens, hidden], and of each attention's writer by layer.

    ``model`` is folded, float and not rotated; every layer gives the same number of tokens.
    """
    layers, groups = decoder_layers(model, family), norm_readers(family)
    readers, writers, energy = {}, {}, {}
    for index, layer in enumerate(layers):
        for norm, reads in groups.items():
            linears = [layer.get_submodule(path) for path in reads]
            energy[index, norm] = sum(total(r.weight.square()) for r in linears)
            # Experts see only their own tokens; the router, and any dense reader, sees all.
            readers[index, norm] = linears[-1]
        for sub in family.sublayers:
            if sub.heads:
                writers[index, sub.writes] = layer.get_submodule(sub.writes)
    rows = max(1, ROWS // len(readers))
    found = input_rows(model, readers | writers, batches, rows)
    mean = sum(energy.values()) / len(energy)
    hidden = [found[key] * (energy[key] / mean) ** 0.5 for key in readers]
    return torch.cat(hidden), [found[key] for key in writers]


def spread(y: Tensor) -> Tensor:
    """Mean squared POWER-norm of the rows of y: what a per-token grid pays."""
    top = y.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(y.dtype).tiny)
    norm = (y / top).pow(POWER).sum(-1).pow(1 / POWER)
    return (top.squeeze(-1) * norm).square().mean()


def learn(
    matrix: Stiefel, turn: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: int, lr: float,
    generator: torch.Generator,
) -> list[float]:
    """Minimise ``spread(turn(x, R))`` over R in place; the losses of the steps."""
    losses = []
    for step in range(steps):
        pick = torch.randint(len(x), (min(TOKENS, len(x)),), generator=generator)
        loss = spread(turn(x[pick], matrix.value))
        loss.backward()
        losses.append(float(loss.detach()))
        matrix.step(lr * (1 - step / steps))
    return losses
