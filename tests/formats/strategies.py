"""Random weights on a grid, for every test of a format."""

import torch

from fewbit.scheme import Codes, Scheme


def random_codes(n, k, scheme: Scheme, seed=0, dtype=torch.float16, low=0) -> Codes:
    """Codes that use the whole grid; zero points from ``low`` on."""
    g = torch.Generator().manual_seed(seed)
    top = 1 << scheme.bits
    q = torch.randint(0, top, (n, k), generator=g, dtype=torch.uint8)
    shape = (n, scheme.groups(k))
    scale = (torch.rand(shape, generator=g) * 0.1 + 0.001).to(dtype)
    zero = torch.randint(low, top, shape, generator=g, dtype=torch.uint8)
    if scheme.symmetric:
        zero = torch.full(shape, top // 2, dtype=torch.uint8)
    return Codes(q, scale, zero)


def same(a: Codes, b: Codes) -> bool:
    """Equal in values, shapes and dtypes."""
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def dequantize(codes: Codes, scheme: Scheme) -> torch.Tensor:
    """(q - z) * s in float64: exact for 16-bit scales."""
    k = codes.q.shape[1]
    group = scheme.group_of(k)
    scale = codes.scale.double().repeat_interleave(group, 1)[:, :k]
    zero = codes.zero_point.double().repeat_interleave(group, 1)[:, :k]
    return (codes.q.double() - zero) * scale
