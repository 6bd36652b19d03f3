"""Calibration: text to token windows, windows to the inputs of a layer, inputs to Stats.

The model is run one decoder layer at a time: ``capture`` stops each batch before the first layer,
``run_layer`` carries the hidden states through one layer, and ``collect`` does so with hooks that
add up the statistics of every linear's input. Only real tokens count; padding never does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from . import ops
from .errors import CalibrationError
from .families import Family, decoder_layers
from .stats import Stats


@dataclass
class Windows:
    """Calibration or evaluation input: token windows and what to call them in a report.

    ``batches``: int64 token ids [1, tokens] each; ``masks``: bool [1, tokens] of real tokens, or
    None where all are.
    """

    batches: list[Tensor]
    masks: list[Tensor | None] = field(default_factory=list)
    source: str = "tokens"

    def __post_init__(self) -> None:
        self.masks = self.masks or [None] * len(self.batches)

    @property
    def tokens(self) -> int:
        """Real tokens."""
        pairs = zip(self.batches, self.masks, strict=True)
        return sum(int(b.numel() if m is None else m.sum()) for b, m in pairs)

    def digest(self) -> str:
        """SHA-256 of the token ids, to name the input exactly."""
        h = hashlib.sha256()
        for batch, mask in zip(self.batches, self.masks, strict=True):
            h.update(batch.to(torch.int64).numpy().tobytes())
            h.update(b"-" if mask is None else mask.numpy().tobytes())
        return h.hexdigest()


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, or CalibrationError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CalibrationError(f"the text file {str(path)!r} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"the text file {str(path)!r} cannot be read: {error}") from None


def tokenize(text: str, tokenizer) -> Tensor:
    """All of a text as token ids [tokens], without special tokens."""
    # Straight from the fast tokenizer where there is one: no warning about the model's length.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return torch.tensor(backend.encode(text, add_special_tokens=False).ids, dtype=torch.int64)
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)


def cut(ids: Tensor, window: int, samples: int | None, source: str) -> Windows:
    """The first ``samples`` windows of ``window`` tokens, without overlap."""
    count = len(ids) // window
    if count == 0 or (samples is not None and count < samples):
        wanted = f"{samples or 1} windows of {window} tokens"
        raise CalibrationError(
            f"{source} is too short: {len(ids)} tokens, and {wanted} need {(samples or 1) * window}"
        )
    count = count if samples is None else samples
    rows = ids[: count * window].reshape(count, 1, window)
    return Windows(list(rows), source=source)


def windows(
    calibration, tokenizer=None, window: int = 512, samples: int | None = 32
) -> Windows:
    """Calibration input in any of its forms, as token windows.

    ``calibration``: a path to a text file; one string or a list of strings (joined by blank lines);
    token ids as a tensor [tokens] or [batch, tokens]; a list of id lists or tensors of any lengths;
    a list of mappings with ``input_ids`` and ``attention_mask``; or Windows. Text needs
    ``tokenizer`` and is cut into ``samples`` windows of ``window`` tokens. Raises CalibrationError
    when there is nothing, too little, or something else.
    """
    if isinstance(calibration, Windows):
        return calibration
    if calibration is None:
        raise CalibrationError(
            "this method needs calibration: pass texts, token ids or the path of a text file"
        )
    if isinstance(calibration, Path) or (
        isinstance(calibration, str) and "\n" not in calibration and len(calibration) < 1024
        and Path(calibration).suffix
    ):
        text, source = read_text(calibration), Path(calibration).name
        return cut(_ids(text, tokenizer), window, samples, source)
    if isinstance(calibration, str):
        return cut(_ids(calibration, tokenizer), window, samples, "the calibration text")
    if isinstance(calibration, Tensor):
        calibration = [calibration] if calibration.dim() == 1 else list(calibration)
    if not isinstance(calibration, Iterable):
        raise CalibrationError(
            f"calibration must be text, token ids or a path, got {type(calibration).__name__}"
        )
    items = list(calibration)
    if not items:
        raise CalibrationError("the calibration input is empty")
    if all(isinstance(item, str) for item in items):
        ids = _ids("\n\n".join(items), tokenizer)
        return cut(ids, window, samples, "the calibration texts")
    return _token_windows(items)


def _ids(text: str, tokenizer) -> Tensor:
    if tokenizer is None:
        raise CalibrationError("calibration text needs a tokenizer: pass tokenizer=, or token ids")
    return tokenize(text, tokenizer)


def _token_windows(items: Sequence) -> Windows:
    batches, masks = [], []
    for i, item in enumerate(items):
        mask = None
        if isinstance(item, Mapping):
            mask = item.get("attention_mask")
            item = item.get("input_ids")
        try:
            ids = torch.as_tensor(item, dtype=torch.int64)
            ids = ids.reshape(-1, ids.shape[-1])
            mask = None if mask is None else torch.as_tensor(mask).bool().reshape(ids.shape)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise CalibrationError(f"calibration sample {i} is not token ids: {error}") from None
        real = ids.numel() if mask is None else int(mask.sum())
        if real == 0:
            raise CalibrationError(f"calibration sample {i} holds no tokens")
        batches.append(ids)
        masks.append(mask)
    return Windows(batches, masks)


# ---- one layer at a time -------------------------------------------------------------------------


@dataclass
class LayerInput:
    """One batch in front of a decoder layer: hidden states, the other arguments, real tokens."""

    hidden: Tensor
    args: tuple
    kwargs: dict
    mask: Tensor | None


class _Captured(Exception):
    pass


class _Catcher(nn.Module):
    """Stands in for the first layer and keeps what the model passes to it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.call: tuple = ()

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)  # models ask layers for flags

    def forward(self, hidden, *args, **kwargs):
        self.call = (hidden, args, kwargs)
        raise _Captured


