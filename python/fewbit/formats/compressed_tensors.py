"""compressed-tensors: ``pack-quantized`` (weight only) and ``int-quantized`` (8-bit weights).

pack-quantized of a Linear with N outputs, K inputs, groups of G, b bits:
    weight_packed      int32 [N, ceil(K b / 32)]    codes q, natural order along K
    weight_scale       float [N, K / G]             [N, 1] for whole rows ("channel")
    weight_zero_point  int32 [ceil(N b / 32), K/G]  z, natural order along N; asymmetric only
    weight_shape       int64 [2] = (N, K)
int-quantized:
    weight int8 [N, K] = q - 128; weight_scale float [N, 1]; for static activations also
    input_scale float [1] and, when those are asymmetric, input_zero_point int8 [1]

For 3, 5, 6, 7 bits files of compressed-tensors up to 0.17 hold floor(32 / b) fields a word under
the same name; they are told apart by the word count, and by ``version`` where both counts agree.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError, FormatLimitError, UnreadFormatError
from ..scheme import FLOAT_BITS, Codes, Scheme
from . import bits as fields
from .base import (
    FLOATS,
    Format,
    Plan,
    Rule,
    Spec,
    field,
    groups_fit,
    names,
    require_codes,
    scheme_or_error,
)

WRITTEN_AS = "0.20.0"  # the version whose keys and layouts are written
DENSE_SINCE = (0, 18)


class PackQuantized(Format):
    """``padded`` decides 3, 5, 6, 7-bit files whose word counts fit both layouts."""

    name = "compressed-tensors"
    layout = "pack-quantized"
    mark = "weight_packed"
    suffixes = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    zeros = "weight_zero_point"

    def __init__(self, padded: bool = False) -> None:
        self.padded = padded

    def size(self, shapes, scheme):
        return shapes[self.mark][0], shapes[self.mark][1] * (fields.WORD // scheme.bits)

    def expected(self, n, k, scheme):
        groups = scheme.groups(k)
        spec = {
            "weight_packed": Spec((torch.int32,), (n, fields.words(k, scheme.bits))),
            "weight_scale": Spec(FLOATS, (n, groups)),
            "weight_shape": Spec((torch.int64, torch.int32), (2,)),
        }
        if not scheme.symmetric:
            shape = (fields.words(n, scheme.bits), groups)
            spec["weight_zero_point"] = Spec((torch.int32,), shape)
        return spec

    def refuse(self, scheme, n, k):
        if scheme.activation_bits < FLOAT_BITS:
            return f"pack-quantized is weight only, {scheme} quantises activations"
        if not groups_fit(scheme, k):
            return f"{k} inputs are not a multiple of group_size {scheme.group_size}"
        return None

    def pack(self, codes, scheme, **extras):
        n, k = codes.q.shape
        require_codes(self, codes, scheme, extras)
        tensors = {
            "weight_packed": fields.pack(codes.q, scheme.bits),
            "weight_scale": codes.scale.contiguous(),
            "weight_shape": torch.tensor([n, k]),
        }
        if not scheme.symmetric:
            zeros = fields.pack(codes.zero_point.T, scheme.bits)
            tensors["weight_zero_point"] = zeros.T.contiguous()
        return tensors

    def unpack(self, tensors, scheme):
        n, k = (int(v) for v in tensors["weight_shape"].tolist())
        packed, scale = tensors["weight_packed"], tensors["weight_scale"]
        if n != len(packed) or k < 0 or scheme.groups(k) != scale.shape[1]:
            raise CheckpointError(
                f"weight_shape says {n} x {k}, but weight_packed is {list(packed.shape)} and "
                f"weight_scale {list(scale.shape)}"
            )
        q = self._unpack(packed, scheme.bits, k)
        if scheme.symmetric:
            zero_point = torch.full(scale.shape, 1 << (scheme.bits - 1), dtype=torch.uint8)
        else:
            zero_point = self._unpack(tensors["weight_zero_point"].T, scheme.bits, n).T.contiguous()
        return Codes(q, scale, zero_point)

    def symmetric(self, tensors, scheme):
        if scheme.symmetric:
            return True
        if "weight_zero_point" not in tensors:
            raise CheckpointError(f"{scheme} is asymmetric, but there is no weight_zero_point")
        n = len(tensors["weight_scale"])  # the last word may have fields beyond it
        zeros = self._unpack(tensors["weight_zero_point"].T, scheme.bits, n)
        return bool((zeros == 1 << (scheme.bits - 1)).all())

    def _unpack(self, packed: Tensor, bits: int, elements: int) -> Tensor:
        dense, padded = fields.words(elements, bits), fields.words_padded(elements, bits)
        if packed.shape[-1] not in (dense, padded):
            raise CheckpointError(
                f"{elements} {bits}-bit codes need {dense} words, or {padded} in the older layout; "
                f"the file has {packed.shape[-1]}"
            )
        if packed.shape[-1] != dense or (dense == padded and self.padded and fields.WORD % bits):
            return fields.unpack_padded(packed, bits, elements)
        return fields.unpack(packed, bits, elements)

    def check(self, tensors, scheme, n, k, name="weight"):
        # An older file's word counts are put right before they are compared.
        tensors, want = dict(tensors), self.expected(n, k, scheme)
        for suffix, dim, elements in (("weight_packed", 1, k), ("weight_zero_point", 0, n)):
            tensor = tensors.get(suffix)
            if tensor is None or suffix not in want or tensor.dim() != 2:
                continue
            if tensor.shape[dim] == fields.words_padded(elements, scheme.bits):
                shape = list(tensor.shape)
                shape[dim] = fields.words(elements, scheme.bits)
                tensors[suffix] = torch.empty(shape, dtype=tensor.dtype, device="meta")
        super().check(tensors, scheme, n, k, name)

    def config(self, schemes, ignore):
        by_scheme: dict[Scheme, list[str]] = {}
        for name, scheme in schemes.items():
            by_scheme.setdefault(scheme, []).append(name)
        groups = {}
        # The largest group comes first: some engines read group_0 only.
        for scheme, members in sorted(by_scheme.items(), key=lambda item: -len(item[1])):
            groups[f"group_{len(groups)}"] = {
                "targets": ["Linear"] if len(by_scheme) == 1 else members,
                "format": self.layout,
                "weights": _weights(scheme),
                "input_activations": self._activations(scheme),
                "output_activations": None,
            }
        return {
            "quant_method": "compressed-tensors",
            "version": WRITTEN_AS,
            "format": self.layout,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(ignore),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "sparsity_config": {},
            "transform_config": {},
        }

    def _activations(self, scheme: Scheme) -> dict | None:
        return None


class IntQuantized(PackQuantized):
    """8-bit symmetric weights, one scale a row; activations dynamic per token, static, or float."""

    name = "int-quantized"
    layout = "int-quantized"
    mark = "weight_scale"
    suffixes = ("weight", "weight_scale", "input_scale", "input_zero_point")
    holds = ("input_scale", "input_zero_point")
    zeros = ""

    def size(self, shapes, scheme):
        return shapes["weight"]

    def expected(self, n, k, scheme):
        spec = {
            "weight": Spec((torch.int8,), (n, k)),
            "weight_scale": Spec(FLOATS, (n, 1)),
        }
        if scheme.activations == "static":
            spec["input_scale"] = Spec(FLOATS, (1,))
            optional = scheme.symmetric_activations
            spec["input_zero_point"] = Spec((torch.int8,), (1,), optional)
        return spec

    def refuse(self, scheme, n, k):
        if scheme.bits != 8 or not scheme.symmetric or scheme.group_size != -1:
            return f"int-quantized needs 8-bit symmetric weights with one scale a row, not {scheme}"
        if scheme.activation_bits not in (8, FLOAT_BITS):
            return f"int-quantized needs 8-bit activations, not {scheme.activation_bits}"
        if scheme.activation_bits == 8 and scheme.activations == "tensor":
            return "engines read activations per token or static, not one dynamic scale a tensor"
        return None

    def pack(self, codes, scheme, **extras):
        require_codes(self, codes, scheme, extras)
        weight = (codes.q ^ 0x80).view(torch.int8)  # subtracts 128 modulo 256
        tensors = {"weight": weight, "weight_scale": codes.scale.contiguous()}
        if scheme.activation_bits == 8 and scheme.activations == "static":
            needed = ("input_scale", "input_zero_point")[: 2 - scheme.symmetric_activations]
            if not extras.keys() >= set(needed):
                raise FormatLimitError(f"static activations need {' and '.join(needed)}")
            tensors |= {key: value.reshape(1) for key, value in extras.items()}
        return tensors

    def unpack(self, tensors, scheme):
        weight, scale = tensors["weight"], tensors["weight_scale"].reshape(-1, 1)
        if len(scale) == 1:  # one scale for the tensor
            scale = scale.expand(len(weight), 1)
        zero_point = torch.full((len(weight), 1), 128, dtype=torch.uint8)
        return Codes(weight.view(torch.uint8) ^ 0x80, scale.contiguous(), zero_point)

    def extras(self, tensors, scheme):
        extras = {key: tensors[key].reshape(1) for key in self.holds if key in tensors}
        if scheme.symmetric_activations and int(extras.pop("input_zero_point", 0)) != 0:
            raise CheckpointError("input_zero_point must be 0 for symmetric activations")
        return extras

    def check(self, tensors, scheme, n, k, name="weight"):
        # One scale for the tensor is stored as [1]; it stands for [n, 1].
        tensors = dict(tensors)
        scale = tensors.get("weight_scale")
        if scale is not None and tuple(scale.shape) in ((1,), (1, 1), (n,)):
            tensors["weight_scale"] = torch.empty(n, 1, dtype=scale.dtype, device="meta")
        for key in ("input_scale", "input_zero_point"):
            if key in tensors and tensors[key].dim() == 0:
                tensors[key] = torch.empty(1, dtype=tensors[key].dtype, device="meta")
        Format.check(self, tensors, scheme, n, k, name)

    def _activations(self, scheme):
        if scheme.activation_bits == FLOAT_BITS:
            return None
        token = scheme.activations == "token"
        return {
            "num_bits": 8,
            "type": "int",
            "symmetric": scheme.symmetric_activations,
            "strategy": "token" if token else "tensor",
            "dynamic": token,
        }


def per_token(scheme: Scheme) -> bool:
    """8-bit activations on a symmetric grid with a dynamic scale a token."""
    return (
        scheme.activation_bits == 8
        and scheme.activations == "token"
        and scheme.symmetric_activations
    )


def _weights(scheme: Scheme) -> dict:
    rows = scheme.group_size == -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if rows else "group",
        "group_size": None if rows else scheme.group_size,
        "dynamic": False,
    }


def parse(config: Mapping) -> Plan:
    """The Plan of a ``quant_method: compressed-tensors`` config.

    Refuses by name what fewbit cannot run: float types, sparsity, online transforms, and groups
    in different layouts.
    """
    groups = field(config, "config_groups", dict)
    if not 0 < len(groups) <= 10_000:
        raise CheckpointError(f"config_groups must hold 1 to 10000 groups, got {len(groups)}")
    if (config.get("sparsity_config") or {}) not in ({}, {"format": "dense"}):
        raise UnreadFormatError("sparse compressed-tensors checkpoints are not supported")
    if config.get("transform_config"):
        raise UnreadFormatError(
            "the checkpoint needs online transforms (transform_config), which fewbit does not run"
        )
    top = field(config, "format", (str, type(None)), None)
    layouts, rules = set(), []
    for key, group in groups.items():
        if not isinstance(group, dict):
            raise CheckpointError(f"config_groups.{key} must be an object, got {group!r:.80}")
        layouts.add(field(group, "format", (str, type(None)), None) or top)
        scheme = _scheme(group)
        for target in names(group, "targets"):
            rules.append(_rule(target, scheme))
    if len(layouts) != 1:
        raise UnreadFormatError(f"layouts {sorted(map(str, layouts))} are mixed in one checkpoint")
    # Exact names and patterns go before class names, as in compressed-tensors.
    rules.sort(key=lambda rule: ("name", "regex", "all").index(rule.kind))
    notes = ("the KV cache scheme of the checkpoint is not applied",) * bool(
        config.get("kv_cache_scheme")
    )
    return Plan(_format(layouts.pop(), config), tuple(rules), notes)


def _format(layout: str | None, config: Mapping) -> Format:
    if layout == "pack-quantized":
        version = field(config, "version", (str, type(None)), None) or WRITTEN_AS
        numbers = tuple(int(v) for v in version.split(".")[:2] if v.isascii() and v.isdigit())
        return PackQuantized(padded=len(numbers) == 2 and numbers < DENSE_SINCE)
    if layout in ("int-quantized", "naive-quantized"):
        return IntQuantized()
    raise UnreadFormatError(
        f"compressed-tensors format {layout!r} is not supported; pack-quantized, int-quantized and "
        "naive-quantized are"
    )


def _scheme(group: Mapping) -> Scheme:
    weights = field(group, "weights", dict)
    kind = field(weights, "type", str, "int")
    if kind != "int":
        raise UnreadFormatError(f"weights of type {kind!r} are not supported; only 'int' is")
    strategy = field(weights, "strategy", (str, type(None)), None)
    size = field(weights, "group_size", (int, type(None)), None)
    if strategy not in ("channel", "group", "tensor", None):
        raise UnreadFormatError(f"weight strategy {strategy!r} is not supported")
    grouped = strategy == "group" or (strategy is None and size not in (None, -1))
    if grouped and size is None:
        raise CheckpointError("weight strategy 'group' needs a group_size")
    values = {
        "bits": field(weights, "num_bits", int, 8),
        "group_size": size if grouped else -1,
        "symmetric": field(weights, "symmetric", bool, True),
    }
    inputs = field(group, "input_activations", (dict, type(None)), None)
    if inputs:
        if field(inputs, "type", str, "int") != "int" or field(inputs, "num_bits", int, 8) != 8:
            raise UnreadFormatError("only 8-bit integer activations are supported")
        values["activation_bits"] = 8
        values["activations"] = _activation_mode(inputs)
        values["symmetric_activations"] = field(inputs, "symmetric", bool, True)
    return scheme_or_error(**values)


def _activation_mode(inputs: Mapping) -> str:
    dynamic = field(inputs, "dynamic", bool, False)
    strategy = field(inputs, "strategy", (str, type(None)), None) or ("tensor", "token")[dynamic]
    modes = {(True, "token"): "token", (True, "tensor"): "tensor", (False, "tensor"): "static"}
    if (dynamic, strategy) not in modes:
        kind = "dynamic" if dynamic else "static"
        raise UnreadFormatError(f"{kind} activations with strategy {strategy!r} are not supported")
    return modes[dynamic, strategy]


def _rule(target: str, scheme: Scheme) -> Rule:
    if target.startswith("re:"):
        return Rule("regex", target[3:], scheme)
    return Rule("all" if target == "Linear" else "name", target, scheme)
