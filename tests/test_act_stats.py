"""sum_abs += sum |x|, max_abs = max(max_abs, |x|), per channel."""

import pytest
import torch

from fewbit import ops
from grids import DTYPES


def stats_of(x, *cuts):
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    top = torch.zeros(x.shape[1])
    for part in torch.tensor_split(x, cuts):
        ops.act_stats(part, total, top)
    return total, top


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, channels", [(1, 1), (7, 63), (33, 65), (100, 300), (0, 5), (4, 0)]
)
def test_matches_float64(isa, tokens, channels, dtype):
    x = torch.randn(tokens, channels).to(dtype)
    total, top = stats_of(x)
    exact = x.double().abs()
    # |float64 sum - exact| <= tokens * 2^-53 * sum
    assert bool(((total - exact.sum(0)).abs() <= tokens * 2.0**-53 * exact.sum(0)).all())
    assert torch.equal(top.double(), exact.amax(0) if tokens else torch.zeros(channels).double())


def test_independent_of_batching_and_threads(isa):
    x = torch.randn(97, 200)
    whole = stats_of(x)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    parts = stats_of(x, 1, 5, 50)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_chain_of_float64_sums(isa, dtype):
    """Every size of number that float32 has: sums are kept shrunk, which must change no bit."""
    x = torch.randn(41, 77) * 2.0 ** torch.linspace(-160, 125, 77)
    x[:, ::7] *= 2.0 ** torch.linspace(-100, 1, 41)[:, None]
    x = x.nan_to_num().to(dtype).nan_to_num()  # halves overflow
    want, most = torch.zeros(77, dtype=torch.float64), torch.zeros(77)
    for row in x.double().abs():
        want += row
        most = torch.maximum(most, row.float())
    total, top = stats_of(x, 8, 9)
    assert torch.equal(total, want) and torch.equal(top, most)


def test_a_nan_shows(isa):
    x = torch.randn(9, 70)
    x[4, 66] = x[2, 3] = float("nan")
    x[3, 3], x[5, 67], x[1, 10] = float("inf"), float("inf"), float("-inf")
    total, top = stats_of(x, 4, 5)
    for found in (total, top):
        assert found.isnan().nonzero().tolist() == [[3], [66]]
        assert found.isposinf().nonzero().tolist() == [[10], [67]]


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_nan_of_an_earlier_batch_stays(isa, tokens):
    """Of either sign, as torch.maximum makes them, in either entry."""
    total, top = torch.zeros(40, dtype=torch.float64), torch.zeros(40)
    total[[3, 20]] = top[[5, 35]] = float("nan")
    top[[20, 38]] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    ops.act_stats(torch.ones(tokens, 40), total, top)
    for found in (total, top):
        assert found.isnan().nonzero().flatten().tolist() == [3, 5, 20, 35, 38]


def test_is_a_proper_torch_op():
    arguments = (torch.randn(5, 6), torch.zeros(6, dtype=torch.float64), torch.zeros(6))
    torch.library.opcheck(torch.ops.fewbit.act_stats.default, arguments)


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"sum_abs must have shape \[4\], got \[3\]"):
        ops.act_stats(torch.randn(2, 4), torch.zeros(3, dtype=torch.float64), torch.zeros(4))
    with pytest.raises(ValueError, match="sum_abs must be Double, got Float"):
        ops.act_stats(torch.randn(2, 4), torch.zeros(4), torch.zeros(4))
