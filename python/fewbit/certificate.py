"""Certificates: a transformed float layer still computes what the original did, on a probe batch.

A few tokens run through the float model beside the pipeline, one layer at a time: the original
layer on the original hidden states, then the transformed layer on the transformed ones
(``Transform.carry``), so that a failure names its layer. Behind the last layer the logits of both
models are compared, each from its own embedding through all of its layers. The bound is derived
from the dtype: every parameter, before and after, is moved by one unit roundoff with random sign,
and what that does to the output is what rounding each parameter once may do. A transform rounds
each parameter once; ``FACTOR`` leaves room for stacks of transforms and for the roundings of the
two forward passes themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from .calibrate import LayerInput, Windows, capture, forward
from .errors import TransformError
from .families import Family, decoder_layers
from .reproducible import norm
from .transforms import Transform

FACTOR = 16.0
TOKENS = 32
ENTRIES = 1024  # of the vocabulary, at even distances: logits that are compared at the end


class Probe:
    """Follows ``TOKENS`` tokens through the float model; made before any transform.

    ``hidden``: residual streams [1, TOKENS, hidden] in front of the next layer: of the "original"
    and the "transformed" model, and of both with every parameter shaken.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        transforms: Sequence[Transform],
        data: Windows | None,
    ) -> None:
        self.family, self.transforms = family, transforms
        self.records: list[dict] = []
        self.outliers: list[dict] = []
        if data is None:
            vocabulary = model.get_submodule(family.embed).weight.shape[0]
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(vocabulary, (1, TOKENS), generator=generator)
        else:
            ids = data.batches[0][:1, :TOKENS]
        self.windows = Windows([ids])
        self.input = capture(model, family, self.windows)[0]
        self.carried: LayerInput | None = None
        self.hidden = dict.fromkeys(("original", "shaken"), self.input.hidden)
        self.layers = len(decoder_layers(model, family))
        self.logits = self._head(model, self.input.hidden)
        self.head = _Head(model, family)

    def _head(self, model: nn.Module, hidden: Tensor) -> Tensor:
        norm, head = (model.get_submodule(p) for p in (self.family.final_norm, self.family.head))
        return head(norm(hidden).to(head.weight.dtype))

    def carry(self, hidden: Tensor) -> Tensor:
        """Original hidden states as the transformed model holds them."""
        for transform in self.transforms:
            hidden = transform.carry(hidden, self.family)
        return hidden

    def outside(self, model: nn.Module) -> None:
        """Embedding and head, after ``Transform.outside``."""
        self.carried = capture(model, self.family, self.windows)[0]
        modules = [model.get_submodule(p) for p in (self.family.final_norm, self.family.head)]
        carried = self.carry(self.input.hidden)
        noise = 2 * _unit(carried.dtype) * norm(carried)
        self._record(self.family.embed, self.carried.hidden, carried, noise)
        noise = _noise(modules, lambda: self._head(model, carried))
        self._record(self.family.head, self._head(model, carried), self.logits, noise * 2)
        names = ("transformed", "transformed, shaken")
        self.hidden |= dict.fromkeys(names, self.carried.hidden)
        self.transformed_head = _Head(model, self.family)

    def before(self, layer: nn.Module) -> None:
        """The original layer's output and its sensitivity, before the layer is transformed."""
        source = replace(self.input, hidden=self.hidden["original"])
        with _channel_maxima(layer, self.family) as self.maxima:
            self.want = forward(layer, source)
        self.noise = _noise([layer], lambda: forward(layer, source))
        self._shake(layer, self.input, "shaken")

    def after(self, layer: nn.Module, name: str, index: int) -> None:
        """Compare the transformed layer, still float, and go on to the next."""
        source = replace(self.carried, hidden=self.carry(self.hidden["original"]))
        want = self.carry(self.want)
        with _channel_maxima(layer, self.family) as maxima:
            got = forward(layer, source)
        for path in (p for p in self.maxima if p in maxima):
            before, after = describe(self.maxima[path]), describe(maxima[path])
            self.outliers.append({"path": f"{name}.{path}", "before": before, "after": after})
        noise = self.noise + _noise([layer], lambda: forward(layer, source))
        self._record(name, got, want, noise)
        chain = replace(self.carried, hidden=self.hidden["transformed"])
        self._shake(layer, self.carried, "transformed, shaken")
        self.hidden |= {"original": self.want, "transformed": forward(layer, chain)}
        if index + 1 == self.layers:
            self._compare_logits()

    def _shake(self, layer: nn.Module, source: LayerInput, stream: str) -> None:
        with _shaken([layer]):
            self.hidden[stream] = forward(layer, replace(source, hidden=self.hidden[stream]))

    def _compare_logits(self) -> None:
        """The end of both models; each of the layers and the head rounds its output once more."""
        heads = {"original": self.head, "transformed": self.transformed_head}
        shaken = {"original": "shaken", "transformed": "transformed, shaken"}
        logits = {name: head(self.hidden[name]).double() for name, head in heads.items()}
        noise = 0.0
        for name, head in heads.items():
            with _shaken([head]):
                moved = head(self.hidden[shaken[name]]).double()
            rounding = (self.layers + 1) * _unit(self.hidden[name].dtype)
            noise += norm(moved - logits[name]) + rounding * norm(logits[name])
        self._record("logits", logits["transformed"], logits["original"], noise)

    def _record(self, name: str, got: Tensor, want: Tensor, noise: float) -> None:
        got, want = got.double(), want.double()
        size = norm(want)
        error = norm(got - want)
        bound = FACTOR * noise
        scale = size if size > 0 else 1.0
        record = {"path": name, "error": error / scale, "bound": bound / scale}
        self.records.append(record)
        if not error <= bound:
            names = ", ".join(type(t).__name__ for t in self.transforms)
            raise TransformError(
                f"{name} computes something else after {names}: its output moved by "
                f"{record['error']:.2e} of its size, and rounding explains at most "
                f"{record['bound']:.2e}"
            )


