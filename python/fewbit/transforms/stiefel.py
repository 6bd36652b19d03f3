"""Orthogonal matrices under optimisation.

Each step keeps R orthogonal by the Cayley transform R <- (I + t/2 A)^-1 (I - t/2 A) R of a
skew-symmetric A. "cayley-sgd" takes A from the momentum of the Euclidean gradient (J. Li et al.,
Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform, 2020);
"cayley-adam" scales the entries of A by their own second moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

OPTIMIZERS = ("cayley-adam", "cayley-sgd")


class Stiefel:
    """An orthogonal matrix under optimisation, with the state of its optimiser."""

    def __init__(self, start: Tensor, optimizer: str) -> None:
        self.value = start.to(torch.float32).clone().requires_grad_()
        self.optimizer = optimizer
        self.momentum = torch.zeros_like(self.value)
        self.second = torch.zeros_like(self.value)
        self.steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        r, g = self.value, self.value.grad
        self.steps += 1
        if self.optimizer == "cayley-sgd":
            self.momentum.mul_(0.9).add_(g)
            m = self.momentum
            half = m @ r.T - 0.5 * r @ (r.T @ m @ r.T)
            a = half - half.T
            self.momentum = a @ r  # projected, so that it stays a tangent
            rate = min(lr, 1.0 / (float(torch.linalg.matrix_norm(a, 1)) + 1e-8))
        else:
            a = g @ r.T
            a = a - a.T
            self.momentum.mul_(0.9).add_(a, alpha=0.1)
            self.second.mul_(0.99).addcmul_(a, a, value=0.01)
            a = self.momentum / (1 - 0.9**self.steps)
            a = a / ((self.second / (1 - 0.99**self.steps)).sqrt() + 1e-12)
            rate = lr  # every entry of the skew matrix moves by about lr, and a stays skew
        eye = torch.eye(len(r), device=r.device)
        self.value.copy_(torch.linalg.solve(eye + rate / 2 * a, (eye - rate / 2 * a) @ r))
        self.value.grad = None

    def result(self) -> Tensor:
        """The closest orthogonal matrix in float64, on the CPU: rounding has drifted by a few ulp.
        """
        u, _, v = torch.linalg.svd(self.value.detach().cpu().to(torch.float64))
        return u @ v
