"""A choice that is still to be made: what stands in a Recipe until auto.choose has made it."""

from __future__ import annotations

from . import Solver

WIDTHS = (2, 3, 4, 8)  # that are stored in that many bits


class Auto(Solver):
    """``bits`` per weight, scales and zero points included, or the ``kl`` divergence that may not
    be exceeded; neither: the size of the recipe's scheme. ``widths``: what a linear may get."""

    needs_stats = True

    def __init__(
        self, bits: float | None = None, kl: float | None = None, widths: tuple[int, ...] = WIDTHS
    ) -> None:
        self.bits, self.kl, self.widths = bits, kl, tuple(widths)
