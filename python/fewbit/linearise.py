"""Bring every weight that a method works on into an nn.Linear, without copying it.

GPT-2's Conv1D keeps its weight transposed, and mixture-of-experts layers keep all experts of a
layer in two three-dimensional parameters. The Linears made here hold views of the same storage, so
that nothing is doubled, and the model computes what it did before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from .errors import UnknownFamilyError
from .families import Family, decoder_layers, describe


class Expert(nn.Module):
    """One gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, act: Callable) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """The experts of one layer, with the call that the layer makes to their fused form.

    ``rows``, while an expert runs: which of the tokens it was given, for calibration's masks.
    """

    rows: Tensor | None = None

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """``hidden`` [tokens, hidden]; ``index`` and ``weights`` [tokens, top_k]."""
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            rows, place = torch.where(index == number)
            if len(rows) == 0:
                continue
            self.rows = rows
            y = expert(hidden[rows]) * weights[rows, place, None]
            out.index_add_(0, rows, y.to(out.dtype))
        self.rows = None
        return out


def linearise(model: nn.Module, family: Family) -> Callable[[], None]:
    """Replace Conv1D and fused experts in the decoder layers; returns what undoes it.

    Raises UnsupportedError for fused experts of an unknown layout.
    """
    changed = [
        change
        for layer in decoder_layers(model, family)
        for change in linearise_layer(layer, family)
    ]

    def undo() -> None:
        for parent, name, module in changed:
            setattr(parent, name, module)

    return undo


def linearise_layer(layer: nn.Module, family: Family) -> list[tuple[nn.Module, str, nn.Module]]:
    """The same for one layer; returns (parent, name, module) of what was replaced."""
    changed = []
    for path in (*family.linears(), family.experts):
        parent, _, name = path.rpartition(".")
        try:
            module = layer.get_submodule(path) if path else None
        except AttributeError:  # an expert inside the fused module: below
            continue
        made = None
        if type(module).__name__ == "Conv1D":
            made = linear_view(module.weight.T, module.bias)
        elif path == family.experts and module is not None and not isinstance(module, Experts):
            made = unfuse(module, path)
        if made is not None:
            made.train(module.training)
            changed.append((layer.get_submodule(parent), name, module))
            setattr(layer.get_submodule(parent), name, made)
    return changed


def linearise_known(model: nn.Module) -> None:
    """Linearise a model that is to take stored Linears; one that no family describes stays."""
    with suppress(UnknownFamilyError):
        linearise(model, describe(model))


def linear_view(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """An nn.Linear on this storage: ``weight`` [out_features, in_features]."""
    linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    linear.bias = bias
    return linear


def unfuse(module: nn.Module, path: str) -> Experts:
    """Experts of gate_up_proj [experts, 2 inner, hidden] and down_proj [.., hidden, inner]."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    act = getattr(module, "act_fn", None)
    fits = (
        isinstance(gate_up, Tensor) and isinstance(down, Tensor) and act is not None
        and gate_up.dim() == 3 and gate_up.shape[1] == 2 * down.shape[2]
        and not getattr(module, "is_transposed", False) and not getattr(module, "has_bias", False)
    )
    if not fits:
        raise UnknownFamilyError(
            f"{path} is a {type(module).__name__} whose fused expert weights have an unknown layout"
        )
    inner = down.shape[2]
    return Experts(
        Expert(linear_view(a[:inner]), linear_view(a[inner:]), linear_view(b), act)
        for a, b in zip(gate_up, down, strict=True)
    )
