"""G += X^T X, each entry one chain over tokens in order."""

import pytest
import torch

from fewbit import ops
from grids import DTYPES

REALS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}  # unit roundoff u


def gram_of(x, *cuts, real=torch.float32):
    g = torch.zeros(x.shape[1], x.shape[1], dtype=real)
    for part in torch.tensor_split(x, cuts):
        ops.gram(part, g)
    return g


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, channels", [(1, 1), (3, 15), (40, 17), (300, 33), (9, 100), (0, 4)]
)
def test_matches_float64(isa, tokens, channels, dtype, real):
    x = torch.randn(tokens, channels).to(dtype)
    g, d = gram_of(x, real=real), x.double()
    # Standard forward bound of a sum of n products: n u / (1 - n u) * sum |a||b|; the reference is
    # such a sum too.
    u = tokens * (REALS[real] + REALS[torch.float64])
    bound = u / (1 - u) * (d.abs().T @ d.abs())
    assert bool(((g.double() - d.T @ d).abs() <= bound).all())
    assert torch.equal(g, g.T)


@pytest.mark.parametrize("real", REALS)
def test_independent_of_batching_and_threads(isa, real):
    x = torch.randn(600, 70)
    whole = gram_of(x, real=real)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(gram_of(x, 1, 17, 300, real=real), whole)
    torch.set_num_threads(before)


@pytest.mark.parametrize("real", REALS)
def test_same_bits_on_every_isa(real):
    from fewbit import _C

    x, results, before = torch.randn(50, 40), [], _C.isa()
    for name in _C.available_isas():
        _C.set_isa(name)
        results.append(gram_of(x, real=real))
    _C.set_isa(before)
    assert all(torch.equal(results[0], other) for other in results)


def test_is_a_proper_torch_op():
    torch.library.opcheck(torch.ops.fewbit.gram.default, (torch.randn(5, 6), torch.zeros(6, 6)))


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"g must have shape \[4, 4\], got \[4, 3\]"):
        ops.gram(torch.randn(2, 4), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="g must be float32 or float64, got Half"):
        ops.gram(torch.randn(2, 4), torch.zeros(4, 4).half())
