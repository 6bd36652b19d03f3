"""GPTQ, 2, 3, 4, 8 bit: v1 (``gptq``) and v2 (``gptq_v2``), which differ in the zero points.

A Linear with N outputs, K inputs, groups of G, b bits:
    qweight int32 [K b / 32, N]           codes, natural order along K
    qzeros  int32 [ceil(K/G), N b / 32]   natural order along N; v1 stores z - 1, v2 stores z
    scales  float16 [ceil(K/G), N]
    g_idx   int32 [K]                     group of each input; k // G unless desc_act

v1's minus one is taken from whole words by some writers and from fields by others. They agree as
long as no z is 0, so v1 with z = 0 is never written; reading adds to whole words, as its main
writer does (2, 4, 8 bit), and to fields modulo 8 for 3 bit.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError, FormatLimitError, UnreadFormatError
from ..scheme import FLOAT_BITS, Codes, Scheme
from . import bits as fields
from .base import Format, Plan, Rule, Spec, exact, field, require_codes, scheme_or_error

BITS = (2, 3, 4, 8)


class Gptq(Format):
    """Version 1 stores ``z - offset`` with offset 1; version 2 has offset 0."""

    name = "gptq"
    offset = 1
    mark = "qweight"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    zeros = "qzeros"

    def size(self, shapes, scheme):
        rows, n = shapes["qweight"]
        return n, rows * fields.WORD // scheme.bits

    def expected(self, n, k, scheme):
        groups = scheme.groups(k)
        return {
            "qweight": Spec((torch.int32,), (fields.words(k, scheme.bits), n)),
            "qzeros": Spec((torch.int32,), (groups, fields.words(n, scheme.bits))),
            "scales": Spec((torch.float16, torch.bfloat16), (groups, n)),
            "g_idx": Spec((torch.int32,), (k,), optional=True),
        }

    def refuse(self, scheme, n, k):
        if scheme.bits not in BITS or scheme.activation_bits < FLOAT_BITS:
            return f"GPTQ stores 2, 3, 4 or 8-bit weights with float activations, not {scheme}"
        if n % fields.WORD or k % fields.WORD:
            return f"GPTQ needs outputs and inputs in multiples of 32, not {n} x {k}"
        return None

    def pack(self, codes, scheme, **extras):
        n, k = codes.q.shape
        require_codes(self, codes, scheme, extras)
        if self.offset and codes.zero_point.numel() and int(codes.zero_point.min()) == 0:
            raise FormatLimitError(
                "GPTQ v1 cannot hold a zero point of 0, its stored value would borrow from its "
                "neighbours; write gptq_v2, awq or compressed-tensors"
            )
        zeros = (codes.zero_point - self.offset).T
        return {
            "qweight": fields.pack(codes.q, scheme.bits).T.contiguous(),
            "qzeros": fields.pack(zeros, scheme.bits),
            "scales": exact(codes.scale, torch.float16, "GPTQ").T.contiguous(),
            "g_idx": trivial_groups(k, scheme),
        }

    def unpack(self, tensors, scheme):
        k = tensors["qweight"].shape[0] * fields.WORD // scheme.bits
        n = tensors["qweight"].shape[1]
        q = fields.unpack(tensors["qweight"].T, scheme.bits, k)
        order = column_order(tensors.get("g_idx"), k, scheme)
        if order is not None:
            q = q[:, order]
        zero_point = self._zeros(tensors["qzeros"], scheme, n).T.contiguous()
        return Codes(q, tensors["scales"].T.contiguous(), zero_point)

    def extras(self, tensors, scheme):
        """``order`` int64 [K]: column j of the codes is input order[j] (desc_act files only)."""
        k = tensors["qweight"].shape[0] * fields.WORD // scheme.bits
        order = column_order(tensors.get("g_idx"), k, scheme)
        return {} if order is None else {"order": order}

    def symmetric(self, tensors, scheme):
        stored = tensors["qzeros"]
        n = stored.shape[1] * fields.WORD // scheme.bits
        raw = fields.unpack(stored, scheme.bits, n)
        return scheme.symmetric or bool((raw == (1 << (scheme.bits - 1)) - self.offset).all())

    def _zeros(self, stored: Tensor, scheme: Scheme, n: int) -> Tensor:
        """uint8 [groups, N]; a symmetric file with the other version's label is put right."""
        bits, offset = scheme.bits, self.offset
        middle, raw = 1 << (bits - 1), fields.unpack(stored, bits, n)
        if scheme.symmetric and raw.numel():
            if bool((raw == middle - 1 + offset).all()):
                offset = 1 - offset
                warnings.warn(
                    f"the checkpoint says {self.name}, but its symmetric zero points are those of "
                    f"{'gptq' if offset else 'gptq_v2'}; they are read as such",
                    stacklevel=2,
                )
            elif not bool((raw == middle - offset).all()):
                raise CheckpointError(
                    f"the checkpoint says sym, but its zero points are not all {middle}"
                )
        if not offset:
            return raw
        if bits == 3:
            return (raw + 1) & 7
        one = sum(1 << at for at in range(0, 32, bits))
        return fields.unpack((stored.to(torch.int64) + one).to(torch.int32), bits, n)

    def config(self, schemes, ignore):
        main = Counter(schemes.values()).most_common(1)[0][0]
        dynamic = {f"-:{re.escape(name)}$": {} for name in ignore if name != "lm_head"}
        for name, scheme in schemes.items():
            if scheme != main:
                values = {"bits": scheme.bits, "group_size": scheme.group_size}
                dynamic[f"+:{re.escape(name)}$"] = values | {"sym": scheme.symmetric}
        return {
            "quant_method": "gptq",
            "bits": main.bits,
            "group_size": main.group_size,
            "desc_act": False,
            "sym": main.symmetric,
            "lm_head": "lm_head" in schemes,
            "checkpoint_format": self.name,
            "format": self.name,
            "pack_dtype": "int32",
            "true_sequential": True,
            "damp_percent": 0.01,
            "dynamic": dynamic,
            "meta": {"quantizer": ["fewbit"]},
        }


