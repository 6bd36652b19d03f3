"""Inputs that hurt, shared by the tests of the quantisation ops and by their benchmarks."""

import torch

BITS = [2, 3, 4, 5, 8]
PACKED_BITS = [2, 3, 4, 8]
# (rows, columns, group): single element, ragged last group, vector width +-1, panel +-1, a row
SHAPES = [
    (1, 1, -1),
    (3, 7, 5),
    (15, 31, 8),
    (16, 32, 32),
    (17, 33, 16),
    (33, 129, 128),
    (64, 256, 128),
    (2, 300, 37),
    (0, 8, 4),
    (5, 0, 4),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def hard_weight(rows: int, columns: int, dtype=torch.float32) -> torch.Tensor:
    """Normal weights with rows that break naive code: zero, constant, one-sided, huge, tiny."""
    w = torch.randn(rows, columns)
    special = [
        torch.zeros(columns),
        torch.full((columns,), 0.5),
        torch.rand(columns) + 1.0,
        -torch.rand(columns) - 1.0,
        torch.randn(columns) * 1e-6,
        torch.randn(columns) * 1e4,
    ]
    for i, row in enumerate(special[: max(rows - 1, 0)]):
        w[i + 1] = row
    return w.to(dtype)
