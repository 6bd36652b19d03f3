"""The grid on which weights, activations and the KV cache are put: frozen data, no behaviour."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import NamedTuple

from torch import Tensor

from .errors import UsageError

FLOAT_BITS = 16
MAX_GROUP = 2**31 - 1
SCALE_DTYPES = ("float32", "float16", "bfloat16")
ACTIVATION_MODES = ("token", "tensor", "static")

_TEXT = re.compile(
    r"w(?P<w>\d+)(a(?P<a>\d+))?(kv(?P<kv>\d+))?(g(?P<g>-?\d+))?(?P<sym>sym|asym)?", re.ASCII
)


class Codes(NamedTuple):
    """A weight on its grid: ``w = (q - zero_point) * scale``.

    ``q`` uint8 [out_features, in_features], codes 0 .. 2**bits - 1; ``scale`` float
    [out_features, groups]; ``zero_point`` uint8 [out_features, groups]. Group g is the columns
    [g * group_size, (g + 1) * group_size) of ``q``; the last group may be short. Symmetric grids
    carry ``zero_point = 2**(bits - 1)``. Every solver returns this, every format stores it.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor


@dataclass(frozen=True)
class Scheme:
    """What to quantise to.

    ``bits`` 2..8 of a weight; ``group_size`` weights along in_features that share one scale
    (-1: the whole row); ``symmetric``: the zero point is fixed at 2**(bits - 1). ``scale_dtype`` is
    the type in which scales are stored; codes are computed against the rounded scale, so storing
    loses nothing. ``activation_bits`` and ``kv_bits`` 16 mean float; below that, activations are
    quantised per ``activations`` = "token" (one dynamic scale a row), "tensor" (one dynamic scale),
    or "static" (one scale from calibration); their zero point is 0 with ``symmetric_activations``.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    scale_dtype: str = "float16"
    activation_bits: int = FLOAT_BITS
    activations: str = "token"
    kv_bits: int = FLOAT_BITS
    symmetric_activations: bool = True

    def __post_init__(self) -> None:
        check_int("bits", self.bits, 2, 8)
        check_int("activation_bits", self.activation_bits, 2, FLOAT_BITS)
        check_int("kv_bits", self.kv_bits, 2, FLOAT_BITS)
        size = self.group_size
        if not _is_int(size) or not (size == -1 or 1 <= size <= MAX_GROUP):
            raise UsageError(
                f"group_size must be -1 (whole row) or at least 1, got {size!r:.40}"
                + (f", above {MAX_GROUP}" if _is_int(size) and size > MAX_GROUP else "")
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise UsageError(f"scale_dtype must be one of {SCALE_DTYPES}, got {self.scale_dtype!r}")
        if self.activations not in ACTIVATION_MODES:
            raise UsageError(
                f"activations must be one of {ACTIVATION_MODES}, got {self.activations!r}"
            )

    @classmethod
    def parse(cls, text: str | Scheme, **overrides) -> Scheme:
        """``w4a16g128``, ``w3g64sym``, ``w8a8``, ``w4a4kv4``: bits, then what differs.

        Without ``g``: group 128 for float activations, whole rows (and a symmetric grid) for
        quantised ones, which is what integer matrix products need.
        """
        if isinstance(text, Scheme):
            return cls(**{**asdict(text), **overrides})
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise UsageError(
                f"scheme {text!r} is not of the form "
                "w<bits>[a<bits>][kv<bits>][g<group>][sym|asym], for example w4a16g128 or w8a8"
            )
        activation_bits = int(match["a"] or FLOAT_BITS)
        integer = activation_bits < FLOAT_BITS
        fields = {
            "bits": int(match["w"]),
            "activation_bits": activation_bits,
            "kv_bits": int(match["kv"] or FLOAT_BITS),
            "group_size": int(match["g"]) if match["g"] else (-1 if integer else 128),
            "symmetric": integer if match["sym"] is None else match["sym"] == "sym",
        }
        return cls(**{**fields, **overrides})

    def __str__(self) -> str:
        kv = f"kv{self.kv_bits}" if self.kv_bits < FLOAT_BITS else ""
        grid = "sym" if self.symmetric else "asym"
        return f"w{self.bits}a{self.activation_bits}{kv}g{self.group_size}{grid}"

    def groups(self, in_features: int) -> int:
        """Scales per row of a weight with ``in_features`` columns."""
        return -(-in_features // self.group_of(in_features)) if in_features else 0

    def group_of(self, in_features: int) -> int:
        """The group size with -1 resolved to the row."""
        return max(in_features, 1) if self.group_size == -1 else self.group_size

    def to_dict(self) -> dict:
        return asdict(self)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


MANY = 1000  # points of a grid, sweeps, epochs: more of them change nothing and take hours


def check_int(name: str, value: int, low: int, high: int) -> None:
    """UsageError unless ``value`` is a whole number in low..high."""
    if not _is_int(value) or not low <= value <= high:
        raise UsageError(f"{name} must be in {low}..{high}, got {value!r}")
