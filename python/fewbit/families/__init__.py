"""Where norms and linears sit in each model family, as data; no method knows a model by name.

One file per family holds a ``FAMILY`` (or several). ``describe(model)`` picks the one whose
``architectures`` names the model's class and resolves it against the live modules, so that
everything else in the package asks for edges (norm -> readers, inner -> writer) and never for
names. A model that no file describes is refused; it is never guessed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache

from torch import nn

from ..errors import UnknownFamilyError


@dataclass(frozen=True)
class Sublayer:
    """Half a decoder layer (attention, or MLP): paths relative to the layer.

    ``norm`` feeds ``reads``; the output channels of ``inner`` meet the input channels of the
    linear(s) ``writes``, which add to the residual stream. ``heads`` is True where inner is the
    value projection of an attention, so that inner -> writes passes through head groups.
    ``elementwise`` is True when a positive per-channel scale passes from ``inner`` to ``writes``
    unchanged (v -> o; up -> down behind a gate; fc1 -> fc2 behind ReLU, but not behind GELU).
    ``fused`` says which output channels of ``inner`` meet the writer where it makes more than that:
    "qkv" (all queries, all keys, all values), "heads" (per key-value head: its queries, its key,
    its value) or "gate_up" (gates, then ups); always the last part. ``also`` are modules with a
    weight [.., hidden] that read the norm too and are never quantised (a router). A path may hold
    ``*`` for the number of an expert: ``describe`` writes the sublayer out once per expert.
    """

    norm: str
    reads: tuple[str, ...]
    inner: str
    writes: str
    heads: bool = False
    elementwise: bool = True
    fused: str = ""
    also: tuple[str, ...] = ()
    query: str = ""  # an attention's query and key projections, where they are linears of their own
    key: str = ""


@dataclass(frozen=True)
class Family:
    """One model family. All paths but those of ``sublayers`` are from the model's root."""

    name: str
    architectures: tuple[str, ...]
    embed: str
    layers: str
    sublayers: tuple[Sublayer, ...]
    final_norm: str
    head: str
    positions: str | None = None  # learned position table, a writer to the residual stream
    norm: str = "rms"  # "rms" or "layer" (mean is subtracted, bias is added)
    unit_offset: bool = False  # the norm multiplies by 1 + weight (Gemma)
    rope: bool = True  # queries and keys are rotated by position between projection and product
    unrotatable: str = ""  # why the residual stream cannot be rotated; empty where it can
    # config field=value, or !=, -> reason; a value may be the name of another field
    refuse: dict[str, str] = field(default_factory=dict)
    when: dict[str, object] = field(default_factory=dict)  # config values of this variant
    experts: str = ""  # where a layer keeps fused expert weights (linearise.py unfuses them)
    expert_count: str = ""  # the config field that counts them

    def linears(self) -> tuple[str, ...]:
        """The linears of one layer that are quantised, in the order of the forward pass."""
        return tuple(
            path for sub in self.sublayers for path in dict.fromkeys((*sub.reads, sub.writes))
        )

    def inputs(self) -> list[tuple[str, ...]]:
        """The same linears, those together that read the same input."""
        groups = (group for sub in self.sublayers for group in (sub.reads, (sub.writes,)))
        return list(dict.fromkeys(groups))


@cache
def families() -> dict[str, tuple[Family, ...]]:
    """Every described family by the architecture names it serves, variants in order."""
    table: dict[str, tuple[Family, ...]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for family in getattr(module, "FAMILIES", ()):
            for architecture in family.architectures:
                table[architecture] = (*table.get(architecture, ()), family)
    return table


def describe(model: nn.Module) -> Family:
    """The family of a live model, by its class name and configuration.

    Raises UnsupportedError, naming the class and the known ones, for an unknown architecture or a
    configuration that the family's file refuses.
    """
    name = type(model).__name__
    if name not in families():
        known = ", ".join(sorted(families()))
        raise UnknownFamilyError(f"no family describes {name}; described are: {known}")
    config = getattr(model, "config", None)
    for family in families()[name]:
        if all(getattr(config, key, None) == value for key, value in family.when.items()):
            break
    else:
        fields = sorted({key for family in families()[name] for key in family.when})
        values = ", ".join(f"{key}={getattr(config, key, None)!r}" for key in fields)
        raise UnknownFamilyError(f"{name} with {values} is not described")
    for condition, reason in family.refuse.items():
        key, _, value = condition.partition("=")
        negated = key.endswith("!")
        value = str(getattr(config, value, value))
        if (str(getattr(config, key.rstrip("!"), None)) == value) != negated:
            found = f"{key.rstrip('!')}={getattr(config, key.rstrip('!'), None)}"
            raise UnknownFamilyError(f"{name} with {found} is not supported: {reason}")
    return _write_out(family, config) if family.experts else family


def _write_out(family: Family, config) -> Family:
    """The family with every sublayer that holds ``*`` repeated for each expert."""
    count = getattr(config, family.expert_count)
    sublayers: list[Sublayer] = []
    for sub in family.sublayers:
        if "*" not in sub.writes:
            sublayers.append(sub)
            continue
        for i in range(count):
            at = {name: getattr(sub, name).replace("*", str(i)) for name in ("inner", "writes")}
            reads = tuple(path.replace("*", str(i)) for path in sub.reads)
            sublayers.append(replace(sub, reads=reads, **at))
    return replace(family, sublayers=tuple(sublayers))


def decoder_layers(model: nn.Module, family: Family | None = None) -> nn.ModuleList:
    """The list of decoder layers of a live model."""
    return model.get_submodule((family or describe(model)).layers)


def linear_names(model: nn.Module, family: Family | None = None) -> Iterator[str]:
    """Full paths of the linears that a method quantises, layer by layer."""
    family = family or describe(model)
    for i in range(len(decoder_layers(model, family))):
        for path in family.linears():
            yield f"{family.layers}.{i}.{path}"
