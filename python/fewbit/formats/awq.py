"""AWQ, 4 bit: GEMM (AutoAWQ's default, read and written), GEMV and GEMVFast / llm-awq v2 (read).

GEMM of a Linear with N outputs, K inputs, groups of G:
    qweight int32 [K, N/8]     word c of row k holds columns 8c + order[i] in its nibbles i = 0..7,
                               order = 0 2 4 6 1 3 5 7
    qzeros  int32 [K/G, N/8]   z, interleaved alike, stored as it is
    scales  float16 [K/G, N]
GEMV:
    qweight int32 [N, K/8], qzeros int32 [N, W], scales float16 [N, 8 W]: natural order along K;
    W = ceil(K/G/8), rounded up to a multiple of 2 for G = 64 and of 4 for G = 32; padded
GEMVFast (llm-awq v2 calls its zeros scaled_zeros):
    qweight int16 [N/4, K], scales float16 [8 W, N], qzeros float16 [8 W, N] = -(s * z)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .. import ops
from ..errors import CheckpointError, FormatLimitError, UnreadFormatError
from ..scheme import FLOAT_BITS, Codes
from . import bits as fields
from .base import (
    Format,
    Plan,
    Rule,
    Spec,
    exact,
    field,
    groups_fit,
    only_scheme,
    require_codes,
    scheme_or_error,
)

EIGHTS = 0x88888888 - (1 << 32)  # eight fields of 8
HALF = (torch.float16,)


class Gemm(Format):
    name = "awq"
    mark = "qweight"
    suffixes = ("qweight", "qzeros", "scales")
    zeros = "qzeros"

    def size(self, shapes, scheme):
        k, words = shapes["qweight"]
        return words * 8, k

    def expected(self, n, k, scheme):
        groups = scheme.groups(k)
        return {
            "qweight": Spec((torch.int32,), (k, n // 8)),
            "qzeros": Spec((torch.int32,), (groups, n // 8)),
            "scales": Spec((torch.float16, torch.bfloat16), (groups, n)),
        }

    def refuse(self, scheme, n, k):
        if scheme.bits != 4 or scheme.activation_bits < FLOAT_BITS:
            return f"AWQ stores 4-bit weights with float activations, not {scheme}"
        if n % 8:
            return f"{n} outputs are not a multiple of 8"
        if not groups_fit(scheme, k):
            return f"{k} inputs are not a multiple of group_size {scheme.group_size}"
        return None

    def pack(self, codes, scheme, **extras):
        require_codes(self, codes, scheme, extras)
        return {
            "qweight": interleave(codes.q).T.contiguous(),
            "qzeros": interleave(codes.zero_point).T.contiguous(),
            "scales": exact(codes.scale, torch.float16, "AWQ").T.contiguous(),
        }

    def unpack(self, tensors, scheme):
        return Codes(
            deinterleave(tensors["qweight"].T),
            tensors["scales"].T.contiguous(),
            deinterleave(tensors["qzeros"].T),
        )

    def symmetric(self, tensors, scheme):
        return bool((tensors["qzeros"] == EIGHTS).all())

    def config(self, schemes, ignore):
        scheme = only_scheme({m: replace(s, symmetric=False) for m, s in schemes.items()}, "AWQ")
        for entry in ignore:  # engines test for substrings
            hit = next((name for name in schemes if entry in name), None)
            if hit:
                raise FormatLimitError(
                    f"AWQ's skip list would also skip {hit} for its entry {entry!r}"
                )
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": scheme.group_size,
            "zero_point": True,  # symmetric weights carry z = 8: readers need the tensor
            "version": "gemm",
            "modules_to_not_convert": list(ignore),
            **({"lm_head": True} if "lm_head" in schemes else {}),
        }


class Gemv(Format):
    name = "awq-gemv"
    mark = "qweight"
    suffixes = ("qweight", "qzeros", "scales")
    writable = False

    def size(self, shapes, scheme):
        n, words = shapes["qweight"]
        return n, words * 8

    def expected(self, n, k, scheme):
        width = _width(scheme.groups(k), scheme.group_of(k))
        return {
            "qweight": Spec((torch.int32,), (n, k // 8)),
            "qzeros": Spec((torch.int32,), (n, width)),
            "scales": Spec(HALF, (n, 8 * width)),
        }

    def unpack(self, tensors, scheme):
        q = fields.unpack(tensors["qweight"], 4, tensors["qweight"].shape[1] * 8)
        groups = scheme.groups(q.shape[1])
        zero_point = fields.unpack(tensors["qzeros"], 4, groups)
        return Codes(q, tensors["scales"][:, :groups].contiguous(), zero_point)


class GemvFast(Format):
    """``zeros`` names the third tensor: AutoAWQ says qzeros, llm-awq scaled_zeros."""

    name = "awq-gemv-fast"
    mark = "qweight"
    writable = False

    def __init__(self, zeros: str = "qzeros") -> None:
        self.zeros = zeros
        self.suffixes = ("qweight", zeros, "scales")

    def symmetric(self, tensors, scheme):
        return False  # -(s * z) alone does not tell z

    def size(self, shapes, scheme):
        rows, k = shapes["qweight"]
        return rows * 4, k

    def expected(self, n, k, scheme):
        if n % 4 or k % 64:
            raise CheckpointError(f"{self.name} needs outputs in fours, inputs in 64s: {n} x {k}")
        width = _width(scheme.groups(k), scheme.group_of(k))
        return {
            "qweight": Spec((torch.int16,), (n // 4, k)),
            "scales": Spec(HALF, (8 * width, n)),
            self.zeros: Spec(HALF, (8 * width, n)),
        }

    def unpack(self, tensors, scheme):
        stored = tensors["qweight"]
        n, k = stored.shape[0] * 4, stored.shape[1]
        groups = scheme.groups(k)
        scale = tensors["scales"][:groups].T.contiguous()
        # z = -zeros / s; both are rounded to half, and z is an integer far below their precision.
        scaled = tensors[self.zeros][:groups].T
        zero_point = (-scaled.float() / scale.float()).nan_to_num(0).round()
        if zero_point.numel() and not bool(((zero_point >= 0) & (zero_point <= 15)).all()):
            raise CheckpointError(f"{self.zeros} / scales are not 4-bit zero points")
        # 256 nibbles of a block are 4 rows of 64 columns, one row behind the other.
        q = fields.unpack(stored.contiguous().view(torch.int32), 4, 4 * k)
        q = q.view(n // 4, k // 64, 4, 64).permute(0, 2, 1, 3).reshape(n, k // 32, 32)
        # Within 32 columns: eights as (2, 4) -> (4, 2), then the whole as (4, 4, 2) transposed.
        q = q.view(n, k // 32, 4, 2, 4).transpose(3, 4).reshape(n, k // 32, 4, 4, 2)
        q = q.transpose(2, 3).reshape(n, k)
        return Codes(q, scale, zero_point.to(torch.uint8))


def interleave(q: Tensor) -> Tensor:
    """uint8 [N, K] -> int32 [N/8, K]: eight rows in one word, row order[i] in nibble i."""
    return ops.pack_fields(q, 4, interleave=True)


def deinterleave(words: Tensor) -> Tensor:
    """int32 [N/8, K] -> uint8 [N, K]: the inverse of ``interleave``."""
    return ops.unpack_fields(words, 4, words.shape[1], interleave=True)


def _width(groups: int, group_size: int) -> int:
    """Padded words of zeros per row in the GEMV layouts."""
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    return -(-groups // (8 * multiple)) * multiple


VERSIONS = {
    "gemm": Gemm(),
    "gemv": Gemv(),
    "gemv_fast": GemvFast(),
    "llm-awq": GemvFast("scaled_zeros"),
}


def parse(config: Mapping) -> Plan:
    """The Plan of a ``quant_method: awq`` config, in AutoAWQ's old and new spelling."""
    version = field(config, "version", str, field(config, "format", str, "gemm")).lower()
    if config.get("backend") == "llm-awq":
        version = "llm-awq"
    if version not in VERSIONS:
        raise UnreadFormatError(f"AWQ version {version!r} is not known; {list(VERSIONS)} are")
    bits = field(config, "bits", int, field(config, "w_bit", int, 4))
    if bits != 4:
        raise UnreadFormatError(f"AWQ with {bits} bits is not supported; 4 is")
    scheme = scheme_or_error(
        bits=bits,
        group_size=field(config, "group_size", int, field(config, "q_group_size", int, 128)),
        symmetric=False,
    )
    return Plan(VERSIONS[version], (Rule("all", "", scheme),))
