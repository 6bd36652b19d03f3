"""Round to nearest: every weight to the closest point of its group's grid."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..scheme import Codes, Scheme
from ..stats import Stats
from . import Solver


class RTN(Solver):
    """s from the range of the group, codes rounded half to even (cpp/include/fewbit/grid.h)."""

    def solve(self, weight: Tensor, scheme: Scheme, stats: Stats | None) -> tuple[Codes, dict]:
        codes = ops.quantize(
            weight, scheme.bits, scheme.group_size, scheme.symmetric, scheme.scale_dtype
        )
        return Codes(*codes), {}
