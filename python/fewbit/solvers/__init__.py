"""Solvers put a float weight on the grid of a scheme; they never change a model."""

from __future__ import annotations

from torch import Tensor, nn

from ..pseudo import packed_module
from ..scheme import Codes, Scheme
from ..stats import Stats


class Solver:
    """Base class: weight [out_features, in_features], scheme and statistics to Codes."""

    needs_stats = False
    needs_cross = False  # True: reads Stats.cross
    compensates = False  # True: moves errors between columns, unlike plain rounding
    leaves: tuple[str, ...] = ()  # what its modules have beside codes, as in formats.base.EXTRAS

    def solve(self, weight: Tensor, scheme: Scheme, stats: Stats | None) -> tuple[Codes, dict]:
        """The codes, and what the Report should know (rung of a fallback, chosen options)."""
        raise NotImplementedError

    def build(
        self, linear: nn.Module, path: str, scheme: Scheme, stats: Stats | None, integer: bool
    ) -> tuple[nn.Module, dict]:
        """The module that replaces ``linear``, found at ``path`` in its layer, and solve's info.

        ``integer``: it runs the scheme's quantised activations itself.
        """
        codes, info = self.solve(linear.weight.detach(), scheme, stats)
        module = packed_module(Codes(*codes), scheme, linear.bias, stats, integer)
        return module, {**info, "module": type(module).__name__} if integer else info

    def to_dict(self) -> dict:
        """Name and parameters, enough to repeat the solve."""
        return {"name": type(self).__name__, **vars(self)}
