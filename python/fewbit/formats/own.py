"""fewbit's own format: the layout of pack-quantized without its limits.

Tensors are those of compressed-tensors pack-quantized. What that cannot say is said here: a short
last group, quantised activations and KV cache, any mixture of schemes, and n columns that stay
float beside the codes (kept int32 [n], ascending; kept_weight float [N, n]). Written only when
asked for, since no other engine reads it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import CheckpointError, UnreadFormatError
from ..scheme import Scheme
from .base import ANY, FLOATS, Plan, Rule, Spec, field, names, scheme_or_error
from .compressed_tensors import PackQuantized

VERSION = 1


class Own(PackQuantized):
    name = "fewbit"
    layout = "fewbit"

    holds = ("order", "input_scale", "input_zero_point", "kept", "kept_weight")
    suffixes = (*PackQuantized.suffixes, *holds)

    def refuse(self, scheme, n, k):
        return None

    def expected(self, n, k, scheme):
        extras = {
            "order": Spec((torch.int32,), (k,), optional=True),
            "input_scale": Spec(FLOATS, (1,), scheme.activations != "static"),
            "input_zero_point": Spec(
                (torch.int8,), (1,), scheme.activations != "static" or scheme.symmetric_activations
            ),
            "kept": Spec((torch.int32,), (ANY,), optional=True),
            "kept_weight": Spec(FLOATS, (n, ANY), optional=True),
        }
        return super().expected(n, k, scheme) | extras

    def pack(self, codes, scheme, **extras):
        tensors = super().pack(codes, scheme, **extras)
        for key in ("order", "kept"):
            if key in extras:
                extras[key] = extras[key].to(torch.int32)
        return tensors | extras

    def extras(self, tensors, scheme):
        extras = {key: tensors[key] for key in self.holds if key in tensors}
        if "order" in extras:
            order = extras["order"] = extras["order"].long()
            if not torch.equal(order.sort().values, torch.arange(len(order))):
                raise CheckpointError("order is not a permutation of the inputs")
        if "kept" in extras or "kept_weight" in extras:
            extras |= _kept(extras, int(tensors["weight_shape"][1]))
        return extras

    def config(self, schemes, ignore):
        by_scheme: dict[Scheme, list[str]] = {}
        for name, scheme in schemes.items():
            by_scheme.setdefault(scheme, []).append(name)
        groups = [{"scheme": s.to_dict(), "modules": members} for s, members in by_scheme.items()]
        return {"quant_method": "fewbit", "version": VERSION, "groups": groups}


def _kept(extras: Mapping[str, torch.Tensor], columns: int) -> dict[str, torch.Tensor]:
    if "kept" not in extras or "kept_weight" not in extras:
        raise CheckpointError("kept and kept_weight belong together")
    kept, weight = extras["kept"].long(), extras["kept_weight"]
    if len(kept) != weight.shape[1]:
        raise CheckpointError(f"kept names {len(kept)} columns, kept_weight has {weight.shape[1]}")
    inside = not len(kept) or (int(kept[0]) >= 0 and int(kept[-1]) < columns)
    if not inside or not bool((kept[1:] > kept[:-1]).all()):
        raise CheckpointError(f"kept must be ascending columns in 0..{columns - 1}")
    return {"kept": kept, "kept_weight": weight}


def parse(config: Mapping) -> Plan:
    """The Plan of a ``quant_method: fewbit`` config."""
    version = field(config, "version", int)
    if version != VERSION:
        raise UnreadFormatError(f"the checkpoint is of version {version}; {VERSION} is read")
    rules = []
    for group in field(config, "groups", list):
        if not isinstance(group, dict) or not isinstance(group.get("scheme"), dict):
            raise CheckpointError(f"groups must hold a scheme and its modules, got {group!r:.80}")
        values = group["scheme"]
        unknown = values.keys() - Scheme.__dataclass_fields__.keys()
        if unknown:
            raise UnreadFormatError(f"schemes have no field {min(unknown)!r:.80}")
        scheme = scheme_or_error(**values)
        rules += [Rule("name", name, scheme) for name in names(group, "modules")]
    return Plan(Own(), tuple(rules))