@torch.no_grad()
def capture(model: nn.Module, family: Family, data: Windows) -> list[LayerInput]:
    """What enters the first decoder layer, batch by batch."""
    layers = decoder_layers(model, family)
    catcher = _Catcher(layers[0])
    device = next(layers[0].parameters()).device
    limit = _vocabulary(model)
    captured = []
    layers[0] = catcher
    try:
        for i, (ids, mask) in enumerate(zip(data.batches, data.masks, strict=True)):
            if limit is not None and (int(ids.min()) < 0 or int(ids.max()) >= limit):
                raise CalibrationError(
                    f"calibration sample {i} has token {int(ids.max())}, the vocabulary {limit}"
                )
            extra = {} if mask is None else {"attention_mask": mask.long().to(device)}
            try:
                model(input_ids=ids.to(device), use_cache=False, **extra)
            except _Captured:
                hidden, args, kwargs = catcher.call
                captured.append(LayerInput(hidden, args, kwargs, mask))
    finally:
        layers[0] = catcher.layer
    return captured


def _vocabulary(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "vocab_size", None)


@torch.no_grad()
def run_layer(layer: nn.Module, inputs: list[LayerInput]) -> list[LayerInput]:
    """The inputs of the next layer."""
    return [LayerInput(forward(layer, x), x.args, x.kwargs, x.mask) for x in inputs]


def forward(layer: nn.Module, x: LayerInput) -> Tensor:
    """The hidden states that a decoder layer returns for one batch."""
    out = layer(x.hidden, *x.args, **x.kwargs)
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def collect(
    layer: nn.Module, family: Family, inputs: list[LayerInput], name: str = "layer"
) -> tuple[dict[str, Stats], list[LayerInput]]:
    """Stats of every linear's input by path, and the layer's outputs, in one forward pass.

    Linears that read the same norm share one Stats. Raises CalibrationError naming the linear and
    the sample when an activation is not finite.
    """
    sums: dict[str, _Sums] = {}
    hooks, shared = [], {}
    for sub in family.sublayers:
        for group in (sub.reads, (sub.writes,)):
            for path in group:
                shared[path] = group[0]
            sums[group[0]] = _Sums()
            hook = sums[group[0]].hook
            hooks.append(layer.get_submodule(group[0]).register_forward_pre_hook(hook))
    outputs = []
    try:
        for i, x in enumerate(inputs):
            for s in sums.values():
                s.mask = x.mask
            outputs.append(LayerInput(forward(layer, x), x.args, x.kwargs, x.mask))
            for path, s in sums.items():
                if not bool(s.max_abs.isfinite().all()):
                    raise CalibrationError(
                        f"the input of {name}.{path} is not finite in calibration sample {i}"
                    )
    finally:
        for hook in hooks:
            hook.remove()
    made = {path: s.stats() for path, s in sums.items()}
    return {path: made[first] for path, first in shared.items()}, outputs


class _Sums:
    """Running sums over batches; their order over tokens is fixed, so batching does not matter."""

    def __init__(self) -> None:
        self.tokens = 0
        self.mask: Tensor | None = None
        self.sum_abs = self.max_abs = self.gram = None

    def hook(self, module: nn.Module, args: tuple) -> None:
        x = args[0].detach()
        x = x.reshape(-1, x.shape[-1])
        if self.mask is not None:
            x = x[self.mask.reshape(-1).to(x.device)]
        if self.gram is None:
            k = x.shape[1]
            self.sum_abs = torch.zeros(k, dtype=torch.float64, device=x.device)
            self.max_abs = torch.zeros(k, device=x.device)
            self.gram = torch.zeros(k, k, device=x.device)
        ops.act_stats(x, self.sum_abs, self.max_abs)
        ops.gram(x, self.gram)
        self.tokens += x.shape[0]

    def stats(self) -> Stats:
        return Stats(self.tokens, self.sum_abs.float(), self.max_abs, self.gram)
