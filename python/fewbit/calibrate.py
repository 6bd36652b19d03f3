"""Calibration: text to token windows, windows to the inputs of a layer, inputs to Stats.

The model is run one decoder layer at a time: ``capture`` stops each batch before the first layer,
``run_layer`` carries the hidden states through one layer, and ``collect`` does so with hooks that
add up the statistics of every linear's input. Only real tokens count; padding never does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from . import ops
from .activations import Activations, LayerInput, Store
from .distributed import Ranks
from .errors import (
    CalibrationError,
    MissingCalibrationError,
    NonFiniteInputError,
    ShortTextError,
    TextFileError,
    VocabularyError,
)
from .families import Family, decoder_layers
from .linearise import Experts
from .scheme import check_int
from .stats import Stats, sum_type


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
        return self.before(len(self.batches))

    def before(self, index: int) -> int:
        """Real tokens of all batches before the ``index``-th."""
        pairs = list(zip(self.batches, self.masks, strict=True))[:index]
        return sum(int(b.numel() if m is None else m.sum()) for b, m in pairs)

    def thinned(self, most: int) -> Windows:
        """At most that many of the windows, at even distances."""
        count = len(self.batches)
        if count <= most:
            return self
        at = [i * count // most for i in range(most)]
        return Windows([self.batches[i] for i in at], [self.masks[i] for i in at], self.source)

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
        raise TextFileError(f"the text file {str(path)!r} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TextFileError(f"the text file {str(path)!r} cannot be read: {error}") from None


def tokenize(text: str, tokenizer) -> Tensor:
    """All of a text as token ids [tokens], without special tokens."""
    # Straight from the fast tokenizer where there is one: no warning about the model's length.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return torch.tensor(backend.encode(text, add_special_tokens=False).ids, dtype=torch.int64)
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)


LARGEST = 1 << 24  # window, or number of them


def cut(ids: Tensor, window: int, samples: int | None, source: str) -> Windows:
    """The first ``samples`` windows of ``window`` tokens, without overlap."""
    check_int("window", window, 1, LARGEST)
    if samples is not None:
        check_int("samples", samples, 1, LARGEST)
    count = len(ids) // window
    if count == 0 or (samples is not None and count < samples):
        wanted = f"{samples or 1} windows of {window} tokens"
        raise ShortTextError(
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
        raise MissingCalibrationError(
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


class _Enough(Exception):
    """Nothing behind this place is of use: a forward pass ends here."""


class _Catcher(nn.Module):
    """Stands in for a layer and keeps what the model passes to it; the last one ends the run."""

    def __init__(self, layer: nn.Module, last: bool) -> None:
        super().__init__()
        self.layer, self.last = layer, last
        self.call: tuple = ()

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)  # models ask layers for flags

    def forward(self, hidden, *args, **kwargs):
        self.call = (hidden, args, kwargs)
        if self.last:
            raise _Enough
        return hidden


@torch.no_grad()
def capture(
    model: nn.Module, family: Family, data: Windows, store: Store | None = None
) -> Activations:
    """What enters the first decoder layer, batch by batch. No layer needs to hold its weights."""
    layers = decoder_layers(model, family)
    kinds = _layer_kinds(model, len(layers))
    first = {kind: kinds.index(kind) for kind in dict.fromkeys(kinds)}
    last = max(first.values())
    catchers = {i: _Catcher(layers[i], i == last) for i in range(last + 1)}
    device = model.get_submodule(family.embed).weight.device
    limit = _vocabulary(model)
    captured = Activations(len(data.batches), store)
    for i, catcher in catchers.items():
        layers[i] = catcher
    try:
        for i in captured.store.ranks.own(len(data.batches)):
            ids, mask = data.batches[i], data.masks[i]
            if limit is not None and (int(ids.min()) < 0 or int(ids.max()) >= limit):
                raise VocabularyError(
                    f"calibration sample {i} has token {int(ids.max())}, the vocabulary {limit}"
                )
            extra = {} if mask is None else {"attention_mask": mask.long().to(device)}
            try:
                model(input_ids=ids.to(device), use_cache=False, **extra)
            except _Enough:
                hidden, args, kwargs = catchers[0].call
                others = {}
                if len(first) > 1:
                    calls = {kind: catchers[n].call[1:] for kind, n in first.items()}
                    real = [c.layer for c in catchers.values()] + list(layers[len(catchers) :])
                    others = {
                        id(layer): calls[kind] for layer, kind in zip(real, kinds, strict=True)
                    }
                first_token = data.before(i)
                captured.append(LayerInput(hidden, args, kwargs, mask, others, first_token))
    finally:
        for i, catcher in catchers.items():
            layers[i] = catcher.layer
    return captured


def _layer_kinds(model: nn.Module, count: int) -> list[str]:
    """What kind of attention each layer has; layers of one kind get the same arguments."""
    kinds = getattr(getattr(model, "config", None), "layer_types", None)
    return list(kinds) if kinds and len(kinds) == count else [""] * count


def _vocabulary(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "vocab_size", None)


@torch.no_grad()
def run_layer(layer: nn.Module, inputs: Activations) -> Activations:
    """The inputs of the next layer."""
    return inputs.follow(forward(layer, x) for x in inputs)


def forward(layer: nn.Module, x: LayerInput) -> Tensor:
    """The hidden states that a decoder layer returns for one batch."""
    args, kwargs = x.others.get(id(layer), (x.args, x.kwargs))
    out = layer(x.hidden, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def collect(
    layer: nn.Module,
    family: Family,
    inputs: Activations,
    name: str = "layer",
    only: Collection[str] | None = None,
    floats: FloatPass | None = None,
    keep: bool = True,
) -> tuple[dict[str, Stats], Activations | None]:
    """Stats of every linear's input by path, and the layer's outputs, in one forward pass.

    Linears that read the same norm share one Stats. ``only``: the paths to collect, all by default.
    ``floats``: what the float model feeds this layer; each batch is run through the float layer
    too, for Stats.cross. ``keep`` False: no outputs, which None stands for; once the first batch
    has shown that every input comes once, a batch goes no further than the last of them. Raises
    CalibrationError naming the linear and the sample when an activation is not finite.
    """
    taps: dict[str, _Tap] = {}
    shared, way = {}, _Pass()
    for sub in family.sublayers:
        for group in (sub.reads, (sub.writes,)):
            for path in group:
                shared[path] = group[0]
            if group[0] not in taps and (only is None or group[0] in only):
                taps[group[0]] = _Tap(layer, group[0], way)
    ranks, runs = inputs.store.ranks, inputs.chunks()
    way.wanted = len(taps)

    def passes() -> Iterator[Tensor]:
        for run in runs:
            for tap in taps.values():
                tap.start()
            for i in run:
                yield one(i)
            for tap in taps.values():
                tap.finish(ranks)

    def one(i: int) -> Tensor | None:
        x = inputs[i]
        for tap in taps.values():
            tap.mask, tap.first = x.mask, x.first
        if floats is not None:
            for tap in taps.values():
                tap.floating = True
            with floats.modules(layer):
                way.run(layer, floats.inputs[i])
            for tap in taps.values():
                tap.floating = False
        hidden = way.run(layer, x)
        if i == 0:
            way.ends = not keep and sorted(way.seen) == sorted(taps)
        for path, tap in taps.items():
            if not bool(tap.sums.max_abs.isfinite().all()):
                sample = ranks.own(inputs.total)[i]
                raise NonFiniteInputError(
                    f"the input of {name}.{path} is not finite in calibration sample {sample}"
                )
        return hidden

    outputs = None
    try:
        if keep:
            outputs = inputs.follow(passes())
        else:
            for _ in passes():
                pass
    finally:
        for tap in taps.values():
            tap.remove()
    made = {path: ranks.fold(tap.parts, _Sums.add).stats() for path, tap in taps.items()}
    return {path: made[first] for path, first in shared.items() if first in made}, outputs


@dataclass
class FloatPass:
    """The float model's way through one layer, beside that of the model being quantised.

    ``inputs``: what it feeds the layer; ``linears``: the float modules of the paths that have
    already been replaced.
    """

    inputs: Activations
    linears: dict[str, nn.Module] = field(default_factory=dict)

    @contextmanager
    def modules(self, layer: nn.Module) -> Iterator[None]:
        """The layer with its float linears in place."""
        packed = {path: layer.get_submodule(path) for path in self.linears}
        _place(layer, self.linears)
        try:
            yield
        finally:
            _place(layer, packed)


def _place(layer: nn.Module, modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        parent, _, child = path.rpartition(".")
        setattr(layer.get_submodule(parent), child, module)


def _experts_around(layer: nn.Module, path: str) -> nn.Module | None:
    """The linearise.Experts that the linear at ``path`` belongs to."""
    parts = path.split(".")
    around = (layer.get_submodule(".".join(parts[:n])) for n in range(1, len(parts)))
    return next((m for m in around if isinstance(m, Experts)), None)


SAMPLE = 256  # tokens kept of each linear's input


class _Pass:
    """A batch's way through a layer, which ``ends`` at the last of ``wanted`` inputs or not;
    ``seen``: the paths of the linears whose inputs came by."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.wanted, self.ends = 0, False

    def run(self, layer: nn.Module, x: LayerInput) -> Tensor | None:
        self.seen.clear()
        try:
            return forward(layer, x)
        except _Enough:
            return None

    def see(self, path: str) -> None:
        self.seen.append(path)
        if self.ends and len(self.seen) == self.wanted:
            raise _Enough


