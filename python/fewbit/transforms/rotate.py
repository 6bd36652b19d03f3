"""Rotate a model so that outliers spread over all channels and its function stays the same.

R1 turns the residual stream: embedding and positions E <- E R1, writers W <- R1^T W and
c <- R1^T c, readers and head W <- W R1. R2 turns each head between value and output projection.
R3 turns queries and keys of a head alike, after rope. R4 is an online Hadamard transform before
the MLP's writer, with its inverse in that weight. Equations: S. Ashkboos et al., QuaRot, 2024;
Z. Liu et al., SpinQuant, 2024. Norms are folded first (fold.py). Everything is float64, rounded
once per parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AlreadyQuantizedError, RotationLimitError, UsageError
from ..families import Family, Sublayer, decoder_layers
from ..kv import attach_kv, head_dim, require_interface
from ..online import OnlineHadamard, attach
from ..orthogonal import Rotation, rotation
from ..scheme import Scheme, check_int
from . import LayerContext, Transform
from .edges import inner_channels
from .fold import FoldNorm, RMSNorm, float64, linear_at, norm_readers, untie_head
from .grids import fit_grid
from .rows import input_rows

MARK = "fewbit_rotation"  # in the model's config, so that a saved model still carries it
ROWS = 512  # of a writer's inputs, that r4 "fit" decides on
ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")

Kind = str | Tensor | None


class Rotate(Transform):
    """Fold norms, then rotate. Each of r1..r4 is a kind of ``orthogonal.KINDS``, or None.

    ``r1`` may be a matrix [hidden, hidden], ``r2`` one [head_dim, head_dim] or one per layer;
    ``r3`` is "hadamard" or None, ``r4`` "hadamard", "random-hadamard", None, or "fit":
    "random-hadamard" in the layers where the quantised input of the MLP's writer then does less
    harm to its output (behind a ReLU, which leaves most channels 0, it may do more).
    ``keeps_mean``: on LayerNorm models take an R1 with R1 1 = 1, so that the norms stay LayerNorms
    and the result loads in plain transformers; False removes the means instead and puts
    ``fold.RMSNorm`` in their place.
    """

    def __init__(
        self,
        r1: Kind = "hadamard",
        r2: Kind | Sequence[Tensor] = "hadamard",
        r3: str | None = None,
        r4: str | None = None,
        seed: int = 0,
        keeps_mean: bool = True,
    ) -> None:
        if r3 not in (None, "hadamard"):
            raise UsageError(f'r3 must be "hadamard" or None, got {r3!r}')
        if r4 not in (None, "hadamard", "random-hadamard", "fit"):
            raise UsageError(f'r4 must be "hadamard", "random-hadamard", "fit" or None, got {r4!r}')
        check_int("seed", seed, 0, 2**32 - 1)
        self.r1, self.r2, self.r3, self.r4 = r1, r2, r3, r4
        self.seed, self.keeps_mean = seed, keeps_mean
        self._cache: dict[tuple, Rotation] = {}
        self._rotated: set[str] = set()  # r4 "fit": paths of the writers that it serves

    @property
    def needs_tokens(self) -> bool:
        return self.r4 == "fit"

    def prepare(
        self, model: nn.Module, family: Family, scheme: Scheme, batches: list[Tensor]
    ) -> None:
        """Where r4 is "fit": find the writers that it serves."""
        if self.r4 != "fit":
            return
        self._rotated.clear()
        layers = decoder_layers(model, family)
        writers = {
            (index, sub.writes): layer.get_submodule(sub.writes)
            for index, layer in enumerate(layers)
            for sub in family.sublayers if not sub.heads
        }
        for (index, path), x in input_rows(model, writers, batches, ROWS).items():
            weight = linear_at(layers[index], path).weight
            turn, per = self._r4(weight.shape[1], index), scheme.activations
            turned = turn.right(x).float(), turn.right(weight).float()
            errors = [
                fit_grid(rows, [w], scheme.activation_bits, per).error
                for rows, w in ((x, weight), turned)
            ]
            if errors[1] < errors[0]:
                self._rotated.add(f"{index}.{path}")

    def online_part(self) -> Rotate:
        """R3 and R4 alone, as they are here."""
        part = Rotate(None, None, self.r3, self.r4, self.seed)
        part._rotated = self._rotated
        return part

    def _r4(self, width: int, index: int) -> Rotation:
        kind = "random-hadamard" if self.r4 == "fit" else self.r4
        return rotation(width, kind, self.seed + 1000 + index)

    @property
    def online(self) -> bool:
        return bool(self.r3 or self.r4)

    def to_dict(self) -> dict:
        named = {k: v if v is None or isinstance(v, str) else "given" for k, v in self._kinds()}
        return {"name": "Rotate", **named, "seed": self.seed, "keeps_mean": self.keeps_mean}

    def _kinds(self) -> list[tuple[str, Any]]:
        return [("r1", self.r1), ("r2", self.r2), ("r3", self.r3), ("r4", self.r4)]

    def residual(self, family: Family, width: int) -> Rotation | None:
        """R1 of this width, the same on every call."""
        if self.r1 is None:
            return None
        if (key := ("r1", width)) not in self._cache:
            keep = self.keeps_mean and family.norm == "layer"
            r = rotation(width, self.r1, self.seed, keep)
            if keep and not r.keeps_mean():
                raise UsageError(
                    "the given r1 does not keep the mean (R 1 = 1), so LayerNorm does not commute "
                    "with it; pass keeps_mean=False to replace the norms"
                )
            self._cache[key] = r
        return self._cache[key]

    def head(self, index: int, head_dim: int) -> Rotation | None:
        """R2 of layer ``index``; random kinds differ from layer to layer."""
        if self.r2 is None:
            return None
        if isinstance(self.r2, (list, tuple)):
            if index >= len(self.r2):
                raise UsageError(f"r2 has {len(self.r2)} matrices, but there is a layer {index}")
            return rotation(head_dim, self.r2[index])
        per_layer = self.r2 in ("random", "random-hadamard") if isinstance(self.r2, str) else False
        key = ("r2", head_dim, index if per_layer else 0)
        if key not in self._cache:
            self._cache[key] = rotation(head_dim, self.r2, self.seed + 1 + key[2])
        return self._cache[key]

    def _fold(self, family: Family) -> FoldNorm:
        return FoldNorm(centre=self.r1 is not None and not self.keeps_mean)

    def check(self, model: nn.Module, family: Family, scheme: Scheme) -> None:
        check_rotatable(model, family, self)

    def outside(self, model: nn.Module, family: Family) -> list[dict]:
        embed = model.get_submodule(family.embed)
        tables = [embed] + ([model.get_submodule(family.positions)] if family.positions else [])
        untie_head(model, family)  # first: a shared weight would have two precisions
        head, norm = linear_at(model, family.head), model.get_submodule(family.final_norm)
        r1 = self.residual(family, embed.weight.shape[1])
        records = []
        if r1 is not None:
            with float64([*tables, head, norm]):
                records = self._fold(family).outside(model, family)
                for table in tables:
                    table.weight.data = r1.right(table.weight.data)
                head.weight.data = r1.right(head.weight.data)
                _rotate_norm_bias(norm, r1)
        model.config.fewbit_rotation = {k: v for k, v in self.to_dict().items() if k != "name"}
        if self.r4:
            forbid_plain_loading(model.config, f"rotated by fewbit, r4={self.r4}")
        elif isinstance(model.get_submodule(family.final_norm), RMSNorm):
            forbid_plain_loading(model.config, "means removed by fewbit, keeps_mean=False")
        return [*records, {"path": "", **self.to_dict()}]

    def carry(self, hidden: Tensor, family: Family) -> Tensor:
        if self.r1 is None:
            return hidden
        wide = self._fold(family).carry(hidden.double(), family)
        return self.residual(family, hidden.shape[-1]).right(wide).to(hidden.dtype)

    def layer(self, layer: nn.Module, context: LayerContext) -> None:
        family, config = context.family, context.config
        writers = dict.fromkeys(s.writes for s in family.sublayers)
        readers = dict.fromkeys(r for reads in norm_readers(family).values() for r in reads)
        norms = [layer.get_submodule(n) for n in norm_readers(family)]
        linears = {path: linear_at(layer, path) for path in (*readers, *writers)}
        with float64([*norms, *linears.values()]):
            if self.r1 is not None:
                self._fold(family).layer(layer, context)
                r1 = self.residual(family, config.hidden_size)
                for path in readers:
                    linears[path].weight.data = r1.right(linears[path].weight.data)
                for path in writers:
                    _rotate_outputs(linears[path], r1)
                for norm in norms:
                    _rotate_norm_bias(norm, r1)
            for sub in family.sublayers:
                if sub.heads:
                    self._attention(layer, sub, context)
                elif self.r4 and (
                    self.r4 != "fit" or f"{context.index}.{sub.writes}" in self._rotated
                ):
                    down = linears[sub.writes]
                    r4 = self._r4(down.in_features, context.index)
                    down.weight.data = r4.right(down.weight.data)
                    online = OnlineHadamard(r4).to(down.weight.device)
                    attach(down, "online_hadamard", online)

    def _attention(self, layer: nn.Module, sub: Sublayer, context: LayerContext) -> None:
        dim = head_dim(context.config)
        r2 = self.head(context.index, dim)
        if r2 is not None:
            rows, _ = inner_channels(layer, sub, context.config)
            _rotate_outputs(linear_at(layer, sub.inner), r2, rows)
            o = linear_at(layer, sub.writes)
            o.weight.data = _blocks(o.weight.data, dim, r2)
        if self.r3 and context.family.rope:
            attention = layer.get_submodule(sub.writes.rpartition(".")[0])
            device = linear_at(layer, sub.writes).weight.device
            attach_kv(attention, rotate=True, width=dim).to(device)
        elif self.r3:
            for path in (sub.query, sub.key):
                _rotate_outputs(linear_at(layer, path), rotation(dim))


def forbid_plain_loading(config: Any, why: str) -> None:
    """Make transformers refuse, by name, a directory that is saved with this config.

    transformers skips a quantisation that it does not know, and drops tensors and fields; but it
    must find the activation function. The live model has built its own already.
    """
    for name in ACTIVATION_FIELDS:
        if isinstance(value := getattr(config, name, None), str):
            setattr(config, name, f"{value} ({why}; needs fewbit)")


def marked_activations(config: Any) -> dict[str, str]:
    """The fields that carry the mark of ``forbid_plain_loading``, with their values."""
    values = {name: getattr(config, name, None) for name in ACTIVATION_FIELDS}
    return {n: v for n, v in values.items() if isinstance(v, str) and "needs fewbit" in v}


def plain_name(marked: str) -> str:
    """The name of the activation without the mark."""
    return marked.partition(" (")[0]


@contextmanager
def plain_activation(config: Any) -> Iterator[None]:
    """The config without the mark of ``forbid_plain_loading``, inside the block."""
    marked = marked_activations(config)
    for name, value in marked.items():
        setattr(config, name, plain_name(value))
    try:
        yield
    finally:
        for name, value in marked.items():
            setattr(config, name, value)


def check_rotatable(model: nn.Module, family: Family, rotate: Rotate) -> None:
    """Refuse, with the reason, what cannot be rotated or has been rotated before."""
    if family.unrotatable:
        raise RotationLimitError(f"{type(model).__name__} cannot be rotated: {family.unrotatable}")
    if getattr(model.config, MARK, None):
        raise AlreadyQuantizedError(
            f"this model is rotated already ({model.config.fewbit_rotation}); rotate the original"
        )
    if rotate.r3 and family.rope:
        require_interface(model, "r3")
    elif rotate.r3:
        for sub in family.sublayers:
            if sub.heads and not (sub.query and sub.key):
                raise RotationLimitError(
                    f"r3 is not supported for {type(model).__name__}: its query and key "
                    "projections are fused"
                )


def _blocks(w: Tensor, dim: int, r: Rotation) -> Tensor:
    """w [n, heads * dim] times blockdiag(r, ..., r)."""
    return r.right(w.reshape(w.shape[0], -1, dim)).reshape(w.shape)


def _rotate_outputs(linear: nn.Linear, r: Rotation, rows: Tensor | None = None) -> None:
    """Outputs y of a linear become y R, in blocks of R's width: W <- R^T W, c <- c R.

    ``rows``: only these outputs (the values of a fused qkv).
    """
    rows = slice(None) if rows is None else rows
    weight = linear.weight.data.clone()
    weight[rows] = _blocks(weight[rows].T, r.n, r).T
    linear.weight.data = weight
    if linear.bias is not None:
        bias = linear.bias.data.clone()
        bias[rows] = _blocks(bias[rows][None], r.n, r)[0]
        linear.bias.data = bias


def _rotate_norm_bias(norm: nn.Module, r: Rotation) -> None:
    """The bias that a LayerNorm kept because its reader has none."""
    bias = getattr(norm, "bias", None)
    if bias is not None and bool(bias.any()):
        bias.data = r.right(bias.data[None])[0]


def max_over_mean(x: Tensor) -> float:
    """The largest channel over the average channel, by mean |x| over tokens; x [..., channels]."""
    level = x.detach().to(torch.float32).abs().reshape(-1, x.shape[-1]).mean(0)
    return float(level.max() / level.mean())
