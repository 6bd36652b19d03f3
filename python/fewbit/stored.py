"""The quantised Linears of a model directory: found and checked by headers, read one at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .errors import CheckpointError, UnsafeFileError
from .formats import Format, Plan
from .formats.compressed_tensors import PackQuantized
from .scheme import Codes, Scheme
from .shards import Shards

MAX_MATCHES = 1_000_000  # module names times patterns


@dataclass(frozen=True)
class Stored:
    """One quantised Linear on disk: ``names`` are its tensors, by what follows the module's dot."""

    name: str
    format: Format
    scheme: Scheme
    out_features: int
    in_features: int
    names: dict[str, str]

    def tensors(self, shards: Shards) -> dict[str, Tensor]:
        return {suffix: shards.read(name) for suffix, name in self.names.items()}

    def codes(self, shards: Shards) -> tuple[Codes, dict[str, Tensor]]:
        """The canonical form, and what belongs to the Linear beside it."""
        tensors = self.tensors(shards)
        try:
            codes = self.format.unpack(tensors, self.scheme)
            return codes, self.format.extras(tensors, self.scheme)
        except CheckpointError as error:
            raise type(error)(f"{self.name}: {error.message}") from error

    def is_symmetric(self, shards: Shards) -> bool:
        """True when every zero point is the middle of the grid; reads zero points only."""
        if self.scheme.symmetric:
            return True
        tensors = {s: shards.entries[name].meta() for s, name in self.names.items()}
        zeros = self.format.zeros
        if zeros in tensors:
            tensors[zeros] = shards.read(self.names[zeros])
        return self.format.symmetric(tensors, self.scheme)


def find(shards: Shards, plan: Plan) -> dict[str, Stored]:
    """Every quantised Linear, by module name.

    Shapes and dtypes are compared with the config before any weight is read; CheckpointError names
    the tensor and what it should be.
    """
    format, tail = plan.format, "." + plan.format.mark
    # In the order of names: a safetensors file gives its own order anew in every process.
    marked = sorted(full[: -len(tail)] for full in shards.entries if full.endswith(tail))
    if len(marked) * len(plan.patterns) > MAX_MATCHES:
        raise UnsafeFileError(
            f"the config has {len(plan.patterns)} patterns for {len(marked)} modules; at most "
            f"{MAX_MATCHES} comparisons are made"
        )
    found = {}
    for name in marked:
        names = {s: f"{name}.{s}" for s in format.suffixes if f"{name}.{s}" in shards}
        scheme = plan.scheme_of(name)
        if scheme is None:
            raise CheckpointError(f"{name} is quantised, but the config has no scheme for it")
        if format.mark == "weight.absmax":  # its shape is known to the model only
            found[name] = Stored(name, format, scheme, -1, -1, names)
            continue
        meta = {s: shards.entries[n].meta() for s, n in names.items()}
        try:
            n, k = format.size({s: tuple(t.shape) for s, t in meta.items()}, scheme)
        except (ValueError, IndexError, KeyError) as error:
            raise CheckpointError(
                f"{name} is not a {format.name} Linear: its tensors are "
                f"{ {s: list(t.shape) for s, t in meta.items()} }"
            ) from error
        if isinstance(format, PackQuantized) and "weight_shape" in names:
            k = _stored_columns(shards, names["weight_shape"], n)
        format.check(meta, scheme, n, k, name)
        found[name] = Stored(name, format, scheme, n, k, names)
    if not found:
        raise CheckpointError(
            f"the config says {format.name}, but no tensor ends in {tail!r}: nothing is quantised"
        )
    return found


def _stored_columns(shards: Shards, name: str, n: int) -> int:
    """in_features from the two numbers of a weight_shape tensor."""
    entry = shards.entries[name]
    if entry.shape != (2,) or entry.dtype.is_floating_point:
        raise CheckpointError(f"{name} must be two integers, not {entry.dtype} {entry.shape}")
    rows, columns = shards.read(name).tolist()
    if rows != n or not 0 <= columns < 1 << 31:
        raise CheckpointError(f"{name} says {rows} x {columns}, but {n} rows are stored")
    return columns