class GptqV2(Gptq):
    name = "gptq_v2"
    offset = 0


def trivial_groups(k: int, scheme: Scheme) -> Tensor:
    """g_idx of groups in column order, int32 [K]."""
    return (torch.arange(k) // scheme.group_of(k)).to(torch.int32)


def column_order(g_idx: Tensor | None, k: int, scheme: Scheme) -> Tensor | None:
    """The permutation that makes the groups of ``g_idx`` contiguous; None when they are.

    Raises CheckpointError when the groups are not those of the scheme: out of range, or of other
    sizes than group_size.
    """
    if g_idx is None:
        return None
    trivial = trivial_groups(k, scheme)
    if torch.equal(g_idx, trivial):
        return None
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order], trivial):
        raise CheckpointError(f"g_idx does not put {k} inputs into groups of {scheme.group_size}")
    return order


def parse(config: Mapping) -> Plan:
    """The Plan of a ``quant_method: gptq`` config (AutoGPTQ, GPTQModel, optimum)."""
    label = field(config, "checkpoint_format", (str, type(None)), None)
    label = label or field(config, "format", (str, type(None)), None) or "gptq"
    formats = {format.name: format for format in (Gptq(), GptqV2())}
    if field(config, "is_marlin_format", bool, False) or label not in formats:
        raise UnreadFormatError(f"GPTQ format {label!r} is not supported; {list(formats)} are")
    if config.get("rotation"):
        raise UnreadFormatError("the checkpoint needs an online rotation, which fewbit lacks")
    base = {
        "bits": field(config, "bits", int),
        "group_size": field(config, "group_size", int, 128),
        "symmetric": field(config, "sym", bool, False),
    }
    rules = []
    dynamic = field(config, "dynamic", (dict, type(None)), None) or {}
    for pattern, changes in dynamic.items():
        if pattern.startswith("-:"):
            continue
        if not isinstance(changes, dict):
            raise CheckpointError(f"dynamic[{pattern!r:.80}] must be an object")
        values = {
            "bits": field(changes, "bits", int, base["bits"]),
            "group_size": field(changes, "group_size", int, base["group_size"]),
            "symmetric": field(changes, "sym", bool, base["symmetric"]),
        }
        rules.append(Rule("regex", pattern.removeprefix("+:"), _scheme(values)))
    rules.append(Rule("all", "", _scheme(base)))
    return Plan(formats[label], tuple(rules))


def _scheme(values: dict) -> Scheme:
    scheme = scheme_or_error(**values)
    if scheme.bits not in BITS:
        raise UnreadFormatError(f"GPTQ with {scheme.bits} bits is not supported; {BITS} are")
    return scheme
