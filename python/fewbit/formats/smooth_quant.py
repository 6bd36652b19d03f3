"""LMDeploy's ``smooth_quant``: int8 weights by row, activations dynamic per token.

A Linear with N outputs and K inputs: weight int8 [N, K], scale float32 [N, 1]. The same numbers as
compressed-tensors ``int-quantized``, under other names; only LMDeploy's PyTorch engine reads it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import UnreadFormatError
from ..scheme import Scheme
from .base import Format, Plan, Rule, Spec, exact, field, only_scheme
from .compressed_tensors import IntQuantized, per_token


class SmoothQuant(IntQuantized):
    name = "smooth_quant"
    layout = "smooth_quant"
    mark = "scale"
    suffixes = ("weight", "scale")
    holds = ()

    def expected(self, n, k, scheme):
        return {"weight": Spec((torch.int8,), (n, k)), "scale": Spec((torch.float32,), (n, 1))}

    def refuse(self, scheme, n, k):
        if not per_token(scheme):
            return f"smooth_quant means symmetric 8-bit activations scaled per token, not {scheme}"
        return super().refuse(scheme, n, k)

    def pack(self, codes, scheme, **extras):
        tensors = super().pack(codes, scheme, **extras)
        tensors["scale"] = exact(tensors.pop("weight_scale"), torch.float32, self.layout)
        return tensors

    def unpack(self, tensors, scheme):
        tensors = {"weight": tensors["weight"], "weight_scale": tensors["scale"]}
        return super().unpack(tensors, scheme)

    def extras(self, tensors, scheme):
        return {}

    def check(self, tensors, scheme, n, k, name="weight"):
        Format.check(self, tensors, scheme, n, k, name)

    def config(self, schemes, ignore):
        only_scheme(schemes, "smooth_quant")
        return {
            "quant_method": "smooth_quant",
            "quant_dtype": "int8",
            "modules_to_not_convert": list(ignore),
        }


def parse(config: Mapping) -> Plan:
    """The Plan of a ``quant_method: smooth_quant`` config."""
    dtype = field(config, "quant_dtype", str, "int8")
    if dtype != "int8":
        raise UnreadFormatError(f"smooth_quant with {dtype!r} is not supported; 'int8' is")
    scheme = Scheme(8, -1, True, "float32", activation_bits=8)
    return Plan(SmoothQuant(), (Rule("all", "", scheme),))
