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
    hidden, values, hooks = {}, {}, []
    layers = decoder_layers(model, family)
    groups = norm_readers(family)
    every = max(1, sum(b.numel() for b in batches) * len(layers) * len(groups) // ROWS)

    def keep(store: dict, key: tuple[int, str]) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].detach()
            store.setdefault(key, []).append(x.reshape(-1, x.shape[-1])[::every])

        return hook

    energy = {}
    for index, layer in enumerate(layers):
        for norm, reads in groups.items():
            readers = [layer.get_submodule(path) for path in reads]
            energy[index, norm] = sum(total(r.weight.square()) for r in readers)
            hook = keep(hidden, (index, norm))
            # Experts see only their own tokens; the router, and any dense reader, sees all.
            hooks.append(readers[-1].register_forward_pre_hook(hook))
        for sub in family.sublayers:
            if sub.heads:
                writer = layer.get_submodule(sub.writes)
                hooks.append(writer.register_forward_pre_hook(keep(values, (index, sub.writes))))
    try:
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    mean = sum(energy.values()) / len(energy)
    rows = [torch.cat(x) * (energy[key] / mean) ** 0.5 for key, x in hidden.items()]
    return torch.cat(rows), [torch.cat(x) for x in values.values()]


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
