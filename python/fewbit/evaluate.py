"""Perplexity whose protocol is part of the result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .calibrate import Windows
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
    total, count = 0.0, 0
    rows = Windows([tokens[None, s : s + window] for s in starts])
    for i, (ids, scores) in enumerate(_scores(model, rows, batch)):
        first = 0 if i == 0 else max(window - stride - 1, 0)
        losses = F.cross_entropy(scores[first:-1], ids[first + 1 :], reduction="none")
        total += float(losses.double().sum())
        count += len(losses)
    nll = total / count
    return Perplexity(_exp(nll), nll, window, stride, len(starts), count)


@dataclass(frozen=True)
class Comparison:
    """A model beside its reference, over ``predictions`` tokens: perplexity, and the mean
    Kullback-Leibler divergence KL(reference || model) of its distribution, in nats."""

    perplexity: float
    kl: float
    predictions: int


def log_probabilities(
    model: nn.Module, data: Windows, out: Sequence[Tensor] | None = None, batch: int = 4
) -> Sequence[Tensor]:
    """The model's log-probabilities [tokens, vocabulary] of every window, for ``compare``.

    float16, or written into ``out``, one tensor a window (a mapped file, where the vocabulary is
    large).
    """
    found = [] if out is None else out
    for i, (_, scores) in enumerate(_scores(model, data, batch)):
        scores = scores.log_softmax(-1)
        if out is None:
            found.append(scores.half())
        else:
            out[i].copy_(scores)
    return found


def compare(
    model: nn.Module, data: Windows, reference: Sequence[Tensor], batch: int = 4
) -> Comparison:
    """Perplexity of ``data``, each window on its own, and the divergence from ``reference``, the
    float model's log_probabilities of the same windows."""
    total, divergence, count = 0.0, 0.0, 0
    rows = _scores(model, data, batch)
    for (ids, scores), wanted in zip(rows, reference, strict=True):
        scores, wanted = scores[:-1].log_softmax(-1), wanted[:-1].to(scores.device).float()
        total -= float(scores.gather(1, ids[1:, None]).double().sum())
        divergence += float((wanted.exp() * (wanted - scores)).sum(1).double().sum())
        count += len(scores)
    return Comparison(_exp(total / count), divergence / count, count)


@torch.no_grad()
def _scores(model: nn.Module, data: Windows, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids [tokens], logits [tokens, vocabulary] float32) of the real tokens of every window;
    ``batch`` windows of one length go through the model together."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for i in range(0, len(data.batches), batch):
            pairs = list(zip(data.batches[i : i + batch], data.masks[i : i + batch], strict=True))
            alike = len({ids.shape for ids, _ in pairs}) == 1 and all(m is None for _, m in pairs)
            together = [(torch.cat([ids for ids, _ in pairs]), None)] if alike else pairs
            for ids, mask in together:
                ids = ids.to(device)
                extra = {} if mask is None else {"attention_mask": mask.long().to(device)}
                logits = model(input_ids=ids, use_cache=False, **extra).logits
                for n, (row, scores) in enumerate(zip(ids, logits, strict=True)):
                    real = slice(None) if mask is None else mask[n].to(device)
                    yield row[real], scores[real].float()
    finally:
        model.train(training)


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
