"""Every operator, typed and documented: the only file that says ``torch.ops``.

Each op has a native CPU kernel (and CUDA where verified), a composite implementation in plain torch
for every other device (reference.py), and a fake one, so that it traces under ``torch.compile`` and
``torch.export``. Wrong arguments raise ValueError with the value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cuda, reference  # importing _C registers the native kernels

__all__ = [
    "act_stats",
    "coordinate_descent",
    "dequantize",
    "gptq",
    "gram",
    "hadamard",
    "hadamard_quantize",
    "int8_mixed_linear",
    "norm_quantize",
    "pack",
    "pack_fields",
    "pseudo_quantize",
    "pseudo_quantize_",
    "quantize",
    "quantize_per_token",
    "scaled_error",
    "unpack",
    "unpack_fields",
    "w4a16_linear",
    "w4a4_linear",
    "w8a8_linear",
]

_library = torch.library.Library("fewbit_plain", "DEF")


def _plain(name: str) -> None:
    """Register reference.<name> as what the native module calls, after its checks, on devices and
    cards without a kernel."""
    schema = str(getattr(torch.ops.fewbit, name).default._schema).removeprefix("fewbit::")
    _library.define(schema)
    _library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")


def quantize(
    w: Tensor,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    scale_dtype: str = "float32",
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of a float ``w`` [out_features, in_features].

    ``w`` is float32, float16 or bfloat16. Returns ``q`` uint8 [out_features, in_features] in
    0 .. 2**bits - 1, and ``scale`` of ``scale_dtype`` and ``zero_point`` uint8, both
    [out_features, groups]. Rows are cut into groups of ``group_size`` columns (-1: the whole row;
    the last group may be short); the range of a group is extended to hold 0; rounds half to even.
    Equation: cpp/include/fewbit/grid.h. Raises ValueError for bits outside 2..8, a group_size of 0
    or below -1, or w of another rank or dtype.
    """
    return torch.ops.fewbit.quantize.default(w, bits, group_size, symmetric, scale_dtype)


@torch.library.register_fake("fewbit::quantize")
def _(w, bits, group_size, symmetric, scale_dtype):
    rows, columns = w.shape
    groups = _count_groups(columns, group_size)
    return (
        w.new_empty((rows, columns), dtype=torch.uint8),
        w.new_empty((rows, groups), dtype=getattr(torch, scale_dtype)),
        w.new_empty((rows, groups), dtype=torch.uint8),
    )


def dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor, group_size: int = 128, dtype: str = "float32"
) -> Tensor:
    """``(q - zero_point) * scale`` as [out_features, in_features] of ``dtype``.

    Shapes and dtypes as ``quantize`` returns them; computed in float32 and rounded once.
    """
    return torch.ops.fewbit.dequantize.default(q, scale, zero_point, group_size, dtype)


@torch.library.register_fake("fewbit::dequantize")
def _(q, scale, zero_point, group_size, dtype):
    return q.new_empty(q.shape, dtype=getattr(torch, dtype))


def pseudo_quantize(
    w: Tensor,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    scale_dtype: str = "float32",
) -> Tensor:
    """Round ``w`` [out_features, in_features] to its grid and back to float, same shape and dtype.

    Equals ``dequantize(*quantize(w, ...))`` bit for bit, in one pass. Errors as ``quantize``.
    """
    return torch.ops.fewbit.pseudo_quantize.default(w, bits, group_size, symmetric, scale_dtype)


@torch.library.register_fake("fewbit::pseudo_quantize")
def _(w, bits, group_size, symmetric, scale_dtype):
    return w.new_empty(w.shape)


def pseudo_quantize_(
    w: Tensor,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    scale_dtype: str = "float32",
) -> None:
    """``pseudo_quantize`` in place: for large weights most of its time is the fresh result.

    ``w`` must be contiguous.
    """
    torch.ops.fewbit.pseudo_quantize_.default(w, bits, group_size, symmetric, scale_dtype)


@torch.library.register_fake("fewbit::pseudo_quantize_")
def _(w, bits, group_size, symmetric, scale_dtype):
    return None


def scaled_error(
    w: Tensor,
    scale: Tensor,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    scale_dtype: str = "float32",
) -> Tensor:
    """What ``pseudo_quantize`` leaves of scaled weights: Q(w s) / s - w for every row of ``scale``.

    ``w`` [out_features, in_features] is read once for all of ``scale`` float32 [candidates,
    in_features]. Returns [candidates, out_features, in_features] of the type of w, float32 inside
    (cpp/include/fewbit/scaled_error.h). Grid and errors as in ``quantize``.
    """
    return torch.ops.fewbit.scaled_error.default(w, scale, bits, group_size, symmetric, scale_dtype)


