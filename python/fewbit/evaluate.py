"""What a model is worth: each result holds the protocol by which it was measured."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .calibrate import LARGEST, Windows
from .errors import MissingExtraError, ShortTextError, UsageError
from .memory import peak
from .scheme import MANY, check_int


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
    stride = window if stride is None else stride
    rows = _windows(tokens, window, stride, limit)
    total, count = 0.0, 0
    for i, (ids, scores) in enumerate(_scores(model, rows, batch)):
        first = 0 if i == 0 else max(window - stride - 1, 0)
        losses = F.cross_entropy(scores[first:-1], ids[first + 1 :], reduction="none")
        total += float(losses.double().sum())
        count += len(losses)
    nll = total / count
    return Perplexity(_exp(nll), nll, window, stride, len(rows.batches), count)


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


@dataclass(frozen=True)
class Agreement:
    """How far a model's predictions are from a reference's, over ``windows`` of ``window`` tokens.

    ``kl``: mean KL(reference || model) in nats; ``top1``: fraction of the ``positions`` where both
    find the same token most likely.
    """

    kl: float
    top1: float
    window: int
    windows: int
    positions: int

    def __str__(self) -> str:
        return (
            f"KL divergence {self.kl:.2e} nats, top-1 agreement {100 * self.top1:.2f} % "
            f"({self.windows} windows of {self.window} tokens, no BOS)"
        )

    def to_dict(self) -> dict:
        return asdict(self)


def agreement(
    model: nn.Module,
    reference: nn.Module,
    tokens: Tensor,
    window: int = 2048,
    limit: int | None = None,
    batch: int = 4,
) -> Agreement:
    """Compare ``model`` with ``reference`` (its float original) on ``tokens`` int64 [tokens].

    Windows as in ``perplexity``, without overlap; every position counts. Raises CalibrationError
    as ``perplexity`` does, UsageError when the two have different vocabularies.
    """
    data = _windows(tokens, window, window, limit)
    total, same, count = 0.0, 0, 0
    pairs = zip(_scores(model, data, batch), _scores(reference, data, batch), strict=True)
    for (_, q), (_, p) in pairs:
        if p.shape != q.shape:
            raise UsageError(
                f"the models have vocabularies of {q.shape[-1]} and {p.shape[-1]} tokens: the "
                "reference must be the original of the quantised model"
            )
        p, q = p.to(q.device).log_softmax(-1), q.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(q)
    return Agreement(total / count, same / count, window, len(data.batches), count)


@dataclass(frozen=True)
class Speed:
    """Tokens a second of ``prompt`` tokens at once and of ``new`` greedy ones after it, the best of
    three; ``weight_bytes`` of parameters and buffers, ``peak_bytes`` of the process (or GPU)."""

    prefill: float
    decode: float
    prompt: int
    new: int
    weight_bytes: int
    peak_bytes: int
    threads: int

    def __str__(self) -> str:
        return (
            f"prompt {self.prefill:.0f} tokens/s, decode {self.decode:.1f} tokens/s (batch 1, "
            f"{self.prompt} + {self.new} tokens, {self.threads} threads), weights "
            f"{self.weight_bytes / 2**20:.1f} MiB, peak {self.peak_bytes / 2**20:.0f} MiB"
        )

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def speed(model: nn.Module, tokens: Tensor, prompt: int = 128, new: int = 32) -> Speed:
    """Throughput and memory of a transformers model with a cache, batch 1."""
    check_int("prompt", prompt, 1, LARGEST)
    check_int("new", new, 1, 100 * MANY)
    ids = tokens.reshape(1, -1)[:, :prompt]
    if ids.shape[1] < 1:
        raise ShortTextError("the text is empty: measuring speed needs at least one token")
    with _evaluating(model) as device:
        first = _generate(model, ids.to(device), 1)  # the prompt, and one token from it
        steps = max(_generate(model, ids.to(device), 1 + new) - first, 1e-9)
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return Speed(
        ids.shape[1] / first, new / steps, ids.shape[1], new, sum(held.values()),
        peak_bytes(device), torch.get_num_threads(),
    )


def _generate(model: nn.Module, ids: Tensor, new: int) -> float:
    """Seconds of ``new`` greedy tokens after ``ids`` [1, prompt], the best of three."""
    best = math.inf
    for _ in range(3):
        started = _now(ids.device)
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        best = min(best, _now(ids.device) - started)
    return best


def lm_eval_tasks(
    model: nn.Module, tokenizer, tasks: Sequence[str], limit: int | None = None,
    folder: str | None = None,
) -> dict:
    """Results of lm-eval's own tasks by name; ``folder`` holds further task files (YAML)."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingExtraError("tasks need lm_eval: pip install 'fewbit[eval]'") from None
    manager = TaskManager(include_path=folder)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise UsageError(f"lm-eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists them")
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(tasks), limit=limit,
        task_manager=manager, bootstrap_iters=0,
    )
    return {
        task: {key.removesuffix(",none"): v for key, v in values.items() if isinstance(v, float)}
        for task, values in found["results"].items()
    }


def peak_bytes(device: torch.device | None = None) -> int:
    """The most memory that the process, or the GPU for it, has held so far."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def _scores(model: nn.Module, data: Windows, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids [tokens], logits [tokens, vocabulary] float32) of the real tokens of every window;
    ``batch`` windows of one length go through the model together."""
    with _evaluating(model) as device:
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


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def _windows(tokens: Tensor, window: int, stride: int, limit: int | None) -> Windows:
    """Windows of ``window`` tokens that start ``stride`` apart, the first ``limit`` of them."""
    tokens = tokens.reshape(-1)
    if window < 2 or not 1 <= stride <= window:
        raise UsageError(
            f"window must be at least 2 and stride in 1..window, got {window} and {stride}"
        )
    starts = list(range(0, len(tokens) - window + 1, stride))[:limit]
    if not starts:
        raise ShortTextError(
            f"the text is too short: {len(tokens)} tokens, one window needs {window}"
        )
    return Windows([tokens[None, s : s + window] for s in starts])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[torch.device]:
    """The model in eval mode inside the block; its device."""
    training = model.training
    model.eval()
    try:
        yield next(model.parameters()).device
    finally:
        model.train(training)
