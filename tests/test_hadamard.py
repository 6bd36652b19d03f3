"""y = (x signs) (B_1 (x) B_2 (x) .. (x) H_{2^k}) / sqrt(n), against the dense float64 product."""

import pytest
import torch

from fewbit import _C, ops, reference
from fewbit.hadamard import hadamard_matrix, plan, transform

# 1, below and at a vector; bases with tables, in pairs (20, 36, 60, 76) and not (12, 44, 172, 428),
# of columns side by side (2^k of 16 and more) or 8, 4 and 1 of them, up to three in a product; by
# multiply-adds (1052, and Hartley's 3, 7, 59, 137), side by side and apart
WIDTHS = [
    1, 2, 8, 16, 32, 12, 24, 48, 96, 192, 320, 352, 384, 640, 60, 240, 2880, 5184, 172 * 16, 8 * 76,
    15 * 27 * 64, 1052 * 16, 137, 3 * 64, 7 * 16, 59 * 64, 14, 4096, 32768, 428 * 32, 29568,
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def base_of(n):
    return plan(n).bases() if plan(n).m > 1 else None


def signs_of(n):
    return (torch.randint(0, 2, (n,)) * 2 - 1).to(torch.int8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", WIDTHS)
def test_error_is_within_twice_torchs(isa, n, dtype):
    x, base, signs = torch.randn(5, n).to(dtype), base_of(n), signs_of(n)
    want = transform(x.double() * signs, plan(n))
    ours = (ops.hadamard(x, base, signs).double() - want).abs().max()
    torchs = (reference.hadamard(x, base or [], signs).double() - want).abs().max()
    # A width whose few sums torch happens to round luckily: one unit of the largest entry. Sums of
    # m products in a row, where torch's are in blocks: a random walk of m half units.
    p = plan(n)
    walk = 1.0 if p.exact and max(p.orders, default=1) <= 1024 else max(1.0, p.m**0.5 / 2)
    floor = walk * torch.finfo(dtype).eps * want.abs().max()
    assert float(ours) <= max(2 * float(torchs), float(floor))


@pytest.mark.parametrize("n", WIDTHS)
def test_same_bits_on_every_isa_and_number_of_threads(n):
    x, base = torch.randn(64, n), base_of(n)
    before, threads, results = _C.isa(), torch.get_num_threads(), []
    for name in _C.available_isas():
        _C.set_isa(name)
        results.append(ops.hadamard(x, base))
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.hadamard(x, base))
    _C.set_isa(before)
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("clip", [None, 1.0, 0.9])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n", [8, 96, 640, 2880, 4096])
def test_codes_are_those_of_the_float32_result(isa, n, bits, clip):
    x, base, signs = torch.randn(5, n).half(), base_of(n), signs_of(n)
    x[3] = 0.0
    q, s = ops.hadamard_quantize(x, base, signs, bits, clip)
    want = reference.quantize_per_token(
        ops.hadamard(x.float(), base, signs), True, None, None, bits=bits, clip=clip
    )
    assert torch.equal(reference.fours_of_words(q) if bits == 4 else q, want[0])
    assert torch.equal(s, want[1])


def test_codes_are_a_proper_torch_op():
    for bits in (8, 4):
        arguments = torch.randn(3, 2880), base_of(2880), signs_of(2880), bits, 0.9
        torch.library.opcheck(torch.ops.fewbit.hadamard_quantize.default, arguments)


def test_codes_say_what_is_wrong():
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 5"):
        ops.hadamard_quantize(torch.randn(2, 8), bits=5)
    with pytest.raises(ValueError, match="clip must be above 0 and at most 1, got 0"):
        ops.hadamard_quantize(torch.randn(2, 8), bits=4, clip=0.0)
    with pytest.raises(ValueError, match="multiple of 8, got 4"):
        ops.hadamard_quantize(torch.randn(2, 4), bits=4)


@pytest.mark.parametrize("n", [16, 20, 344, 1024, 2880])
def test_is_orthogonal(isa, n):
    p, base = plan(n), base_of(n)
    h = ops.hadamard(torch.eye(n), base).double()
    # log2(n) additions for butterflies, m / 4 + 2 for a base, each within one unit.
    additions = p.k + sum(order / 4 + 2 for order in p.orders)
    error = (h @ h.T - torch.eye(n)).abs().max()
    assert float(error) <= 2 * additions * torch.finfo(torch.float32).eps
    x = torch.randn(3, n)
    back = ops.hadamard(ops.hadamard(x, base), base and [b.T.contiguous() for b in base])
    # Sylvester's matrix is its own inverse, so the transposed bases undo the transform.
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1024, 8192, 768, 44 * 64, 76 * 64, 2880, 59 * 64])
def test_large_results_are_the_same(isa, n, dtype):
    """16 MiB and more are written past the caches; row by row they are not."""
    x, base = torch.randn(2**22 // n + 1, n).to(dtype).repeat(2, 1), base_of(n)
    whole = ops.hadamard(x, base)
    for i in (0, 1, len(x) - 1):
        assert torch.equal(whole[i : i + 1], ops.hadamard(x[i : i + 1], base))
    assert torch.equal(whole[: len(x) // 2], whole[len(x) // 2 :])


@pytest.mark.parametrize(
    "m, inner", [(1, 8), (2, 4), (6, 1), (7, 16), (18, 8), (113, 64), (1024, 16)]
)
def test_any_matrix_of_signs(isa, m, inner):
    """Orders that are no multiple of a bundle, few and many steps of tables."""
    signs = torch.randint(0, 2, (m, m), generator=torch.Generator().manual_seed(m)) * 2 - 1
    x = torch.randn(3, m * inner, generator=torch.Generator().manual_seed(0))
    ours = ops.hadamard(x, [signs.to(torch.int8)])
    want = reference.hadamard(x.double(), [signs.to(torch.int8)], None)
    # m / 4 + log2(inner) + 3 additions a number, each of relative error 2^-24 of sum |x| at most.
    sums = x.double().abs().sum(1, keepdim=True) / (m * inner) ** 0.5
    bound = (m / 4 + inner.bit_length() + 3) * 2.0**-24 * sums
    assert bool(((ours - want).abs() <= bound).all())


def test_a_base_that_changes_in_place():
    """What is made of a matrix is kept by what the matrix holds, not by where it lies."""
    x = torch.randn(2, 44 * 4)
    base = base_of(44 * 4)[0].clone()
    first = ops.hadamard(x, [base])
    for i in range(20):  # more than are kept
        other = base.clone()
        other[i] *= -1
        want = reference.hadamard(x, [other], None)
        base[i] *= -1
        assert torch.allclose(ops.hadamard(x, [base]), want, atol=1e-5)
        assert not torch.allclose(ops.hadamard(x, [base]), first, atol=1e-2)
        base[i] *= -1
    assert torch.equal(ops.hadamard(x, [base]), first)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("n", [16, 48, 12, 2880])
def test_gradient_is_the_inverse(n, compiled):
    x = torch.randn(3, n, requires_grad=True)
    base, signs, up = base_of(n), signs_of(n), torch.randn(3, n)
    run = ops.hadamard
    if compiled:
        torch.compiler.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    run(x, base, signs).backward(up)
    y = x.detach().clone().requires_grad_()
    reference.hadamard(y, base or [], signs).backward(up)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_gradient():
    x = torch.randn(2, 12, requires_grad=True)
    square = (ops.hadamard(x, hadamard_matrix(12)) ** 2).sum() ** 2  # (x . x)^2
    (first,) = torch.autograd.grad(square, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    want = 8 * x * x.sum() + 4 * (x * x).sum()
    torch.testing.assert_close(second, want, rtol=1e-4, atol=1e-3)


def test_rows_do_not_meet(isa):
    x = torch.randn(7, 96)
    whole = ops.hadamard(x, hadamard_matrix(12))
    for i in range(7):
        assert torch.equal(ops.hadamard(x[i : i + 1], hadamard_matrix(12))[0], whole[i])


def test_empty_and_non_contiguous():
    assert ops.hadamard(torch.empty(0, 16)).shape == (0, 16)
    x = torch.randn(16, 3).T
    assert torch.equal(ops.hadamard(x), ops.hadamard(x.contiguous()))


@pytest.mark.parametrize("n", [16, 48, 7, 2880])
def test_is_a_proper_torch_op(n):
    arguments = (torch.randn(3, n), base_of(n) or [], signs_of(n))
    torch.library.opcheck(torch.ops.fewbit.hadamard.default, arguments)


def test_says_what_is_wrong():
    x = torch.randn(2, 24)
    for arguments, message in [
        ((x[0],), r"x must be \[rows, width\], got shape \[24\]"),
        ((x.double(),), "x must be float32, float16 or bfloat16, got Double"),
        ((x,), "the width must be m 2.k, got 24 = 1 x 24"),
        ((x, torch.eye(5)), "m dividing the width 24, got m = 5"),
        ((x, torch.eye(12)[:4]), r"base must have shape \[4, 4\], got \[4, 12\]"),
        ((x, torch.eye(12, dtype=torch.int8)), "base must hold .1 and -1, got 0"),
        ((x, torch.eye(12, dtype=torch.float64)), "base must be int8 .* or float32, got Double"),
        ((x, hadamard_matrix(12), torch.ones(24)), "signs must be Char, got Float"),
        ((x, hadamard_matrix(12), torch.ones(3).char()), r"signs must have shape \[24\]"),
        ((x, [hadamard_matrix(12), hadamard_matrix(4)]), "m dividing the width 2, got m = 4"),
        ((torch.empty(1, 32769),), "x must be 1..32768 wide, got 32769"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.hadamard(*arguments)
