"""Transforms change weights so that the float model computes the same function.

A transform works in two places, so that a model can be streamed one layer at a time: ``outside``
changes what lies around the decoder layers (embedding, positions, final norm, head) before
calibration starts; ``layer`` changes one decoder layer when calibration has reached it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..families import Family
from ..scheme import Scheme
from ..stats import Stats


@dataclass
class LayerContext:
    """What a transform or a solver may know about the layer in hand.

    ``stats``: by the linear's path inside the layer, of the inputs as they are now; a transform
    that changes a linear's input replaces its entry. ``records``: one dict per decision, shown in
    the Report (path, what was chosen, the curve it was chosen from). ``solver``: what will put the
    layer's linears on their grid (solvers.Solver), for a transform that asks how well.
    """

    index: int
    family: Family
    config: Any
    scheme: Scheme
    stats: dict[str, Stats]
    records: list[dict] = field(default_factory=list)
    solver: Any = None


class Transform:
    """Base class of scale, fold and rotate transforms."""

    needs_stats = False  # True: ``layer`` reads context.stats; the others run before calibration
    recollect = False  # True: ``layer`` leaves context.stats behind; they are collected again
    needs_tokens = False  # True: ``prepare`` reads calibration tokens
    last = False  # True: ``layer`` changes the layer after its linears are packed
    quantizes_activations = False  # True: makes the scheme's activation and KV bits come true
    online = False  # True: leaves something to compute at run time, beside the weights

    def check(self, model: nn.Module, family: Family, scheme: Scheme) -> None:
        """Refuse, before anything is changed, what the transform cannot do to this model."""

    def prepare(
        self, model: nn.Module, family: Family, scheme: Scheme, batches: list[Tensor]
    ) -> None:
        """See the whole float model, and token windows int64 [batch, tokens], before any change."""

    def outside(self, model: nn.Module, family: Family) -> list[dict]:
        """Change the modules around the layers, in place; returns records for the Report."""
        return []

    def carry(self, hidden: Tensor, family: Family) -> Tensor:
        """The original model's residual stream as the transformed model holds it."""
        return hidden

    def layer(self, layer: nn.Module, context: LayerContext) -> None:
        """Change one decoder layer, in place, and keep ``context.stats`` in step."""

    def to_dict(self) -> dict:
        """Name and parameters, enough to repeat the transform."""
        return {"name": type(self).__name__, **vars(self)}
