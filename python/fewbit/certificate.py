"""Certificates: a transformed float layer still computes what the original did, on a probe batch.

A few tokens run through the float model beside the pipeline, one layer at a time: the original
layer on the original hidden states, then the transformed layer on the transformed ones
(``Transform.carry``). The bound is derived from the dtype: every parameter of the layer, before and
after, is moved by one unit roundoff with random sign, and what that does to the output is what
rounding each parameter once may do. A transform rounds each parameter once; ``FACTOR`` leaves room
for stacks of transforms and for the roundings of the two forward passes themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from .calibrate import LayerInput, Windows, capture, forward
from .errors import TransformError
from .families import Family
from .transforms import Transform

FACTOR = 16.0
TOKENS = 32


class Probe:
    """Follows ``TOKENS`` tokens through the float model; made before any transform."""

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
        self.want: Tensor | None = None
        self.logits = self._head(model, self.input.hidden)

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
        noise = 2 * _unit(carried.dtype) * float(carried.double().norm())
        self._record(self.family.embed, self.carried.hidden, carried, noise)
        noise = _noise(modules, lambda: self._head(model, carried))
        self._record(self.family.head, self._head(model, carried), self.logits, noise * 2)

    def before(self, layer: nn.Module) -> None:
        """The original layer's output and its sensitivity, before the layer is transformed."""
        with _channel_maxima(layer, self.family) as self.maxima:
            self.want = forward(layer, self.input)
        self.noise = _noise([layer], lambda: forward(layer, self.input))

    def after(self, layer: nn.Module, name: str) -> None:
        """Compare the transformed layer, still float, and go on to the next."""
        source = replace(self.carried, hidden=self.carry(self.input.hidden))
        want = self.carry(self.want)
        with _channel_maxima(layer, self.family) as maxima:
            got = forward(layer, source)
        for path in (p for p in self.maxima if p in maxima):
            before, after = describe(self.maxima[path]), describe(maxima[path])
            self.outliers.append({"path": f"{name}.{path}", "before": before, "after": after})
        noise = self.noise + _noise([layer], lambda: forward(layer, source))
        self._record(name, got, want, noise)
        self.input = replace(self.input, hidden=self.want)

    def _record(self, name: str, got: Tensor, want: Tensor, noise: float) -> None:
        got, want = got.double(), want.double()
        size = float(want.norm())
        error = float((got - want).norm())
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


def _noise(modules: list[nn.Module], run) -> float:
    """||change of the output|| when every parameter moves by one unit roundoff."""
    want = run()
    unit = _unit(want.dtype)
    with _shaken(modules):
        got = run().double()
    return float((got - want.double()).norm()) + unit * float(want.double().norm())


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
    """Every float parameter times (1 + eps) or (1 - eps), inside the block."""
    generator = torch.Generator().manual_seed(0)
    parameters = {id(p): p for m in modules for p in m.parameters() if p.is_floating_point()}
    kept = [(p, p.data) for p in parameters.values()]
    try:
        for p, value in kept:
            sign = torch.empty(value.shape).bernoulli_(0.5, generator=generator).to(value)
            p.data = value + value * (sign * 2 - 1) * torch.finfo(value.dtype).eps
        yield
    finally:
        for p, value in kept:
            p.data = value
