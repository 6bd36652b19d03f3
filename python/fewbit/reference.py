"""Every operator in plain torch: what the fast kernels must agree with, on any device.

These are the oracle of the tests and, registered as composite implementations (ops.py), the kernel
of every device that has no native one. Read them first: they are the shortest statement of what
fewbit computes. Quantisation here and in the kernels is the same bit for bit; sums differ by
rounding only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import UsageError

_MAX_HALF = 65504.0
_PANEL = 16  # rows per panel of the packed layout (cpp/include/fewbit/layout.h)


def resolve_group(group_size: int, columns: int) -> int:
    """The group size in columns: -1, or anything longer than the row, is the row."""
    if group_size != -1 and group_size < 1:
        raise UsageError(f"group_size must be -1 (whole row) or at least 1, got {group_size}")
    row = max(columns, 1)
    return row if group_size == -1 or group_size > row else group_size


def _groups(w: Tensor, group: int) -> Tensor:
    """[rows, columns] -> [rows, groups, group], the last group filled up with zeros.

    A zero changes no range, because every range holds 0 anyway.
    """
    rows, columns = w.shape
    count = -(-columns // group)
    return F.pad(w, (0, count * group - columns)).reshape(rows, count, group)


def _round_scale(s: Tensor, scale_dtype: str) -> Tensor:
    """To what the storage type can hold, never to 0 or infinity (cpp/cpu/grid.h)."""
    if scale_dtype == "float16":
        tiny = (s * 2.0**24).ceil() * 2.0**-24  # subnormals: rounding up keeps the range
        return torch.where(s < 2.0**-14, tiny, s.clamp(max=_MAX_HALF).to(torch.float16).float())
    if scale_dtype == "bfloat16":
        return s.clamp(max=torch.finfo(torch.bfloat16).max).to(torch.bfloat16).float()
    return s


def fit_grid(
    w: Tensor, bits: int, group_size: int, symmetric: bool, scale_dtype: str = "float32"
) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float32 [rows, groups], of every group; equation in fewbit/grid.h."""
    groups = _groups(w.float(), resolve_group(group_size, w.shape[1]))
    qmax = 2.0**bits - 1
    if groups.numel():
        lo, hi = groups.amin(-1).clamp(max=0.0), groups.amax(-1).clamp(min=0.0)
    else:
        lo = hi = groups.new_zeros(groups.shape[:2])
    if symmetric:
        hi = torch.maximum(-lo, hi)
        lo = -hi
    span = hi - lo
    s = torch.where(span <= torch.finfo(torch.float32).max, span / qmax, hi / qmax - lo / qmax)
    s = _round_scale(s.clamp(min=torch.finfo(torch.float32).tiny), scale_dtype)
    s = torch.where(span > 0, s, torch.ones_like(s))
    if symmetric:
        z = torch.full_like(s, 2.0 ** (bits - 1))
    else:
        z = (-lo / s).round().clamp(0, qmax)
    return s, z


