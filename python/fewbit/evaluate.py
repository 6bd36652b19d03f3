"""Perplexity whose protocol is part of the result."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import CalibrationError


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log likelihood), and how it was measured.

    ``windows`` of ``window`` tokens, ``stride`` apart, nothing prepended; ``predictions`` tokens
    were scored: all but the first of each window, and only the last ``stride`` of overlapping ones.
    """

    value: float
    nll: float
    window: int
    stride: int
    windows: int
    predictions: int

    def __float__(self) -> float:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec or ".4f")

    def __str__(self) -> str:
        return (
            f"{self.value:.4f} ({self.windows} windows of {self.window} tokens, stride "
            f"{self.stride}, no BOS, {self.predictions} predictions)"
        )

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    window: int = 2048,
    stride: int | None = None,
    limit: int | None = None,
    batch: int = 4,
) -> Perplexity:
    """Perplexity of a causal model on ``tokens`` int64 [tokens].

    Windows of ``window`` tokens start ``stride`` apart (default: ``window``, no overlap); the first
    ``limit`` of them are used, ``batch`` at a time. Log-probabilities are taken in float32 and
    summed in float64. Raises CalibrationError when the text is shorter than one window.
    """
    tokens = tokens.reshape(-1)
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise CalibrationError(
            f"window must be at least 2 and stride in 1..window, got {window} and {stride}"
        )
    starts = list(range(0, len(tokens) - window + 1, stride))[:limit]
    if not starts:
        raise CalibrationError(
            f"the text is too short: {len(tokens)} tokens, one window needs {window}"
        )
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for i in range(0, len(starts), batch):
            rows = torch.stack([tokens[s : s + window] for s in starts[i : i + batch]]).to(device)
            logits = model(input_ids=rows, use_cache=False).logits
            for row, (ids, scores) in enumerate(zip(rows, logits, strict=True)):
                first = 0 if i + row == 0 else window - stride - 1
                first = max(first, 0)
                scores, ids = scores[first:-1].float(), ids[first + 1 :]
                losses = F.cross_entropy(scores, ids, reduction="none")
                total += float(losses.double().sum())
                count += len(losses)
    finally:
        model.train(training)
    nll = total / count
    value = math.exp(nll) if nll < 700 else math.inf
    return Perplexity(value, nll, window, stride, len(starts), count)