class _Tap:
    """Hangs on a linear and sums its inputs up, run by run of batches.

    ``mask``: the real tokens of the batch that passes; ``first``: how many came before it. While
    ``floating`` the inputs are those of the float model.
    """

    def __init__(self, layer: nn.Module, path: str, way: _Pass) -> None:
        self.linear, self.path, self.way = layer.get_submodule(path), path, way
        self.experts = _experts_around(layer, path)  # knows the rows of an expert's tokens
        self.mask: Tensor | None = None
        self.first = 0
        self.floating, self.float_input = False, None
        self.parts: list[_Sums] = []
        self.remove = self.linear.register_forward_pre_hook(self.hook).remove

    def start(self) -> None:
        self.sums = _Sums(self.linear, self.experts is not None)

    def finish(self, ranks: Ranks) -> None:
        """Keep the run's sums; the first rank, behind whom nobody comes, adds them up at once."""
        if ranks.rank == 0 and self.parts:
            self.parts[0].add(self.sums)
        else:
            self.parts.append(self.sums)
        del self.sums

    def hook(self, module: nn.Module, args: tuple) -> None:
        x = args[0].detach()
        x = x.reshape(-1, x.shape[-1])
        rows = torch.arange(len(x)) if self.experts is None else self.experts.rows.cpu()
        if self.mask is not None:
            real = self.mask.reshape(-1).cpu()
            x = x[real[rows].to(x.device)]
            rows = (real.cumsum(0) - 1)[rows[real[rows]]]  # counted among the real tokens
        if self.floating:
            self.float_input = x
        else:
            self.take(x, rows)
        self.way.see(self.path)

    def take(self, x: Tensor, rows: Tensor) -> None:
        routes_differ = self.experts is not None  # between the models: no pairs of tokens
        self.sums.take(x, self.first + rows, None if routes_differ else self.float_input)
        self.float_input = None