@torch.library.register_fake("fewbit::scaled_error")
def _(w, scale, bits, group_size, symmetric, scale_dtype):
    return w.new_empty((scale.shape[0], *w.shape))


def pack(
    q: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 4, group_size: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    """Canonical codes (as ``quantize`` returns them) to the layout that the matrix kernels read.

    Returns ``packed`` int32 [words], ``scale`` [panels, groups, 16] and ``zero_point``
    [panels, groups, 16], panels = ceil(out_features / 16); layout: cpp/include/fewbit/layout.h.
    ``bits`` is 2, 3, 4 or 8. Raises ValueError for codes out of range or shapes that disagree.
    """
    return torch.ops.fewbit.pack.default(q, scale, zero_point, bits, group_size)


@torch.library.register_fake("fewbit::pack")
def _(q, scale, zero_point, bits, group_size):
    rows, columns = q.shape
    panels = -(-rows // 16)
    groups = _count_groups(columns, group_size)
    words = panels * _panel_words(columns, bits, group_size)
    return (
        q.new_empty((words,), dtype=torch.int32),
        scale.new_empty((panels, groups, 16)),
        zero_point.new_empty((panels, groups, 16)),
    )


def unpack(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    out_features: int,
    in_features: int,
    bits: int = 4,
    group_size: int = 128,
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of ``pack``: canonical ``q``, ``scale`` and ``zero_point``."""
    return torch.ops.fewbit.unpack.default(
        packed, scale, zero_point, out_features, in_features, bits, group_size
    )


@torch.library.register_fake("fewbit::unpack")
def _(packed, scale, zero_point, out_features, in_features, bits, group_size):
    groups = scale.shape[1]
    return (
        packed.new_empty((out_features, in_features), dtype=torch.uint8),
        scale.new_empty((out_features, groups)),
        zero_point.new_empty((out_features, groups)),
    )


def act_stats(x: Tensor, sum_abs: Tensor, max_abs: Tensor) -> None:
    """Add ``x`` [tokens, channels] to running statistics, in place.

    ``sum_abs`` float64 [channels] += sum over tokens of |x|; ``max_abs`` float32 [channels]
    becomes the larger of itself and max |x|. Sums run over tokens in order, so the result does not
    depend on threads or batching. A NaN in a channel makes both of its entries NaN.
    """
    torch.ops.fewbit.act_stats.default(x, sum_abs, max_abs)


@torch.library.register_fake("fewbit::act_stats")
def _(x, sum_abs, max_abs):
    return None


def gram(x: Tensor, g: Tensor) -> None:
    """``g`` [channels, channels] float32 or float64 += x^T x for ``x`` [tokens, channels], in
    place.

    On the CPU every entry is one chain of fused multiply-adds over tokens in order: the result is
    exactly symmetric and does not depend on threads or on how tokens were batched.
    """
    torch.ops.fewbit.gram.default(x, g)


@torch.library.register_fake("fewbit::gram")
def _(x, g):
    return None


def coordinate_descent(
    w: Tensor,
    h: Tensor,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int = 4,
    group_size: int = 128,
    sweeps: int = 1,
) -> Tensor:
    """Codes uint8 [out_features, in_features] with a lower error (w - w') H (w - w')^T per row.

    Starts from ``q``, ``scale`` and ``zero_point`` as ``quantize`` or ``gptq`` return them; ``w``
    [out_features, in_features] float32, float16 or bfloat16; ``h`` [in_features, in_features],
    symmetric with a positive diagonal, float32 or float64: the type of all sums. Each of ``sweeps``
    (0..1000) visits every column in order and puts it on the point of its grid that is best given
    all others. Equations: cpp/include/fewbit/coordinate_descent.h.
    """
    return torch.ops.fewbit.coordinate_descent.default(
        w, h, q, scale, zero_point, bits, group_size, sweeps
    )


@torch.library.register_fake("fewbit::coordinate_descent")
def _(w, h, q, scale, zero_point, bits, group_size, sweeps):
    return q.new_empty(q.shape)


def gptq(
    w: Tensor,
    c: Tensor,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    scale_dtype: str = "float32",
    fit: str = "in_order",
    points: int = 0,
    importance: Tensor | None = None,
    order: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    block: int = 128,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of ``w`` [out_features, in_features], column by column, errors compensated.

    ``c`` [in_features, in_features]: V_jk / V_kk above the diagonal, V the upper factor of
    H = V V^T in solving order; its type, float64 or float32, is that of the recursion. ``order``
    int64 [in_features]: the column solved k-th (None: left to right). ``fit``: "in_order" fits a
    group to the updated weights when it is reached (``order`` must keep its columns side by side),
    "before" to the weights as they come; or ``scale`` and ``zero_point`` are given. ``points``
    (0..1000) ranges per group are tried, least sum of ``importance`` [in_features], of c's type,
    times squared error wins; 0: the range of the group. Returns as ``quantize``; equations:
    cpp/include/fewbit/gptq.h. ``block`` (1..256) changes the speed, never a bit.
    """
    return torch.ops.fewbit.gptq.default(
        w, c, bits, group_size, symmetric, scale_dtype, fit, points, importance, order, scale,
        zero_point, block,
    )


@torch.library.register_fake("fewbit::gptq")
def _(
    w, c, bits, group_size, symmetric, scale_dtype, fit, points, importance, order, scale,
    zero_point, block,
):
    rows, columns = w.shape
    groups = _count_groups(columns, group_size)
    return (
        w.new_empty((rows, columns), dtype=torch.uint8),
        w.new_empty((rows, groups), dtype=getattr(torch, scale_dtype)),
        w.new_empty((rows, groups), dtype=torch.uint8),
    )


def hadamard(
    x: Tensor, base: Tensor | Sequence[Tensor] | None = None, signs: Tensor | None = None
) -> Tensor:
    """Orthogonal transform of each row of ``x`` [rows, width]: (x signs) (base (x) H) / sqrt.

    The width, at most 32768, is m 2^k; H is Sylvester's matrix of order 2^k. ``base`` [m, m]: a
    Hadamard matrix as int8 +1 and -1, or any orthogonal matrix as float32; several stand for their
    Kronecker product; None where m is 1. ``signs`` int8 [width] of +1 and -1. float32, float16 or
    bfloat16 in and out, float32 inside, one rounding at the end (cpp/include/fewbit/hadamard.h).
    ``hadamard.plan(width).bases()`` chooses the bases.
    """
    bases = _bases(base)
    if x.requires_grad and torch.is_grad_enabled():
        return _Hadamard.apply(x, signs, *bases)
    return torch.ops.fewbit.hadamard.default(x, bases, signs)


def _bases(base: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    return [] if base is None else [base] if isinstance(base, Tensor) else list(base)


@torch.library.register_fake("fewbit::hadamard")
def _(x, bases, signs):
    return x.new_empty(x.shape)


class _Hadamard(torch.autograd.Function):
    """With a gradient: torch.library's own wrapper would cost every call without one 4 us."""

    @staticmethod
    def forward(x, signs, *bases):
        return torch.ops.fewbit.hadamard.default(x, list(bases), signs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.signs, *ctx.bases = inputs

    @staticmethod
    def backward(ctx, grad):
        bases = [base.T.contiguous() for base in ctx.bases]
        back = hadamard(grad, bases)  # the inverse is the transpose
        back = back if ctx.signs is None else back * ctx.signs
        return back, None, *[None] * len(bases)


def hadamard_quantize(
    x: Tensor, base: Tensor | Sequence[Tensor] | None = None, signs: Tensor | None = None,
    bits: int = 8, clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``hadamard`` of each row of ``x`` [rows, width], then its codes: one scale per row.

    The transform stays in float32 in between. Returns (``q``, ``scale`` float32 [rows]): for 8
    ``bits`` q is int8 [rows, width], what ``w8a8_linear`` takes; for 4, int32 [rows, width / 8] of
    eight codes each, what ``w4a4_linear`` takes (a width in eights). The grid is symmetric, or with
    ``clip``, above 0 and at most 1, the clipped one: cpp/include/fewbit/quantize_per_token.h.
    """
    return torch.ops.fewbit.hadamard_quantize.default(x, _bases(base), signs, bits, clip)


@torch.library.register_fake("fewbit::hadamard_quantize")
def _(x, bases, signs, bits, clip):
    shape = x.shape if bits == 8 else (x.shape[0], x.shape[1] // 8)
    q = x.new_empty(shape, dtype=torch.int8 if bits == 8 else torch.int32)
    return q, x.new_empty((x.shape[0],), dtype=torch.float32)


def w4a16_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int = 4,
    group_size: int = 128,
) -> Tensor:
    """``x`` [tokens, in_features] times packed weights: [tokens, out_features] of the type of x.

    Weights of 2, 3, 4 or 8 bits as ``pack`` returns them; ``bias`` [out_features] or None. float32,
    float16 and bfloat16 in and out, float32 accumulation, scaled before narrowing.
    """
    return torch.ops.fewbit.w4a16_linear.default(
        x, packed, scale, zero_point, bias, out_features, bits, group_size
    )


@torch.library.register_fake("fewbit::w4a16_linear")
def _(x, packed, scale, zero_point, bias, out_features, bits, group_size):
    return x.new_empty((x.shape[0], out_features))


def pack_fields(q: Tensor, bits: int, interleave: bool = False) -> Tensor:
    """Codes to the words that checkpoint formats store: a dense little-endian bit stream per row.

    ``q`` uint8 [rows, columns], codes below 2**bits (not checked: a larger one runs into its
    neighbour). Returns int32 [rows, ceil(columns * bits / 32)]; with ``interleave`` (4 bits, AWQ)
    int32 [rows / 8, columns], eight rows to a word. Layout: cpp/include/fewbit/pack_fields.h.
    Raises ValueError for bits outside 2..8, or interleaving with other bits or rows not in eights.
    """
    return torch.ops.fewbit.pack_fields.default(q, bits, interleave)


@torch.library.register_fake("fewbit::pack_fields")
def _(q, bits, interleave=False):
    rows, columns = q.shape
    shape = (rows // 8, columns) if interleave else (rows, (columns * bits + 31) // 32)
    return q.new_empty(shape, dtype=torch.int32)


def unpack_fields(words: Tensor, bits: int, columns: int, interleave: bool = False) -> Tensor:
    """The inverse of ``pack_fields``: uint8 [rows, columns] from int32 words.

    Rows may hold more words than ``columns`` need. Raises ValueError when they hold fewer.
    """
    return torch.ops.fewbit.unpack_fields.default(words, bits, columns, interleave)


@torch.library.register_fake("fewbit::unpack_fields")
def _(words, bits, columns, interleave=False):
    rows = words.shape[0] * (8 if interleave else 1)
    return words.new_empty((rows, columns), dtype=torch.uint8)


def quantize_per_token(
    x: Tensor,
    symmetric: bool = True,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes of activations ``x`` [tokens, channels], one scale per token.

    Returns ``q`` int8 [tokens, channels], ``scale`` float32 [tokens] and ``zero_point`` int32
    [tokens], x = (q - zero_point) * scale. ``x_scale`` float32 [1] (and ``x_zero_point`` int32 [1]
    with ``symmetric=False``) makes the grid static. A row that is not finite has scale NaN.
    Equation: cpp/include/fewbit/quantize_per_token.h.
    """
    return torch.ops.fewbit.quantize_per_token.default(x, symmetric, x_scale, x_zero_point)


def _fake_tokens(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((x.shape[0],), dtype=torch.float32),
        x.new_empty((x.shape[0],), dtype=torch.int32),
    )


@torch.library.register_fake("fewbit::quantize_per_token")
def _(x, symmetric, x_scale, x_zero_point):
    return _fake_tokens(x)


def norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = True,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize_per_token`` of the RMSNorm (or LayerNorm, ``rms=False``) of ``x``, in one pass.

    ``weight`` and ``bias`` [channels]; an RMSNorm has no bias. The norm is computed in float32 and
    not rounded to the type of x in between. Equation: cpp/include/fewbit/norm_quantize.h.
    """
    return torch.ops.fewbit.norm_quantize.default(x, weight, bias, eps, rms, symmetric)


@torch.library.register_fake("fewbit::norm_quantize")
def _(x, weight, bias, eps, rms, symmetric):
    return _fake_tokens(x)


def w8a8_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int = 8,
    group_size: int = -1,
    symmetric: bool = True,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    code_sum: Tensor | None = None,
) -> Tensor:
    """int8 activations times packed weights of 2, 3, 4 or 8 bits: [tokens, out_features].

    ``x`` [tokens, in_features] is float (quantised here as ``quantize_per_token`` does, with the
    same arguments; the result has its type) or int8 codes with ``x_scale`` float32 and, when
    ``symmetric`` is False, ``x_zero_point`` int32, both [tokens] (float32 result). Sums over a
    group are exact integers. ``symmetric=False`` needs ``code_sum`` (see ``code_sums``).
    """
    return torch.ops.fewbit.w8a8_linear.default(
        x, packed, scale, zero_point, bias, out_features, bits, group_size,
        symmetric, x_scale, x_zero_point, code_sum,
    )  # fmt: skip


@torch.library.register_fake("fewbit::w8a8_linear")
def _(
    x, packed, scale, zero_point, bias, out_features, bits, group_size,
    symmetric, x_scale, x_zero_point, code_sum,
):  # fmt: skip
    dtype = torch.float32 if x.dtype == torch.int8 else x.dtype
    return x.new_empty((x.shape[0], out_features), dtype=dtype)


def w4a4_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int = -1,
    x_scale: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """4-bit activations times packed weights of 4 bits: [tokens, out_features].

    ``x`` [tokens, in_features] is float (put on a symmetric grid of 4 bits per token, codes -7..7,
    x_scale = max|x| / 7, or with ``clip`` in 0..1 on -8..7, x_scale = max|x| clip / 7.5; the result
    has its type), or codes as ``hadamard_quantize`` with 4 bits returns them: int32 [tokens,
    in_features / 8] with ``x_scale`` float32 [tokens] (float32 result). Sums over a group are exact
    integers; scales as in ``w8a8_linear``.
    """
    return torch.ops.fewbit.w4a4_linear.default(
        x, packed, scale, zero_point, bias, out_features, group_size, x_scale, clip
    )


@torch.library.register_fake("fewbit::w4a4_linear")
def _(x, packed, scale, zero_point, bias, out_features, group_size, x_scale, clip):
    dtype = torch.float32 if x.dtype == torch.int32 else x.dtype
    return x.new_empty((x.shape[0], out_features), dtype=dtype)


def code_sums(q: Tensor, zero_point: Tensor, group_size: int = -1) -> Tensor:
    """Sum of q - zero_point per row and group, int32 [panels, groups, 16], from canonical codes.

    What activations with a zero point need beside the packed weight; computed once per weight.
    """
    return reference.code_sums(q, zero_point, group_size)


def int8_mixed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int = -1,
    threshold: float = 6.0,
    outliers: Tensor | None = None,
    kept: Tensor | None = None,
    kept_weight: Tensor | None = None,
) -> Tensor:
    """LLM.int8() (arXiv 2208.07339): ``w8a8_linear`` with outlier columns of x in float.

    Columns with some |x| >= ``threshold`` (or those of ``outliers``, int64 [n], which makes the
    result of a row independent of its batch) meet float weights: the rows of ``kept_weight``
    float32 [len(kept), out_features] for the columns ``kept`` int64, else the dequantised int8
    column. Kept columns lose nothing to weight rounding; int8 ones need no memory.
    """
    return torch.ops.fewbit.int8_mixed_linear.default(
        x, packed, scale, zero_point, bias, out_features, group_size,
        threshold, outliers, kept, kept_weight,
    )  # fmt: skip


@torch.library.register_fake("fewbit::int8_mixed_linear")
def _(
    x, packed, scale, zero_point, bias, out_features, group_size,
    threshold, outliers, kept, kept_weight,
):  # fmt: skip
    return x.new_empty((x.shape[0], out_features))


def int8_outliers(x: Tensor, threshold: float = 6.0) -> tuple[Tensor, Tensor]:
    """Which columns of ``x`` [tokens, channels] are outliers, and why.

    Returns the columns (int64, ascending) and the largest |x| of each (float32).
    """
    top = x.float().abs().amax(0) if x.shape[0] else x.new_zeros(x.shape[1], dtype=torch.float32)
    columns = (~(top < threshold)).nonzero().flatten()
    return columns, top[columns]


def _count_groups(columns: int, group_size: int) -> int:
    return -(-columns // reference.resolve_group(group_size, columns))


def _panel_words(columns: int, bits: int, group_size: int) -> int:
    """32-bit words of one panel of 16 rows (layout.h)."""
    group = reference.resolve_group(group_size, columns)
    groups, unit = -(-columns // group), reference.unit_columns(bits)
    if groups == 0:
        return 0
    units = (groups - 1) * -(-group // unit) + -(-(columns - (groups - 1) * group) // unit)
    return units * (3 if bits == 3 else 1) * 16


for _name in __all__:
    _plain(_name)
cuda.hand_over()