def quantize(
    w: Tensor, bits: int, group_size: int, symmetric: bool, scale_dtype: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q = clamp(round(w / s) + z, 0, 2^bits - 1), with s and z as they will be stored."""
    s, z = fit_grid(w, bits, group_size, symmetric, scale_dtype)
    rows, columns = w.shape
    groups = _groups(w.float(), resolve_group(group_size, columns))
    q = ((groups / s[..., None]).round() + z[..., None]).clamp(0, 2.0**bits - 1)
    q = q.reshape(rows, s.shape[1] * groups.shape[2])[:, :columns]
    return q.to(torch.uint8).contiguous(), s.to(getattr(torch, scale_dtype)), z.to(torch.uint8)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, group_size: int, dtype: str) -> Tensor:
    """w = (q - z) s in float32, rounded once to ``dtype``."""
    rows, columns = q.shape
    groups = _groups(q.float(), resolve_group(group_size, columns))
    w = (groups - zero_point.float()[..., None]) * scale.float()[..., None]
    w = w.reshape(rows, w.shape[1] * w.shape[2])[:, :columns]
    return w.to(getattr(torch, dtype)).contiguous()


def pseudo_quantize(
    w: Tensor, bits: int, group_size: int, symmetric: bool, scale_dtype: str
) -> Tensor:
    """Quantise and dequantise."""
    q, s, z = quantize(w, bits, group_size, symmetric, scale_dtype)
    return dequantize(q, s, z, group_size, str(w.dtype).removeprefix("torch."))


def pseudo_quantize_(
    w: Tensor, bits: int, group_size: int, symmetric: bool, scale_dtype: str
) -> None:
    """In place."""
    w.copy_(pseudo_quantize(w, bits, group_size, symmetric, scale_dtype))


def scaled_error(
    w: Tensor, scale: Tensor, bits: int, group_size: int, symmetric: bool, scale_dtype: str
) -> Tensor:
    """Q(w s) / s - w for every row s of ``scale``."""
    x, out = w.float(), []
    for s in scale:
        q = pseudo_quantize(x * s, bits, group_size, symmetric, scale_dtype)
        out.append((q / s - x).to(w.dtype))
    return torch.stack(out) if out else w.new_empty((0, *w.shape))


def act_stats(x: Tensor, sum_abs: Tensor, max_abs: Tensor) -> None:
    """sum_abs += sum |x|, max_abs = max(max_abs, |x|) over rows, in place."""
    magnitude = x.abs()
    sum_abs += magnitude.double().sum(0)
    if x.shape[0]:
        torch.maximum(max_abs, magnitude.float().amax(0), out=max_abs)


def gram(x: Tensor, g: Tensor) -> None:
    """g += x^T x, in place."""
    x = x.to(g.dtype)
    g += x.T @ x


def gptq(
    w: Tensor,
    c: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: str,
    fit: str,
    points: int,
    importance: Tensor | None,
    order: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Column by column: t_k = w_k + sum_{j<k} (w_j - w'_j) C_jk, rounded to the group's grid."""
    rows, columns = w.shape
    group = resolve_group(group_size, columns)
    grid = (bits, -1, symmetric, scale_dtype)
    # float64 where the device has it: what the kernel's float32 chains are compared with.
    if order is not None:
        _check_order(order.tolist(), columns, group, fit == "in_order" and scale is None)
    t = w.to(torch.float32 if w.device.type == "mps" else torch.float64)
    t = t.clone() if order is None else t[:, order]
    original, c = t.clone(), c.to(t.dtype)
    at = torch.arange(columns, device=w.device) if order is None else order
    importance = t.new_ones(columns) if importance is None else importance.to(t.dtype)
    groups = -(-columns // group)
    s = w.new_zeros((rows, groups), dtype=torch.float32)
    z = torch.zeros_like(s)
    if scale is not None:
        s, z, fit = scale.float().clone(), zero_point.float(), "given"
    if fit == "before":
        for g in range(groups):
            span = slice(g * group, (g + 1) * group)
            s[:, g], z[:, g] = _search_range(w[:, span].to(t.dtype), importance[span], points, grid)
    q = torch.zeros_like(t)
    reached = set()
    for k in range(columns):
        g = int(at[k]) // group
        if fit == "in_order" and g not in reached:
            end = k + min(group, columns - g * group)
            best = t[:, k:end].clone()  # the weights that are best given the columns before them
            for i in range(end - k):
                moved = original[:, k + i] - best[:, i]
                best[:, i + 1 :] += moved[:, None] * c[k + i, k + i + 1 : end]
            s[:, g], z[:, g] = _search_range(best, importance[at[k:end]], points, grid)
            reached.add(g)
        step, zero = s[:, g].to(t.dtype), z[:, g].to(t.dtype)
        q[:, k] = ((t[:, k] / step).round() + zero).clamp(0, 2.0**bits - 1)
        error = original[:, k] - (q[:, k] - zero) * step
        t[:, k + 1 :] += error[:, None] * c[k, k + 1 :]
    codes = torch.empty_like(q, dtype=torch.uint8)
    codes[:, at] = q.to(torch.uint8)
    return codes, s.to(getattr(torch, scale_dtype)), z.to(torch.uint8)


def _check_order(order: list[int], columns: int, group: int, runs: bool) -> None:
    """``order`` names every column once and, where ``runs``, those of a group side by side."""
    if sorted(order) != list(range(columns)):
        raise UsageError(f"order must hold every column 0..{columns - 1} once")
    groups = [k // group for k in order]
    starts = [g for i, g in enumerate(groups) if i == 0 or g != groups[i - 1]]
    if runs and len(starts) > len(set(starts)):
        raise UsageError(
            "order leaves and re-enters a group: fit=in_order needs the columns of a group side by"
            " side"
        )


def _search_range(
    x: Tensor, importance: Tensor, points: int, grid: tuple[int, int, bool, str]
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [rows] of one group ``x`` [rows, columns]: of its range, or of the
    shrunk range with the least sum of importance times squared error."""
    bits, _, symmetric, _ = grid
    best = least = None
    for i in range(max(points, 1)):
        shrink = torch.tensor(0.8, device=x.device) * i / max(points, 1)
        ends = torch.stack((x.amin(1).clamp(max=0.0), x.amax(1).clamp(min=0.0)), 1).float()
        s, z = fit_grid(ends * (1.0 - shrink), *grid)
        d = x - (((x / s).round() + z).clamp(0, 2.0**bits - 1) - z) * s
        loss = (d.square() * importance).sum(1, keepdim=True)
        if best is None:
            best, least = (s, z), loss
        better = loss < least
        least = torch.where(better, loss, least)
        best = tuple(torch.where(better, new, old) for new, old in zip((s, z), best, strict=True))
    return best[0][:, 0], best[1][:, 0]


def coordinate_descent(
    w: Tensor,
    h: Tensor,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    group_size: int,
    sweeps: int,
) -> Tensor:
    """Each code in turn to round(t / s) + z, t_k = w'_k + ((w - w') H)_k / H_kk."""
    group = resolve_group(group_size, w.shape[1])
    dtype = torch.float32 if w.device.type == "mps" else torch.float64
    w, h, q, s, z = (t.to(dtype) for t in (w, h, q, scale, zero_point))
    q = q.clone()
    at = torch.arange(w.shape[1], device=w.device) // group
    g = (w - (q - z[:, at]) * s[:, at]) @ h
    for _ in range(sweeps):
        for k in range(w.shape[1]):
            step, zero = s[:, k // group], z[:, k // group]
            old = (q[:, k] - zero) * step
            q[:, k] = (((old + g[:, k] / h[k, k]) / step).round() + zero).clamp(0, 2.0**bits - 1)
            g += (old - (q[:, k] - zero) * step)[:, None] * h[k]
    return q.to(torch.uint8)


def hadamard(x: Tensor, bases: list[Tensor], signs: Tensor | None) -> Tensor:
    """(x signs) (B_1 (x) B_2 (x) .. (x) H_{2^k}) / sqrt(2^k), int8 bases over sqrt(m); float32
    inside."""
    rows, width = x.shape
    y = x.float() if signs is None else x.float() * signs.float()
    n = width // math.prod(len(base) for base in bases)
    half = 1
    while half < n:
        y = y.reshape(-1, 2, half)
        y = torch.stack((y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]), dim=1)
        half *= 2
    scale, inner = n**-0.5, n
    for base in reversed(bases):
        m = len(base)
        scale *= m**-0.5 if base.dtype == torch.int8 else 1.0
        y = torch.einsum("im,tib->tmb", base.float(), y.reshape(-1, m, inner))
        inner *= m
    return (y * scale).reshape(rows, width).to(x.dtype)


def hadamard_quantize(
    x: Tensor, bases: list[Tensor], signs: Tensor | None, bits: int, clip: float | None
) -> tuple[Tensor, Tensor]:
    """hadamard in float32, then quantize_per_token."""
    y = hadamard(x.float(), bases, signs)
    q, s, _ = quantize_per_token(y, True, None, None, bits=bits, clip=clip)
    return (words_of_fours(q) if bits == 4 else q), s


# ---- the packed layout (cpp/include/fewbit/layout.h) ---------------------------------------------


def unit_columns(bits: int) -> int:
    """Columns of the least number of codes that fills whole 32-bit words."""
    return 32 if bits == 3 else 32 // bits


def _shift(bits: int, i: Tensor) -> Tensor:
    return 8 * (i % 4) + bits * (i // 4)


def _field_planes(bits: int) -> list[tuple[int, int, int]]:
    """(bits of the field, its lowest bit in the code, columns per word) of every plane."""
    return [(2, 0, 16), (1, 2, 32)] if bits == 3 else [(bits, 0, 32 // bits)]


def pack(
    q: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Canonical codes to panels of 16 rows; groups start on unit boundaries."""
    if q.numel() and not q.is_meta and int(q.max()) >> bits:
        raise UsageError(f"q holds codes above {(1 << bits) - 1}, the largest of {bits} bits")
    rows, columns = q.shape
    group = resolve_group(group_size, columns)
    panels, groups, unit = -(-rows // _PANEL), -(-columns // group), unit_columns(bits)
    # [rows, groups, group] -> pad every group to whole units, drop the tail of a short last group
    padded_group = -(-group // unit) * unit
    codes = F.pad(_groups(q.long(), group), (0, padded_group - group))
    codes = codes.reshape(rows, groups * padded_group)
    last = columns - (groups - 1) * group
    if groups:
        codes = codes[:, : (groups - 1) * padded_group + -(-last // unit) * unit]
    units = codes.shape[1] // unit
    codes = F.pad(codes, (0, 0, 0, panels * _PANEL - rows)).reshape(panels, _PANEL, units, unit)
    words = []
    for field, low, per_word in _field_planes(bits):
        i = torch.arange(per_word, device=q.device)
        part = (codes >> low) & ((1 << field) - 1)
        part = part.reshape(panels, _PANEL, units, unit // per_word, per_word)
        words.append((part << _shift(field, i)).sum(-1))
    packed = torch.cat(words, dim=-1).permute(0, 2, 3, 1).reshape(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)

    def to_panels(t: Tensor) -> Tensor:
        t = F.pad(t, (0, 0, 0, panels * _PANEL - rows))
        return t.reshape(panels, _PANEL, groups).transpose(1, 2).contiguous()

    return packed, to_panels(scale), to_panels(zero_point)


def unpack(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of ``pack``."""
    group = resolve_group(group_size, in_features)
    panels, groups = scale.shape[0], scale.shape[1]
    unit = unit_columns(bits)
    per_unit = sum(unit // per_word for _, _, per_word in _field_planes(bits))
    units = packed.numel() // max(panels * per_unit * _PANEL, 1)
    words = packed.long().remainder(2**32).reshape(panels, units, per_unit, _PANEL)
    codes = torch.zeros(panels, _PANEL, units, unit, dtype=torch.long, device=packed.device)
    first = 0
    for field, low, per_word in _field_planes(bits):
        i = torch.arange(per_word, device=packed.device)
        count = unit // per_word
        plane = words[:, :, first : first + count].permute(0, 3, 1, 2)[..., None]
        part = (plane >> _shift(field, i)) & ((1 << field) - 1)
        codes |= part.reshape(panels, _PANEL, units, unit) << low
        first += count
    codes = codes.reshape(panels * _PANEL, units * unit)[:out_features]
    padded_group = -(-group // unit) * unit
    codes = F.pad(codes, (0, groups * padded_group - codes.shape[1]))
    codes = codes.reshape(out_features, groups, padded_group)[:, :, :group]
    codes = codes.reshape(out_features, groups * group)[:, :in_features]

    def to_rows(t: Tensor) -> Tensor:
        return t.transpose(1, 2).reshape(panels * _PANEL, groups)[:out_features].contiguous()

    return codes.to(torch.uint8).contiguous(), to_rows(scale), to_rows(zero_point)


def w4a16_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """x W^T + bias with W = (q - z) s, in float32, rounded once to the type of x."""
    q, s, z = unpack(packed, scale, zero_point, out_features, x.shape[1], bits, group_size)
    w = dequantize(q, s, z, group_size, "float32")
    return F.linear(x.float(), w, None if bias is None else bias.float()).to(x.dtype)


_NIBBLE_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ: the row in nibble i of a word


def pack_fields(q: Tensor, bits: int, interleave: bool = False) -> Tensor:
    """A dense little-endian bit stream per row, by way of single bits."""
    if interleave:
        q = q.unflatten(0, (-1, 8))[:, list(_NIBBLE_ROWS)]  # [rows / 8, nibble, columns]
        return _words((q.transpose(1, 2).unsqueeze(-1) >> torch.arange(4, device=q.device)) & 1)
    stream = (q.unsqueeze(-1) >> torch.arange(bits, device=q.device)) & 1
    stream = F.pad(stream.flatten(1), (0, -(q.shape[1] * bits) % 32))
    return _words(stream.reshape(len(q), stream.shape[1] // 32, 32))


def _words(stream: Tensor) -> Tensor:
    """Bits [..., 32] or [..., 8, 4], lowest first, to int32 [...]."""
    stream = stream.flatten(2).long()
    value = (stream << torch.arange(32, device=stream.device)).sum(-1)
    return torch.where(value >= 2**31, value - 2**32, value).to(torch.int32)


def unpack_fields(words: Tensor, bits: int, columns: int, interleave: bool = False) -> Tensor:
    """The inverse of ``pack_fields``."""
    stream = (words.unsqueeze(-1) >> torch.arange(32, device=words.device)) & 1  # [rows, words, 32]
    width = torch.arange(bits, device=words.device)
    if interleave:
        nibbles = (stream.unflatten(-1, (8, 4)) << width).sum(-1).transpose(1, 2)
        rows = torch.empty_like(nibbles)
        rows[:, list(_NIBBLE_ROWS)] = nibbles
        return rows.flatten(0, 1).to(torch.uint8)
    stream = stream.flatten(1)[:, : columns * bits].reshape(len(words), columns, bits)
    return (stream << width).sum(-1).to(torch.uint8)


# ---- int8 activations ----------------------------------------------------------------------------


def quantize_per_token(
    x: Tensor,
    symmetric: bool,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    skip: Tensor | None = None,
    bits: int = 8,
    clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q = clamp(round(x / s) + z); equation in fewbit/quantize_per_token.h."""
    x = x.float()
    if skip is not None:
        x = x * (~skip)
    lo = x.amin(1).clamp(max=0.0) if x.shape[1] else x.new_zeros(x.shape[0])
    hi = x.amax(1).clamp(min=0.0) if x.shape[1] else x.new_zeros(x.shape[0])
    top, finite = torch.maximum(-lo, hi), x.isfinite().all(1)
    if x_scale is not None:
        s = x_scale.float().reshape(1).expand(x.shape[0])
        z = s.new_zeros(x.shape[0])
        if x_zero_point is not None:
            z = z + x_zero_point.float()
    else:
        span = hi - lo
        wide = torch.where(span <= torch.finfo(torch.float32).max, span / 255, hi / 255 - lo / 255)
        most = 2 ** (bits - 1) - 1
        even = top / most if clip is None else top * clip / (most + 0.5)
        s = (even if symmetric else wide).clamp(min=torch.finfo(torch.float32).tiny)
        s = torch.where(top > 0, s, torch.ones_like(s))
        z = torch.zeros_like(s) if symmetric else (-128 - lo / s).round().clamp(-128, 127)
    s = torch.where(finite, s, torch.full_like(s, torch.nan))
    z = torch.where(finite, z, torch.zeros_like(z))
    most = 2.0 ** (bits - 1) - 1
    least = -most if symmetric and clip is None else -most - 1
    q = ((x / s[:, None]).round() + z[:, None]).nan_to_num(nan=least).clamp(least, most)
    return q.to(torch.int8), s.contiguous(), z.to(torch.int32)


def words_of_fours(q: Tensor) -> Tensor:
    """int8 codes of 4 bits [rows, columns], eight to an int32 word in the order of a unit."""
    shift = _shift(4, torch.arange(8, device=q.device))
    value = ((q.long() & 15).unflatten(1, (-1, 8)) << shift).sum(-1)
    return torch.where(value >= 2**31, value - 2**32, value).to(torch.int32)


def fours_of_words(words: Tensor) -> Tensor:
    """The inverse of ``words_of_fours``."""
    shift = _shift(4, torch.arange(8, device=words.device))
    code = (words.long()[..., None] >> shift) & 15
    return torch.where(code >= 8, code - 16, code).flatten(1).to(torch.int8)


def norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm in float32, then quantize_per_token."""
    x = x.float()
    if not rms:
        x = x - x.mean(1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps) * weight.float()
    return quantize_per_token(y if bias is None else y + bias.float(), symmetric, None, None)


def code_sums(q: Tensor, zero_point: Tensor, group_size: int) -> Tensor:
    """Sum of q - z per row and group, in panel order."""
    rows, columns = q.shape
    group = resolve_group(group_size, columns)
    total = _groups(q.float(), group).double().sum(-1)
    counts = torch.full((zero_point.shape[1],), group, device=q.device)
    if len(counts):
        counts[-1] = columns - (len(counts) - 1) * group
    total = (total - counts * zero_point.double()).to(torch.int32)
    panels = -(-rows // _PANEL)
    total = F.pad(total, (0, 0, 0, panels * _PANEL - rows))
    return total.reshape(panels, _PANEL, len(counts)).transpose(1, 2).contiguous()


def _token_product(
    q: Tensor, s: Tensor, z: Tensor | None, weight: tuple, sizes: tuple, add: Tensor | None
) -> Tensor:
    """Sums per group exact (float64 of integers), scaled in float32."""
    out_features, bits, group_size = sizes
    codes, scale, zero = unpack(*weight, out_features, q.shape[1], bits, group_size)
    group = resolve_group(group_size, q.shape[1])
    a = q.double() if z is None else q.double() - z.double()[:, None]
    a = _groups(a, group)
    centred = _groups(codes.double(), group) - zero.double()[..., None]
    sums = torch.einsum("mgk,ngk->mng", a, centred).float()
    out = (sums * scale.float()).sum(-1) * s[:, None]
    return out if add is None else out + add


def w8a8_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    code_sum: Tensor | None,
) -> Tensor:
    """Quantise x if it is float, multiply exactly, scale."""
    dtype = torch.float32 if x.dtype == torch.int8 else x.dtype
    if x.dtype == torch.int8:
        q, s, z = x, x_scale, x_zero_point
    else:
        q, s, z = quantize_per_token(x, symmetric, x_scale, x_zero_point)
    weight, sizes = (packed, scale, zero_point), (out_features, bits, group_size)
    out = _token_product(q, s, None if symmetric else z, weight, sizes, None)
    return (out if bias is None else out + bias.float()).to(dtype)


def w4a4_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    x_scale: Tensor | None,
    clip: float | None,
) -> Tensor:
    """Quantise x to 4 bits if it is float, multiply exactly, scale."""
    dtype = torch.float32 if x.dtype == torch.int32 else x.dtype
    if x.dtype == torch.int32:
        q, s = fours_of_words(x), x_scale
    else:
        q, s, _ = quantize_per_token(x, True, None, None, bits=4, clip=clip)
    weight, sizes = (packed, scale, zero_point), (out_features, 4, group_size)
    out = _token_product(q, s, None, weight, sizes, None)
    return (out if bias is None else out + bias.float()).to(dtype)


def int8_mixed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    threshold: float,
    outliers: Tensor | None,
    kept: Tensor | None,
    kept_weight: Tensor | None,
) -> Tensor:
    """int8 for most columns, float for the outliers; equation in fewbit/int8_mixed_linear.h."""
    columns = x.shape[1]
    for name, of in (("outliers", outliers), ("kept", kept)):
        if of is not None and bool(((of < 0) | (of >= columns)).any()):
            raise UsageError(f"{name} must hold columns in 0..{columns - 1}")
    flag = torch.zeros(columns, dtype=torch.bool, device=x.device)
    if outliers is not None:
        flag[outliers] = True
    elif x.shape[0]:
        flag = ~(x.float().abs().amax(0) < threshold)
    codes, s, z = unpack(packed, scale, zero_point, out_features, columns, 8, group_size)
    w = dequantize(codes, s, z, group_size, "float32")
    if kept is not None:
        w[:, kept] = kept_weight.T
    index = flag.nonzero().flatten()
    product = x.float()[:, index] @ w[:, index].T
    q, x_scale, _ = quantize_per_token(x, True, None, None, flag)
    weight, sizes = (packed, scale, zero_point), (out_features, 8, group_size)
    out = _token_product(q, x_scale, None, weight, sizes, product)
    return (out if bias is None else out + bias.float()).to(x.dtype)