class _Sums:
    """Sums over tokens in their order; sums of consecutive runs are added in their order."""

    def __init__(self, linear: nn.Module, routed: bool) -> None:
        k, device = linear.in_features, linear.weight.device
        self.tokens, self.routed = 0, routed
        self.sum_abs = torch.zeros(k, dtype=torch.float64, device=device)
        self.max_abs = torch.zeros(k, device=device)
        self.gram = torch.zeros(k, k, dtype=sum_type(k, device), device=device)
        self.cross: Tensor | None = None
        # Every stride-th token's input, float32 [at most SAMPLE, k], and the tokens' numbers.
        self.sample, self.at, self.stride = torch.empty(0, k), torch.empty(0, dtype=torch.int64), 1

    def take(self, x: Tensor, at: Tensor, float_input: Tensor | None) -> None:
        """Inputs x [tokens, in_features], which are the calibration's tokens number ``at``;
        ``float_input``: what the float model had instead."""
        if float_input is not None:
            if self.cross is None:
                self.cross = torch.zeros(self.gram.shape, dtype=torch.float64, device=x.device)
            self.cross += (float_input.double() - x.double()).T @ x.double()
        ops.act_stats(x, self.sum_abs, self.max_abs)
        ops.gram(x, self.gram)
        self.tokens += x.shape[0]
        rows = torch.nonzero(at % self.stride == 0).flatten()
        self._keep(at[rows], x[rows.to(x.device)].float().cpu())

    def _keep(self, at: Tensor, sample: Tensor) -> None:
        """Also these tokens, for the least stride, a power of two, that makes them few enough."""
        at, sample = torch.cat([self.at, at]), torch.cat([self.sample, sample])
        while int((rows := at % self.stride == 0).sum()) > SAMPLE:
            self.stride *= 2
        self.at, self.sample = at[rows], sample[rows]

    def add(self, other: _Sums) -> _Sums:
        """Take in the sums of the run that follows; returns self."""
        self.tokens += other.tokens
        self.sum_abs += other.sum_abs
        torch.maximum(self.max_abs, other.max_abs, out=self.max_abs)
        self.gram += other.gram
        if other.cross is not None:
            self.cross = other.cross if self.cross is None else self.cross.add_(other.cross)
        self.stride = max(self.stride, other.stride)
        self._keep(other.at, other.sample)
        return self

    def stats(self) -> Stats:
        cross = None if self.cross is None else self.cross.to(self.gram.dtype)
        sample = self.sample.to(self.gram.device) if len(self.sample) else None
        sums = self.sum_abs.float()
        return Stats(self.tokens, sums, self.max_abs, self.gram, cross, self.routed, sample)
