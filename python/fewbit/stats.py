"""What calibration keeps of one linear's input, and how it follows a transform in closed form."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .reproducible import total

EXACT_COLUMNS = 1024  # up to here float64 sums and factors cost little


def sum_type(columns: int, device: torch.device | None = None) -> torch.dtype:
    """The type of [columns, columns] statistics: float64 where that is cheap, else float32."""
    exact = columns <= EXACT_COLUMNS and (device is None or device.type != "mps")
    return torch.float64 if exact else torch.float32


@dataclass
class Stats:
    """Sums over the real (unmasked) tokens that entered a linear with ``in_features`` = K inputs.

    ``tokens``: how many; ``sum_abs`` and ``max_abs`` [K] float32 of the token values; ``gram``
    [K, K] of ``sum_type(K)``, G = X^T X. G is sufficient for every quadratic loss: with dW = W' - W
    the output error of a layer is ||X dW^T||^2 = tr(dW G dW^T). ``cross`` [K, K], of the same type,
    for solvers that ask for it: (X_float - X)^T X, with the inputs that the linear gets in the
    float model. ``routed``: the linear is an expert, which sees only the tokens that its router
    sends. ``sample`` [at most 256, K] float32: inputs at even distances through the calibration,
    for what no sum can tell.
    """

    tokens: int
    sum_abs: Tensor
    max_abs: Tensor
    gram: Tensor | None
    cross: Tensor | None = None
    routed: bool = False
    sample: Tensor | None = None

    @property
    def mean_abs(self) -> Tensor:
        """Mean of |x| over tokens, [K]."""
        return self.sum_abs / max(self.tokens, 1)

    def scaled(self, s: Tensor) -> Stats:
        """The statistics of x / s, for a positive ``s`` [K]: S^-1 G S^-1."""
        gram, cross = (  # one copy, not two: this may be the largest tensor of a run
            None if m is None else (m / s[:, None]).div_(s) for m in (self.gram, self.cross)
        )
        sample = None if self.sample is None else self.sample / s
        return replace(
            self, sum_abs=self.sum_abs / s, max_abs=self.max_abs / s, gram=gram, cross=cross,
            sample=sample,
        )

    def output_loss(self, dw: Tensor) -> float:
        """||X dW^T||^2 / tokens for a weight change ``dw`` [N, K]: mean squared row error."""
        dw = dw.to(self.gram.dtype)
        return total((dw @ self.gram) * dw) / max(self.tokens, 1)

    def output_energy(self, w: Tensor) -> float:
        """||X W^T||^2 / tokens: what ``output_loss`` is relative to."""
        return self.output_loss(w)
