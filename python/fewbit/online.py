"""What a rotated or activation-quantised linear does to its input, at run time.

Each is an nn.Module that hangs on the linear it serves and runs before it: paths, weights and the
linear's own class stay as they were, and calibration hooks, which come later, see the input that
the weight really meets. ``carry`` moves them when a linear is replaced by its packed form, whose
product takes the codes of a symmetric grid, and the transform before it, into its operators.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import hadamard, ops
from .errors import UsageError
from .linear import KeepsType, PackedLinear
from .orthogonal import Rotation

SLOTS = ("online_hadamard", "online_quant")  # in the order in which they are applied
KV_SLOT = "online_kv"  # of an attention module (kv.py)


class OnlineHadamard(KeepsType):
    """x -> (x signs) H for the matrix H of ``hadamard.plan(width)`` (QuaRot's R4).

    Signs keep the sum of all channels, large behind a ReLU, from meeting a row of ones.
    """

    def __init__(self, rotation: Rotation) -> None:
        super().__init__()
        self.plan, signs = rotation.plan, rotation.signs
        names = []
        for i, base in enumerate(self.plan.bases() if self.plan.m > 1 else []):
            names.append(f"base{i}")
            self.register_buffer(names[-1], base, persistent=False)
        self.keeps_type = tuple(names)  # rounded, a base would no longer be orthogonal
        signs = None if signs is None else signs.to(torch.int8)
        self.register_buffer("signs", signs)  # random: saved with the weights that expect it

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:  # the operator is float32 inside
            x = x if self.signs is None else x * self.signs
            return hadamard.transform(x, self.plan)
        return ops.hadamard(x.reshape(-1, self.plan.n), self._bases(), self.signs).reshape(x.shape)

    def codes(self, x: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor]:
        """The result of x [tokens, width] as ``ops.hadamard_quantize`` gives it, on the symmetric
        grid of an ActivationQuant, and scales float32 [tokens]."""
        return ops.hadamard_quantize(x, self._bases(), self.signs, bits, clip)

    def _bases(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.keeps_type]

    def settings(self) -> dict:
        """JSON for runtime.py."""
        return {"width": self.plan.n, "signs": self.signs is not None}

    def extra_repr(self) -> str:
        kind = "Hadamard" if self.plan.exact else "Hartley"
        bases = " x ".join(str(order) for order in self.plan.orders) or "1"
        return f"{self.plan.n} = {bases} ({kind}) x 2^{self.plan.k}"


class ActivationQuant(nn.Module):
    """Puts the input of a linear on a grid and back: one scale (and zero point) per token.

    x [..., width] of any float type, arithmetic in float32. The range holds 0 and is shrunk by
    ``clip``; ``symmetric`` fixes the zero point in the middle. ``per`` "tensor": one scale for all
    tokens of the call. A PackedLinear multiplies codes of a symmetric grid in integers, where no
    gradient is asked for.
    """

    def __init__(
        self, bits: int, symmetric: bool = True, clip: float = 1.0, per: str = "token"
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise UsageError(f"activation bits must be in 2..8, got {bits}")
        if not 0 < clip <= 1:
            raise UsageError(f"clip must be above 0 and at most 1, got {clip}")
        if per not in ("token", "tensor"):
            raise UsageError(f'per must be "token" or "tensor", got {per!r}')
        self.bits, self.symmetric, self.clip, self.per = bits, symmetric, clip, per

    def forward(self, x: Tensor) -> Tensor:
        return straight_through(self.grid, x)

    def grid(self, x: Tensor) -> Tensor:
        """x on its grid and back, without a gradient."""
        flat = x.reshape(-1, x.shape[-1]) if self.per == "token" else x.reshape(1, -1)
        if self.clip == 1 and x.dtype != torch.float64:
            on_grid = ops.pseudo_quantize(flat, self.bits, -1, self.symmetric)
            return (on_grid + poison(flat)).reshape(x.shape)
        return clipped_grid(flat, self.bits, self.symmetric, self.clip).reshape(x.shape)

    def serves(self, x: Tensor) -> bool:
        """Whether ``codes`` can stand for ``forward``: 2^16 of them are summed exactly."""
        gradient = torch.is_grad_enabled() and x.requires_grad
        wide = x.dtype == torch.float64 or x.shape[-1] > 2**16
        return self.symmetric and not gradient and not wide

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 [tokens, width] of x [tokens, width] around 0, and scales float32 [tokens];
        their product is ``grid(x)``, before it is rounded to the type of x."""
        flat = x if self.per == "token" else x.reshape(1, -1)
        middle = 2 ** (self.bits - 1)
        if self.clip == 1:
            q, scale, _ = ops.quantize(flat, self.bits, -1, True)
            q, scale = (q - middle).view(torch.int8), scale + poison(flat).float()  # modulo 256
        else:
            scale = symmetric_scale(flat.float(), self.bits, self.clip)
            q = (flat / scale).round_().clamp_(-middle, middle - 1).to(torch.int8)
        return q.reshape(x.shape), scale.reshape(-1).expand(len(x)).contiguous()

    def settings(self) -> dict:
        """JSON for runtime.py."""
        return {name: getattr(self, name) for name in ("bits", "symmetric", "clip", "per")}

    def extra_repr(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.bits} bits, {kind}, clip={self.clip}, per {self.per}"


def straight_through(grid: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """grid(x), with the gradient of x itself where one is asked for."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return grid(x)
    with torch.no_grad():
        moved = grid(x) - x
    return x + moved


def clipped_grid(x: Tensor, bits: int, symmetric: bool, clip: float) -> Tensor:
    """Rows of x [rows, width] on the grid of ``clip`` times their range, and back."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    top = 2**bits - 1
    if symmetric:
        scale = symmetric_scale(h, bits, clip)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = h.amin(-1, keepdim=True).clamp(max=0), h.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) * clip / top
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = (-low * clip / scale).round()
    q = ((h / scale).round() + zero).clamp(0, top)
    return ((q - zero) * scale).to(x.dtype)


def poison(x: Tensor) -> Tensor:
    """[rows, 1]: 0, or NaN for a row of x that is not finite; codes would hide that."""
    return x.abs().amax(-1, keepdim=True) * 0


def symmetric_scale(h: Tensor, bits: int, clip: float) -> Tensor:
    """Of each row of h [rows, width], [rows, 1]: twice its largest magnitude, clipped, over the
    2^bits - 1 steps; 1 for a row of zeros."""
    high = h.abs().amax(-1, keepdim=True)
    scale = (high + high) * clip / (2**bits - 1)
    return torch.where(scale == 0, torch.ones_like(scale), scale)  # NaN stays


def _before(linear: nn.Module, args: tuple) -> tuple:
    x = args[0]
    taken = linear.takes(x) if isinstance(linear, PackedLinear) else ()
    for slot in SLOTS:
        module = getattr(linear, slot, None)
        if module is not None and slot not in taken:
            x = module(x)
    return (x, *args[1:])


def attach(linear: nn.Module, slot: str, module: nn.Module) -> None:
    """Run ``module`` on every input of ``linear``; one module per slot."""
    if slot not in SLOTS:
        raise UsageError(f"slot must be one of {SLOTS}, got {slot!r}")
    linear.add_module(slot, module)
    # Asked of the hooks, not of the slots: after restore_ the slots are gone and the hook is not.
    if _before not in linear._forward_pre_hooks.values():
        linear.register_forward_pre_hook(_before)


def carry(old: nn.Module, new: nn.Module) -> None:
    """Hang what serves ``old`` on the module that replaces it."""
    for slot in SLOTS:
        module = getattr(old, slot, None)
        if module is not None:
            attach(new, slot, module)


def online_paths(model: nn.Module) -> list[str]:
    """Paths of the modules that have something to run beside their weights."""
    return [
        name for name, module in model.named_modules()
        if any(getattr(module, slot, None) is not None for slot in (*SLOTS, KV_SLOT))
    ]


@torch.no_grad()
def detach(linear: nn.Module, slot: str) -> None:
    """Take the module of a slot away again."""
    if getattr(linear, slot, None) is not None:
        setattr(linear, slot, None)
