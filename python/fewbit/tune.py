"""Distillation: codes, scales, norms and biases of a quantised model, learned from the float one.

A solver sees one linear at a time; here the whole quantised network is trained for a few hundred
steps so that its predictions on calibration text come back to the float model's: the loss is
KL(float || quantised), averaged over tokens, so no labels are learned. A code is round(v) of a
latent v that starts at the solver's code (the middle of its cell, because compensated errors put
the original weight far outside), a scale is s exp(t); gradients pass straight through the rounding
(AdaRound, M. Nagel et al., 2020, learns the rounding; LSQ, S. Esser et al., 2020, the scale;
EfficientQAT, M. Chen et al., 2024, both end to end; PV-tuning, V. Malinovskii et al., 2024, the
codes of a compressed model). Zero points, group size and number of bits stay, so the result is
stored and served like the solver's own.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .calibrate import Windows
from .errors import CalibrationError, ShortTextError, UsageError
from .families import Family, decoder_layers
from .linear import Int4Linear, Int8Linear, PackedLinear
from .online import carry, straight_through
from .pseudo import PseudoInt8Linear, activation_module, fake_quantize
from .scheme import MANY, Codes, check_int

# their exact types, not subclasses
TUNABLE = (PackedLinear, Int8Linear, Int4Linear, PseudoInt8Linear)


@dataclass(frozen=True)
class Tune:
    """``epochs`` over the calibration windows in batches of ``batch``, Adam with a learning rate
    that falls to 0 along a cosine.

    Learning rates: ``codes`` and ``scales`` in steps of the grid (of a scale: what the outermost
    code moves by), ``norms`` relative to the value (gains and biases of norms, biases of linears).
    ``holdout`` of the windows, the last ones, are not learned from: when KL on them has not fallen,
    the model stays as it was. ``solved``: how many windows, at even distances, the transforms and
    the solver before it see; they gain less from more of them, at more time for each.
    """

    epochs: float = 1.0
    batch: int = 4
    codes: float = 3e-2
    scales: float = 8e-3
    norms: float = 4e-3
    holdout: float = 0.0625
    solved: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "codes", "scales", "norms"):
            if not 0 <= getattr(self, name) <= MANY:
                raise UsageError(f"{name} must be in 0..{MANY}, got {getattr(self, name)!r}")
        check_int("batch", self.batch, 1, MANY)
        check_int("solved", self.solved, 1, 1000 * MANY)
        check_int("seed", self.seed, 0, 2**32 - 1)
        if not 0 < self.holdout < 1:
            raise UsageError(f"holdout must be above 0 and below 1, got {self.holdout}")

    def to_dict(self) -> dict:
        return asdict(self)


class _Dequantize(torch.autograd.Function):
    """w = (clamp(round(v), 0, top) - z) s with straight-through gradients.

    v [N, K], s and z [N, groups]; dw/dv = s inside the grid and 0 outside, dw/ds = q - z.
    """

    @staticmethod
    def forward(ctx, v: Tensor, s: Tensor, z: Tensor, group: int, top: int) -> Tensor:
        columns = v.shape[1]
        wide = s.repeat_interleave(group, 1)[:, :columns]
        rounded = v.round()
        code = rounded.clamp(0, top)
        ctx.save_for_backward((rounded == code), s)
        code = code - z.repeat_interleave(group, 1)[:, :columns]
        ctx.code, ctx.group = code, group
        return code * wide

    @staticmethod
    def backward(ctx, grad: Tensor):
        inside, s = ctx.saved_tensors
        rows, columns = grad.shape
        wide = s.repeat_interleave(ctx.group, 1)[:, :columns]
        share = F.pad(grad * ctx.code, (0, s.shape[1] * ctx.group - columns))
        ds = share.reshape(rows, s.shape[1], ctx.group).sum(2)
        return grad * wide * inside, ds, None, None, None


class TunedLinear(nn.Module):
    """A packed linear while it is learned: latent codes and log scale factors as parameters."""

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        object.__setattr__(self, "original", packed)  # no child: its buffers are not this model's
        codes, scheme = packed.codes(), packed.scheme
        self.scheme, self.group = scheme, scheme.group_of(codes.q.shape[1])
        self.kind, self.x_scale = type(packed), getattr(packed, "x_scale", None)
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.scale, self.zero_point = codes.scale.float(), codes.zero_point.float()
        self.latent = nn.Parameter(codes.q.float())
        self.stretch = nn.Parameter(torch.zeros_like(self.scale))
        self.bias = None if packed.bias is None else nn.Parameter(packed.bias.float().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.kind is not PackedLinear:  # a PackedLinear's inputs are float, or put on their grid
            x = straight_through(self._grid, x)
        scale = self.scale * self.stretch.exp()
        top = 2**self.scheme.bits - 1
        weight = _Dequantize.apply(self.latent, scale, self.zero_point, self.group, top)
        return F.linear(x, weight, self.bias)

    def _grid(self, x: Tensor) -> Tensor:
        scheme, flat = self.scheme, x.reshape(-1, self.in_features)
        flat = fake_quantize(flat, scheme.activation_bits, scheme.activations, self.x_scale)
        return flat.reshape(x.shape)

    def packed(self) -> PackedLinear:
        """The learned linear in the form in which it came."""
        dtype = getattr(torch, self.scheme.scale_dtype)
        q = self.latent.detach().round().clamp(0, 2**self.scheme.bits - 1).to(torch.uint8)
        scale = (self.scale * self.stretch.detach().exp()).clamp(max=torch.finfo(dtype).max)
        codes = Codes(q, scale.to(dtype), self.zero_point.to(torch.uint8))
        bias = None if self.bias is None else self.bias.detach()
        if self.kind is PackedLinear:
            return PackedLinear(codes, self.scheme, bias)
        return activation_module(codes, self.scheme, bias, self.x_scale)


def tune_(
    model: nn.Module, teacher: nn.Module, family: Family, data: Windows, options: Tune
) -> dict:
    """Learn the packed linears of a quantised ``model`` against ``teacher``, in place.

    Returns the record for the Report: KL on the held-out windows before and after, whether the
    result was kept, steps, seconds. Raises UsageError for a linear that is not codes on one grid
    (mixed, LLM.int8()), CalibrationError for fewer than two windows or padded ones.
    """
    started = time.monotonic()
    if any(mask is not None for mask in data.masks):
        raise CalibrationError("tune needs calibration windows without padding")
    held = max(1, round(len(data.batches) * options.holdout))
    if len(data.batches) - held < 1:
        raise ShortTextError(
            f"tune needs at least 2 calibration windows, got {len(data.batches)}"
        )
    learn, test = data.batches[:-held], data.batches[-held:]
    before = divergence(model, teacher, test)
    tuned = _replace(model, family)
    others = _norms(model, family)
    keep = [(p, p.detach().clone()) for p in others]
    steps = max(1, round(options.epochs * len(learn) / options.batch))
    frozen = [p for p in model.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    groups = _groups(tuned, others, options)
    learned = [p for group in groups for p in group["params"]]
    for p in learned:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
    )
    generator = torch.Generator().manual_seed(options.seed)
    queue: list[int] = []
    with torch.enable_grad():
        for _ in range(steps):
            while len(queue) < options.batch:
                queue += torch.randperm(len(learn), generator=generator).tolist()
            rows = [learn[queue.pop(0)] for _ in range(options.batch)]
            optimizer.zero_grad(set_to_none=True)
            for batch in _stack(rows):
                loss = _kl(model, teacher, batch) * (batch.shape[0] / len(rows))
                loss.backward()
            optimizer.step()
            schedule.step()
    for p in learned:
        p.grad = None
        p.requires_grad_(False)
    results = {path: module.packed() for path, module in tuned.items()}
    originals = {path: module.original for path, module in tuned.items()}
    _place(model, results)
    after = divergence(model, teacher, test)
    kept = bool(after < before)
    if not kept:
        _place(model, originals)
        for p, old in keep:
            p.data.copy_(old)
    for p in frozen:
        p.requires_grad_(True)
    return {
        "kl_before": before, "kl_after": after, "kept": kept, "steps": steps,
        "seconds": time.monotonic() - started,
    }


@torch.no_grad()
def divergence(model: nn.Module, teacher: nn.Module, batches: list[Tensor]) -> float:
    """Mean KL(teacher || model) per token, in nats."""
    total = count = 0.0
    for batch in batches:
        total += float(_kl(model, teacher, batch)) * batch.numel()
        count += batch.numel()
    return total / count


def _kl(model: nn.Module, teacher: nn.Module, batch: Tensor) -> Tensor:
    device = next(model.parameters()).device
    batch = batch.to(device)
    with torch.no_grad():
        p = teacher(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)
    q = model(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)
    return F.kl_div(q.flatten(0, 1), p.flatten(0, 1), reduction="batchmean", log_target=True)


def _stack(rows: list[Tensor]) -> list[Tensor]:
    """Windows of one length as one batch."""
    lengths = {row.shape[-1] for row in rows}
    return [torch.cat(rows)] if len(lengths) == 1 else rows


def _replace(model: nn.Module, family: Family) -> dict[str, TunedLinear]:
    tuned = {}
    for i, layer in enumerate(decoder_layers(model, family)):
        for path in family.linears():
            name, packed = f"{family.layers}.{i}.{path}", layer.get_submodule(path)
            if type(packed) not in TUNABLE:
                raise UsageError(f"tune cannot learn {name}, a {type(packed).__name__}")
            if type(packed) is not PackedLinear and not packed.scheme.symmetric_activations:
                raise UsageError(f"tune cannot learn {name}: its activations are asymmetric")
            tuned[name] = TunedLinear(packed)
    _place(model, tuned)
    return tuned


def _place(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        carry(model.get_submodule(name), module)
        setattr(model.get_submodule(parent), child, module)


def _norms(model: nn.Module, family: Family) -> list[nn.Parameter]:
    """Gains and biases of the norms of all layers, and of the final one."""
    found = {}
    for layer in decoder_layers(model, family):
        for sub in family.sublayers:
            for p in layer.get_submodule(sub.norm).parameters(recurse=False):
                found[id(p)] = p
    for p in model.get_submodule(family.final_norm).parameters(recurse=False):
        found[id(p)] = p
    return list(found.values())


def _groups(tuned: dict, norms: list[nn.Parameter], options: Tune) -> list[dict]:
    groups = [
        {"params": [m.latent for m in tuned.values()], "lr": options.codes},
    ]
    for m in tuned.values():
        groups.append({"params": [m.stretch], "lr": options.scales / (2**m.scheme.bits - 1)})
    for p in [*norms, *(m.bias for m in tuned.values() if m.bias is not None)]:
        size = float(p.detach().abs().mean()) or 1e-2
        groups.append({"params": [p], "lr": options.norms * size})
    return groups