class _Head(nn.Module):
    """A copy of the final norm and of at most ENTRIES rows of the head."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__()
        head = model.get_submodule(family.head)
        rows = slice(None, None, -(-len(head.weight) // ENTRIES))
        self.norm = copy.deepcopy(model.get_submodule(family.final_norm))
        weight, bias = head.weight.detach(), getattr(head, "bias", None)
        self.weight = nn.Parameter(weight[rows].clone(), requires_grad=False)
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach()[rows].clone(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(self.norm(hidden).to(self.weight.dtype), self.weight, self.bias)


def _noise(modules: list[nn.Module], run) -> float:
    """||change of the output|| when every parameter moves by one unit roundoff."""
    want = run()
    unit = _unit(want.dtype)
    with _shaken(modules):
        got = run().double()
    return norm(got - want.double()) + unit * norm(want)


def _unit(dtype: torch.dtype) -> float:
    """Roundoff of a layer in ``dtype``; norms compute in float32 even in a float64 model."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def describe(maxima: Tensor) -> dict:
    """Channel maxima [K] for the Report: the ``ratio`` of the largest to the median one, and the
    ``profile``, 33 of them in falling order at even distances."""
    sorted_ = maxima.sort(descending=True).values
    at = torch.linspace(0, len(sorted_) - 1, 33).round().long()
    median = float(maxima.median())
    ratio = float(sorted_[0]) / median if median > 0 else 1.0
    return {"ratio": ratio, "profile": [float(f"{v:.4g}") for v in sorted_[at]]}


@contextmanager
def _channel_maxima(layer: nn.Module, family: Family) -> Iterator[dict[str, Tensor]]:
    """max |x| of each input channel [K], by linear, of what runs inside the block."""
    found: dict[str, Tensor] = {}

    def keep(path: str):
        def hook(module: nn.Module, args: tuple) -> None:
            if args[0].numel():  # an expert may get no token
                found[path] = args[0].detach().abs().flatten(0, -2).amax(0).float()

        return hook

    handles = [
        layer.get_submodule(path).register_forward_pre_hook(keep(path))
        for path in family.linears()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _shaken(modules: list[nn.Module]) -> Iterator[None]:
    """Every float parameter times (1 + eps) or (1 - eps) inside the block, each while the module
    that holds it runs: a layer is the largest thing in memory, and a second one need not be."""
    generator = torch.Generator().manual_seed(0)
    kept: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def shake(module: nn.Module, args: tuple) -> None:
        kept[module] = [
            (p, p.data) for p in module.parameters(recurse=False) if p.is_floating_point()
        ]
        for p, value in kept[module]:
            moved = torch.empty(value.shape).bernoulli_(0.5, generator=generator).to(value)
            # In place: this may be the largest tensor of the model.
            moved.mul_(2).sub_(1).mul_(value).mul_(torch.finfo(value.dtype).eps)
            p.data = moved.add_(value)

    def restore(module: nn.Module, *_) -> None:
        for p, value in kept.pop(module, ()):
            p.data = value

    handles = [
        handle
        for module in {m for top in modules for m in top.modules()}
        for handle in (
            module.register_forward_pre_hook(shake), module.register_forward_hook(restore)
        )
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(kept):  # an error came before its end
            restore(module)
