"""LLM.int8() (T. Dettmers et al., 2022): int8 products, with outlier columns found at run time."""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedError, UsageError
from ..formats.compressed_tensors import per_token
from ..linear import MixedInt8Linear
from ..scheme import Codes, Scheme
from ..stats import Stats
from .rtn import RTN


class LLMInt8(RTN):
    """Rounds to nearest; columns of the input with some |x| >= ``threshold`` stay float."""

    leaves = ("threshold",)

    def __init__(self, threshold: float = 6.0) -> None:
        if not threshold > 0:
            raise UsageError(f"threshold must be above 0, got {threshold}")
        self.threshold = float(threshold)

    def build(
        self, linear: nn.Module, path: str, scheme: Scheme, stats: Stats | None, integer: bool
    ) -> tuple[nn.Module, dict]:
        if not integer or scheme.bits != 8 or not scheme.symmetric or not per_token(scheme):
            raise UnsupportedError(f"llm-int8 is w8a8 with scales per token, not {scheme}")
        codes, info = self.solve(linear.weight.detach(), scheme, stats)
        module = MixedInt8Linear(Codes(*codes), scheme, linear.bias, self.threshold)
        return module, {**info, "module": type(module).__name__}
