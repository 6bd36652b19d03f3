"""G += X^T X, each entry one chain over tokens in order."""

import pytest
import torch

from fewbit import ops
from grids import DTYPES


def gram_of(x, *cuts):
    g = torch.zeros(x.shape[1], x.shape[1])
    for part in torch.tensor_split(x, cuts):
        ops.gram(part, g)
    return g


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, channels", [(1, 1), (3, 15), (40, 17), (300, 33), (9, 100), (0, 4)]
)
def test_matches_float64(isa, tokens, channels, dtype):
    x = torch.randn(tokens, channels).to(dtype)
    g, d = gram_of(x), x.double()
    # Standard forward bound of a sum of n products: n u / (1 - n u) * sum |a||b|, u = 2^-24.
    bound = tokens * 2.0**-24 / (1 - tokens * 2.0**-24) * (d.abs().T @ d.abs())
    assert bool(((g.double() - d.T @ d).abs() <= bound).all())
    assert torch.equal(g, g.T)


def test_independent_of_batching_and_threads(isa):
    x = torch.randn(600, 70)
    whole = gram_of(x)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(gram_of(x, 1, 17, 300), whole)
    torch.set_num_threads(before)


def test_same_bits_on_every_isa():
    from fewbit import _C

    x, results, before = torch.randn(50, 40), [], _C.isa()
    for name in _C.available_isas():
        _C.set_isa(name)
        results.append(gram_of(x))
    _C.set_isa(before)
    assert all(torch.equal(results[0], other) for other in results)


def test_is_a_proper_torch_op():
    torch.library.opcheck(torch.ops.fewbit.gram.default, (torch.randn(5, 6), torch.zeros(6, 6)))


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"g must have shape \[4, 4\], got \[4, 3\]"):
        ops.gram(torch.randn(2, 4), torch.zeros(4, 3))
