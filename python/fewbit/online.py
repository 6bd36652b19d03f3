"""What a rotated or activation-quantised linear does to its input, at run time.

Each is an nn.Module that hangs on the linear it serves and runs before it: paths, weights and the
linear's own class stay as they were, and calibration hooks, which come later, see the input that
the weight really meets. ``carry`` moves them when a linear is replaced by its packed form.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import hadamard
from .errors import UsageError

SLOTS = ("online_hadamard", "online_quant")  # in the order in which they are applied


class OnlineHadamard(nn.Module):
    """x -> x H, the orthogonal matrix of ``hadamard.plan(width)`` (QuaRot's R4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.plan = hadamard.plan(width)

    def forward(self, x: Tensor) -> Tensor:
        return hadamard.transform(x, self.plan)

    def extra_repr(self) -> str:
        kind = "Hadamard" if self.plan.exact else "Hartley"
        return f"{self.width} = {self.plan.m} ({kind}) x 2^{self.plan.k}"


def _before(linear: nn.Module, args: tuple) -> tuple:
    x = args[0]
    for slot in SLOTS:
        module = getattr(linear, slot, None)
        if module is not None:
            x = module(x)
    return (x, *args[1:])


def attach(linear: nn.Module, slot: str, module: nn.Module) -> None:
    """Run ``module`` on every input of ``linear``; one module per slot."""
    if slot not in SLOTS:
        raise UsageError(f"slot must be one of {SLOTS}, got {slot!r}")
    hooked = any(getattr(linear, s, None) is not None for s in SLOTS)
    linear.add_module(slot, module)
    if not hooked:
        linear.register_forward_pre_hook(_before)


def carry(old: nn.Module, new: nn.Module) -> None:
    """Hang what serves ``old`` on the module that replaces it."""
    for slot in SLOTS:
        module = getattr(old, slot, None)
        if module is not None:
            attach(new, slot, module)


def online_paths(model: nn.Module) -> list[str]:
    """Paths of the linears whose weights expect an online Hadamard transform."""
    return [
        name for name, m in model.named_modules()
        if isinstance(getattr(m, "online_hadamard", None), OnlineHadamard)
    ]


@torch.no_grad()
def detach(linear: nn.Module, slot: str) -> None:
    """Take the module of a slot away again."""
    if getattr(linear, slot, None) is not None:
        setattr(linear, slot, None)
