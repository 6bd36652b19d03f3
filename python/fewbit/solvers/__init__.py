"""Solvers put a float weight on the grid of a scheme; they never change a model."""

from __future__ import annotations

from torch import Tensor

from ..scheme import Codes, Scheme
from ..stats import Stats


class Solver:
    """Base class: weight [out_features, in_features], scheme and statistics to Codes."""

    needs_stats = False
    needs_cross = False  # True: reads Stats.cross

    def solve(self, weight: Tensor, scheme: Scheme, stats: Stats | None) -> tuple[Codes, dict]:
        """The codes, and what the Report should know (rung of a fallback, chosen options)."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        """Name and parameters, enough to repeat the solve."""
        return {"name": type(self).__name__, **vars(self)}
