"""GPTQ and FOEM as published, in plain float64 torch: what the solver and the pipeline are compared
with."""

import torch

from fewbit import reference


def gptq(w, h, bits, group_size, symmetric, scale_dtype="float16", order=None, beta=0.0):
    """Codes uint8, scales and zero points of ``w`` [rows, columns] for a damped Hessian ``h``.

    Frantar et al. 2022, algorithm 1, one column at a time: e_j = (w_j - q_j) / U_jj,
    w_k -= e_j U_jk with H^-1 = U^T U. A group's grid is fitted to its updated weights when its
    first column is reached; with an ``order`` to the weights as they come, beforehand.

    ``beta`` above 0 is FOEM's first-order term (X. Zheng et al. 2025, without that of GPTAQ): where
    a weight has been moved away from the float weight f, the loss has a gradient, so that e_j =
    ((w_j - q_j) - beta (w_j - f_j)) / U_jj, and beta (w - f) of the next column is taken back.
    """
    columns = w.shape[1]
    group = columns if group_size == -1 else group_size
    groups = -(-columns // group)
    at = torch.arange(columns) if order is None else order
    u = torch.linalg.cholesky(torch.linalg.inv(h.double()[at][:, at]), upper=True)
    scale, zero_point = torch.zeros(2, len(w), groups, dtype=torch.float64)
    grid = (bits, -1, symmetric, scale_dtype)

    def fit(g, part):
        s, z = reference.fit_grid(part.float(), *grid)
        scale[:, g], zero_point[:, g] = s[:, 0], z[:, 0]

    if order is not None:
        for g in range(groups):
            fit(g, w[:, g * group : (g + 1) * group])
    w, q = w.double()[:, at], torch.zeros(w.shape, dtype=torch.uint8)
    f = w.clone()
    for k, column in enumerate(at.tolist()):
        g = column // group
        if order is None and column % group == 0:
            fit(g, w[:, k : k + group])
        s, z = scale[:, g], zero_point[:, g]
        code = ((w[:, k] / s).round() + z).clamp(0, 2**bits - 1)
        q[:, column] = code.to(torch.uint8)
        e = ((w[:, k] - (code - z) * s) - beta * (w[:, k] - f[:, k])) / u[k, k]
        w[:, k:] -= e[:, None] * u[k, k:]
        w[:, k + 1 : k + 2] -= beta * (w - f)[:, k + 1 : k + 2]
    return q, scale, zero_point.to(torch.uint8)


def dequantized(q, scale, zero_point, group_size):
    """(q - z) s, float64."""
    group = q.shape[1] if group_size == -1 else group_size
    at = torch.arange(q.shape[1]) // group
    return (q.double() - zero_point.double()[:, at]) * scale.double()[:, at]
