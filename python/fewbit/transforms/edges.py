"""Where a positive per-channel scale can move: between a source and the linears that read it.

For any positive s, (x / s) (W s)^T = x W^T: dividing what produces x (a norm's gain and bias, or
the output channels of a linear) and multiplying the readers' columns leaves the function as it is,
and changes which columns the grid represents well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..families import Family, Sublayer
from ..kv import head_dim


@dataclass
class Edge:
    """One place in a layer where a scale can move: ``source`` is divided, ``readers`` multiplied.

    ``rows``: the output channels of the source that take part (None: all). ``channel``
    [in_features of the readers]: which of those each input channel reads (None: one to one); under
    grouped-query attention several inputs of the output projection read one channel of the value
    projection. ``also``: readers that stay float (routers).
    """

    kind: str  # "norm" or "inner"
    source: str
    readers: tuple[str, ...]
    rows: Tensor | None = None
    channel: Tensor | None = None
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = self.readers[:4] + (("..",) if len(self.readers) > 4 else ())
        return f"{self.source} -> {', '.join(shown)}"

    def to_source(self, values: Tensor, reduce: str = "mean") -> Tensor:
        """Per-input-channel values, the mean or the largest over inputs that read one channel."""
        if self.channel is None:
            return values
        channel = self.channel.to(values.device)
        out = values.new_zeros(int(channel.max()) + 1)
        mode = {"mean": "mean", "max": "amax"}[reduce]
        return out.scatter_reduce_(0, channel, values, mode, include_self=False)

    def to_readers(self, s: Tensor) -> Tensor:
        """A source scale, as the readers' columns see it."""
        return s if self.channel is None else s[self.channel.to(s.device)]


def edges(layer: nn.Module, family: Family, config) -> list[Edge]:
    """Every edge of one decoder layer, in the order of the forward pass; one per norm."""
    norms: dict[str, Edge] = {}
    found = []
    for sub in family.sublayers:
        if sub.norm in norms:  # one norm before attention and MLP, or before several experts
            edge = norms[sub.norm]
            edge.readers = tuple(dict.fromkeys((*edge.readers, *sub.reads)))
            edge.also = tuple(dict.fromkeys((*edge.also, *sub.also)))
        else:
            norms[sub.norm] = Edge("norm", sub.norm, sub.reads, also=sub.also)
            if getattr(layer.get_submodule(sub.norm), "weight", None) is not None:
                found.append(norms[sub.norm])  # fold.RMSNorm has no gain to take a scale
        online = getattr(layer.get_submodule(sub.writes), "online_hadamard", None)
        if sub.elementwise and online is None:  # a rotation in between mixes the channels
            rows, channel = inner_channels(layer, sub, config)
            found.append(Edge("inner", sub.inner, (sub.writes,), rows, channel))
    return found


def inner_channels(
    layer: nn.Module, sub: Sublayer, config
) -> tuple[Tensor | None, Tensor | None]:
    """(rows, channel) of the edge from ``sub.inner`` to ``sub.writes``, as in Edge."""
    outputs = layer.get_submodule(sub.inner).out_features
    inputs = layer.get_submodule(sub.writes).in_features
    rows, count = None, outputs
    if sub.fused == "gate_up":
        count = outputs // 2
        rows = torch.arange(count, outputs)
    elif sub.fused == "qkv":
        count = (outputs - inputs) // 2
        rows = torch.arange(outputs - count, outputs)
    elif sub.fused == "heads":
        dim, count = head_dim(config), (outputs - inputs) // 2
        block = outputs // (count // dim)  # a key-value head's queries, key and value
        rows = torch.arange(outputs).reshape(-1, block)[:, block - dim :].reshape(-1)
    if count == inputs:
        return rows, None
    dim, repeat = head_dim(config), inputs // count
    head, position = torch.arange(inputs) // dim, torch.arange(inputs) % dim
    return rows, (head // repeat) * dim + position


@torch.no_grad()
def apply_scale(layer: nn.Module, edge: Edge, s: Tensor, family: Family) -> None:
    """Divide the source by ``s`` [source channels] and multiply the readers' columns, in place.

    Computed in at least float32 and rounded once.
    """
    source = layer.get_submodule(edge.source)
    bias = getattr(source, "bias", None)
    if edge.kind == "norm":
        offset = 1.0 if family.unit_offset else 0.0
        gain = _wide(source.weight, s)
        source.weight.copy_((gain + offset) / s - offset)
        if bias is not None:
            bias.copy_(_wide(bias, s) / s)
    else:
        divide = s
        if edge.rows is not None:
            divide = torch.ones(source.out_features, dtype=s.dtype, device=s.device)
            divide[edge.rows.to(s.device)] = s
        source.weight.copy_(_wide(source.weight, s) / divide[:, None])
        if bias is not None:
            bias.copy_(_wide(bias, s) / divide)
    for path in (*edge.readers, *edge.also):
        weight = layer.get_submodule(path).weight
        weight.copy_(_wide(weight, s) * edge.to_readers(s))


def _wide(value: Tensor, s: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, s.dtype))


def fit_range(layer: nn.Module, edge: Edge, s: Tensor, family: Family) -> Tensor:
    """``s`` kept where the divided source and the multiplied readers stay inside their dtype.

    Half of the largest finite number is the limit; only float16 models ever come near it.
    """
    source = layer.get_submodule(edge.source)
    top = torch.finfo(source.weight.dtype).max / 2
    weight = source.weight.detach().float().abs()
    if edge.kind == "norm":
        level = weight + 1.0 if family.unit_offset else weight
    else:
        level = weight.amax(1)
    bias = getattr(source, "bias", None)
    if bias is not None:
        level = torch.maximum(level, bias.detach().float().abs())
    if edge.rows is not None:
        level = level[edge.rows.to(level.device)]
    readers = [layer.get_submodule(p).weight.detach().float().abs() for p in edge.readers]
    columns = torch.stack([w.amax(0) for w in readers]).amax(0)
    highest = top / edge.to_source(columns, "max").clamp(min=1e-30)
    lowest = (level / top).to(s.dtype)
    return torch.minimum(torch.maximum(s, lowest), highest.to(s.dtype))
