"""What a checkpoint format is: pure functions between Codes and the tensors of one Linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError, FormatLimitError, UnsupportedError, UsageError
from ..scheme import Codes, Scheme
from .patterns import Pattern

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


ANY = -1


class Spec(NamedTuple):
    """What a stored tensor must look like: allowed dtypes, shape (ANY is every size), may it be
    absent."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]
    optional: bool = False


class Format:
    """One on-disk layout of a quantised Linear; instances hold no state but their name.

    ``mark`` is the tensor whose presence says that a Linear is stored in this format, ``suffixes``
    all that may belong to it. Subclasses give ``expected``, ``size``, ``pack``, ``unpack`` and
    ``config``.
    """

    name: str
    mark: str
    suffixes: tuple[str, ...]
    zeros = ""  # the suffix that holds zero points
    holds: tuple[str, ...] = ()  # extras that have a place in this format
    writable = True

    def size(self, shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        """(out_features, in_features) from the stored shapes; in_features may be an upper bound.

        Shapes of another rank than the format's raise ValueError.
        """
        raise NotImplementedError

    def expected(self, n: int, k: int, scheme: Scheme) -> dict[str, Spec]:
        """Every tensor of a Linear with ``n`` outputs and ``k`` inputs."""
        raise NotImplementedError

    def refuse(self, scheme: Scheme, n: int, k: int) -> str | None:
        """Why such a weight has no place in this format, or None."""
        raise NotImplementedError

    def pack(self, codes: Codes, scheme: Scheme, **extras: Tensor) -> dict[str, Tensor]:
        """The stored tensors, by the name behind the module's dot."""
        raise NotImplementedError

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Codes:
        """The inverse of ``pack``."""
        raise NotImplementedError

    def symmetric(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> bool:
        """True when every zero point is 2**(bits - 1), so that the grid is symmetric in effect.

        Reads the data of no other tensor than ``zeros``; the others may be meta.
        """
        return scheme.symmetric

    def extras(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
        """What belongs to the Linear beside its codes (static activation scales, column order)."""
        return {}

    def config(self, schemes: Mapping[str, Scheme], ignore: list[str]) -> dict:
        """``quantization_config`` for Linears ``schemes`` (by full name) and float ``ignore``."""
        raise NotImplementedError

    def check(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, n: int, k: int, name: str = "weight"
    ) -> None:
        """Raise CheckpointError unless the tensors (meta ones will do) are as ``expected``."""
        want = self.expected(n, k, scheme)
        for suffix, spec in want.items():
            if suffix not in tensors:
                if spec.optional:
                    continue
                raise CheckpointError(f"{name}.{suffix} is missing from a {self.name} checkpoint")
            tensor = tensors[suffix]
            fits = tensor.dim() == len(spec.shape) and all(
                size in (ANY, found)
                for size, found in zip(spec.shape, tensor.shape, strict=True)
            )
            if tensor.dtype not in spec.dtypes or not fits:
                raise CheckpointError(
                    f"{name}.{suffix} is {tensor.dtype} {list(tensor.shape)}, but {scheme} with "
                    f"{n} outputs and {k} inputs needs {_names(spec.dtypes)} {list(spec.shape)}"
                )


@dataclass(frozen=True)
class Rule:
    """A scheme for the modules that ``pattern`` names.

    ``kind``: "name" (equal), "regex" (from the start), "all".
    """

    kind: str
    pattern: str
    scheme: Scheme

    @cached_property
    def _compiled(self) -> Pattern:
        return Pattern(self.pattern)

    def matches(self, name: str) -> bool:
        if self.kind == "regex":
            return self._compiled.match(name)
        return self.kind == "all" or self.pattern == name


@dataclass(frozen=True)
class Plan:
    """What a ``quantization_config`` says: the format, and the scheme of each module.

    The first matching rule holds. Whether a module *is* quantised is for its tensors to say, as
    in engines: skip lists are spelt differently by every tool, so they are written, not read.
    ``notes`` are said to the user.
    """

    format: Format
    rules: tuple[Rule, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def _names(self) -> dict[str, int]:
        """Index of the first rule with that exact name."""
        backwards = reversed(list(enumerate(self.rules)))
        return {rule.pattern: i for i, rule in backwards if rule.kind == "name"}

    @cached_property
    def patterns(self) -> list[tuple[int, Rule]]:
        """The rules that are not exact names, with their index."""
        return [(i, rule) for i, rule in enumerate(self.rules) if rule.kind != "name"]

    def scheme_of(self, name: str) -> Scheme | None:
        exact = self._names.get(name, len(self.rules))
        for i, rule in self.patterns:
            if i > exact:
                break
            if rule.matches(name):
                return rule.scheme
        return self.rules[exact].scheme if exact < len(self.rules) else None


def field(config: Mapping, key: str, kind: type | tuple, default: Any = ...) -> Any:
    """config[key], of the given JSON type; CheckpointError names the key and its value."""
    value = config.get(key, default)
    if value is default and default is not ...:
        return default
    if value is ...:
        raise CheckpointError(f"the quantization_config has no {key!r}")
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(k.__name__ for k in kinds)
        raise CheckpointError(f"{key!r} must be {wanted}, got {value!r:.80}")
    return value


def names(config: Mapping, key: str) -> list[str]:
    """A list of at most 100,000 strings under ``key``; absent and null mean none."""
    value = field(config, key, (list, type(None)), None) or []
    if len(value) > 100_000 or not all(isinstance(v, str) for v in value):
        raise CheckpointError(f"{key!r} must be a list of at most 100000 module names")
    return value


def scheme_or_error(**values: Any) -> Scheme:
    """A Scheme from file values: what the scheme rejects is the file's fault."""
    try:
        return Scheme(**values)
    except UsageError as error:
        reason = error.message
        raise CheckpointError(f"the quantization_config is not usable: {reason}") from error


def only_scheme(schemes: Mapping[str, Scheme], where: str) -> Scheme:
    """The one scheme of all modules, for formats whose config holds no more."""
    found = set(schemes.values())
    if len(found) != 1:
        raise FormatLimitError(
            f"{where} holds one scheme a model, not {sorted(map(str, found))}; compressed-tensors "
            "holds several"
        )
    return found.pop()


def groups_fit(scheme: Scheme, k: int) -> bool:
    """True when no group of a row with ``k`` columns is short."""
    return scheme.group_size == -1 or k % scheme.group_size == 0


def exact(scale: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """``scale`` as ``dtype``, refused when that would change a value."""
    out = scale.to(dtype)
    if not torch.equal(out.to(scale.dtype), scale):
        raise FormatLimitError(
            f"{where} stores scales as {_names((dtype,))}, which would change scales of "
            f"{_names((scale.dtype,))}; quantise with scale_dtype={_names((dtype,))!r}"
        )
    return out.contiguous()


EXTRAS = {
    "order": "columns in activation order (desc_act), which engines refuse with groups",
    "input_scale": "static activation scales",
    "input_zero_point": "static activation zero points",
    "threshold": "columns that turn float at a threshold, as in LLM.int8()",
    "kept": "columns that stay float",
    "kept_weight": "columns that stay float",
}


def require_codes(
    format: Format, codes: Codes, scheme: Scheme, extras: Mapping[str, Tensor] | None = None
) -> None:
    """The one check before packing: what the format cannot hold, and codes off their grid."""
    n, k = codes.q.shape
    refusal = format.refuse(scheme, n, k)
    for key in (extras or {}).keys() - set(format.holds):
        refusal = refusal or f"it has no place for {EXTRAS.get(key, key)}"
    if refusal:
        raise FormatLimitError(f"{format.name} cannot hold this weight: {refusal}")
    want = (n, scheme.groups(k))
    if tuple(codes.scale.shape) != want or tuple(codes.zero_point.shape) != want:
        raise UnsupportedError(
            f"{scheme} of {n} x {k} needs scale and zero_point {list(want)}, got "
            f"{list(codes.scale.shape)} and {list(codes.zero_point.shape)}"
        )
    top = (1 << scheme.bits) - 1
    for what, tensor in (("code", codes.q), ("zero point", codes.zero_point)):
        if tensor.dtype != torch.uint8:
            raise UnsupportedError(f"{what}s must be uint8, got {tensor.dtype}")
        if scheme.bits < 8 and tensor.numel() and int(tensor.max()) > top:
            raise UnsupportedError(f"a {what} of {int(tensor.max())} is above {top}")
    if scheme.symmetric and not bool((codes.zero_point == 1 << (scheme.bits - 1)).all()):
        raise UnsupportedError(
            f"{scheme} is symmetric, so every zero point must be {1 << (scheme.bits - 1)}"
        )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)
