"""What every CUDA kernel is asked: inputs, and the plain answer with the error it may have.

One sweep for two runners: scripts/gpu_check.py on a card, tests/test_cuda.py over the emulator.
A question yields (what, got, want, bound): bit for bit where the bound is None.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fewbit import _C, ops, reference
from fewbit.hadamard import plan, transform
from grids import DTYPES, PACKED_BITS, SHAPES, hard_weight

Answer = tuple[str, Tensor, Tensor, Tensor | None]
Sweep = Callable[[torch.device], Iterator[Answer]]
SWEEPS: dict[str, Sweep] = {}

# Whole accesses, more than one block, more rows than a block has teams.
LAYERS = [(24, 512, 128), (65, 1024, 64), (16, 384, 32), (40, 768, -1)]


def sweep(function: Sweep) -> Sweep:
    SWEEPS[function.__name__] = function
    return function


@contextlib.contextmanager
def native_cpu(device: torch.device) -> Iterator[None]:
    """CPU tensors on the CPU kernels, also while the emulator would take them."""
    if device.type != "cpu":
        yield
        return
    before = _C.emulated_cuda()
    _C.emulate_cuda(0)
    yield
    _C.emulate_cuda(*before)


def _exact(what: str, got, want) -> Iterator[Answer]:
    got = got if isinstance(got, tuple) else (got,)
    want = want if isinstance(want, tuple) else (want,)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        yield f"{what} [{i}]", g, w, None


def wrong(got: Tensor, want: Tensor, bound: Tensor | None) -> str:
    """Why ``got`` is not an answer; empty when it is."""
    got = got.cpu()
    if got.dtype != want.dtype and bound is None:
        return f"type {got.dtype} instead of {want.dtype}"
    if got.shape != want.shape:
        return f"shape {list(got.shape)} instead of {list(want.shape)}"
    a, b = got.double(), want.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if bound is not None:
        same |= (a - b).abs() <= bound
    if bool(same.all()):
        return ""
    at = (~same).nonzero()[0].tolist()
    allowed = "equal" if bound is None else f"within {float(bound.expand_as(b)[tuple(at)]):.3g}"
    return (
        f"{int((~same).sum())} of {same.numel()} differ, first at {at}:"
        f" {float(a[tuple(at)]):.9g}, {allowed} to {float(b[tuple(at)]):.9g} expected"
    )


def _grids() -> Iterator[tuple]:
    for i, (rows, columns, group) in enumerate(SHAPES + LAYERS):
        for j, dtype in enumerate(DTYPES):
            bits = (2, 3, 4, 5, 8)[(i + j) % 5]
            scale_dtype = ("float32", "float16", "bfloat16")[(i + 2 * j) % 3]
            yield hard_weight(rows, columns, dtype), bits, group, bool((i + j) % 2), scale_dtype


def _grid_name(w: Tensor, *arguments) -> str:
    return f"{list(w.shape)} {str(w.dtype)[6:]} {arguments}"


@sweep
def quantize(device: torch.device) -> Iterator[Answer]:
    for w, *arguments in _grids():
        got = ops.quantize(w.to(device), *arguments)
        yield from _exact(_grid_name(w, *arguments), got, reference.quantize(w, *arguments))


@sweep
def pseudo_quantize(device: torch.device) -> Iterator[Answer]:
    for w, *arguments in _grids():
        got = ops.pseudo_quantize(w.to(device), *arguments)
        yield from _exact(_grid_name(w, *arguments), got, reference.pseudo_quantize(w, *arguments))


@sweep
def pseudo_quantize_(device: torch.device) -> Iterator[Answer]:
    for w, *arguments in _grids():
        got = w.to(device, copy=True)
        ops.pseudo_quantize_(got, *arguments)
        yield from _exact(_grid_name(w, *arguments), got, reference.pseudo_quantize(w, *arguments))


@sweep
def dequantize(device: torch.device) -> Iterator[Answer]:
    for w, bits, group, symmetric, scale_dtype in _grids():
        codes = reference.quantize(w, bits, group, symmetric, scale_dtype)
        arguments = group, str(w.dtype)[6:]
        got = ops.dequantize(*(c.to(device) for c in codes), *arguments)
        want = reference.dequantize(*codes, *arguments)
        yield from _exact(_grid_name(w, *arguments), got, want)


@sweep
def scaled_error(device: torch.device) -> Iterator[Answer]:
    for i, (w, *arguments) in enumerate(_grids()):
        scale = torch.rand(1 + i % 5, w.shape[1]) + 0.25
        got = ops.scaled_error(w.to(device), scale.to(device), *arguments)
        want = reference.scaled_error(w, scale, *arguments)
        yield from _exact(_grid_name(w, len(scale), *arguments), got, want)


def _codes(rows: int, columns: int, bits: int, group: int, scale_dtype: str):
    return reference.quantize(torch.randn(rows, columns), bits, group, False, scale_dtype)


@sweep
def pack(device: torch.device) -> Iterator[Answer]:
    for i, (rows, columns, group) in enumerate(SHAPES + LAYERS):
        for bits in PACKED_BITS:
            codes = _codes(rows, columns, bits, group, ("float32", "float16")[i % 2])
            got = ops.pack(*(c.to(device) for c in codes), bits, group)
            want = reference.pack(*codes, bits, group)
            yield from _exact(f"[{rows}, {columns}] {bits} bits, group {group}", got, want)


@sweep
def unpack(device: torch.device) -> Iterator[Answer]:
    for i, (rows, columns, group) in enumerate(SHAPES + LAYERS):
        for bits in PACKED_BITS:
            codes = _codes(rows, columns, bits, group, ("float32", "float16")[i % 2])
            packed = reference.pack(*codes, bits, group)
            got = ops.unpack(*(p.to(device) for p in packed), rows, columns, bits, group)
            yield from _exact(f"[{rows}, {columns}] {bits} bits, group {group}", got, codes)


def _activations() -> Iterator[Tensor]:
    for i, (rows, columns) in enumerate([(1, 1), (3, 7), (5, 129), (4, 512), (9, 1000), (2, 4096)]):
        for j, dtype in enumerate(DTYPES):
            x = hard_weight(rows, columns, dtype)
            if (i + j) % 3 == 0 and rows > 2:
                x[2, columns // 2] = float("nan" if j else "inf")
            yield x
    yield torch.empty(0, 8)


@sweep
def act_stats(device: torch.device) -> Iterator[Answer]:
    """Chains of float64 in order, as on the CPU: torch's own order is another, so by hand."""
    for x in _activations():
        want_sum, want_top = torch.zeros(x.shape[1]).double(), torch.zeros(x.shape[1])
        for row in x.float().abs():
            want_sum += row.double()
            want_top = torch.maximum(want_top, row)
        total = torch.zeros(x.shape[1], dtype=torch.float64, device=device)
        top = torch.zeros(x.shape[1], device=device)
        ops.act_stats(x.to(device), total, top)
        yield from _exact(_grid_name(x), (total, top), (want_sum, want_top))
        # An infinity stays, and a NaN that an earlier batch left in the sum or in the maximum.
        for i, (of_sum, of_top) in enumerate([(1.5, 2.0), (torch.nan, 2.0), (1.5, torch.nan)]):
            channel = i % x.shape[1]
            total[:], top[:] = of_sum, of_top
            spoilt = x.clone()
            if i == 0 and len(x):
                spoilt[len(x) // 2, channel] = -torch.inf
            ops.act_stats(spoilt.to(device), total, top)
            want_sum[:], want_top[:] = of_sum, of_top
            for row in spoilt.float().abs():
                want_sum += row.double()
                want_top = torch.maximum(want_top, row)
            lost = want_sum.isnan() | want_top.isnan()
            want_sum[lost], want_top[lost] = torch.nan, torch.nan
            yield from _exact(f"{_grid_name(x)} after {of_sum}, {of_top}", (total, top),
                              (want_sum, want_top))  # fmt: skip


@sweep
def quantize_per_token(device: torch.device) -> Iterator[Answer]:
    scale, zero = torch.tensor([0.05]), torch.tensor([3], dtype=torch.int32)
    for x in _activations():
        for arguments in [(True,), (False,), (True, scale), (False, scale, zero)]:
            full = (*arguments, None, None)[:3]
            moved = [t.to(device) if isinstance(t, Tensor) else t for t in full]
            got = ops.quantize_per_token(x.to(device), *moved)
            want = reference.quantize_per_token(x, *full)
            yield from _exact(_grid_name(x, len(arguments)), got, want)


@sweep
def norm_quantize(device: torch.device) -> Iterator[Answer]:
    """Sums run in another order than torch's, so a value on the border of two codes may fall to
    the other side: the result is compared as numbers, within one step."""
    for x in _activations():
        n = x.shape[1]
        weight, bias = torch.rand(n) + 0.5, torch.randn(n)
        for rms, symmetric in [(True, True), (True, False), (False, True), (False, False)]:
            b = None if rms else bias
            on = None if b is None else b.to(device)
            got = ops.norm_quantize(x.to(device), weight.to(device), on, 1e-5, rms, symmetric)
            want = reference.norm_quantize(x, weight, b, 1e-5, rms, symmetric)
            what = f"{_grid_name(x)} rms={rms} symmetric={symmetric}"
            step = want[1].double().nan_to_num(1.0)
            relative = (n + 16) * 2.0**-23  # of the sum, the root and the products
            yield f"{what} scale", got[1], want[1], 4 * relative * step + 1e-38
            back = [
                (q.cpu().double() - z.cpu().double()[:, None]) * s.cpu().double()[:, None]
                for q, s, z in (got, want)
            ]
            yield what, back[0], back[1], step[:, None] * (1.001 + 512 * relative)


# Rows of x, rows and columns of the weight, group: less than any tile, then more; last: unserved.
SIZES = [
    (1, 16, 32, 32), (2, 40, 128, -1), (3, 17, 256, 64), (4, 100, 1024, 128), (5, 33, 128, 32),
    (16, 130, 256, 128), (17, 48, 384, 128), (33, 300, 512, -1), (64, 64, 256, 64),
    (6, 20, 1024, -1), (2, 24, 50, 16),
]  # fmt: skip
# Widths of transforms: butterflies alone, one base, Hartley's, two bases and none of them.
HADAMARDS = [1, 2, 8, 16, 32, 48, 96, 640, 137, 56, 112, 2880, 4096, 172 * 64, 1584, 5184, 6720,
             16384, 64, 128, 256, 512, 1024, 2048, 8192]  # fmt: skip


def _rows(n: int) -> int:
    """Of short rows a block has several: some blocks are full, and the last is not."""
    return 131 if n <= 256 else 9 if n <= 2048 else 3


ROUND = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def _weights(n: int, k: int, bits: int, group: int, scale_dtype: str):
    codes = reference.quantize(torch.randn(n, k), bits, group, False, scale_dtype)
    size = k if group == -1 else min(group, k)
    s, z = (t.double().repeat_interleave(size, 1)[:, :k] for t in codes[1:])
    return reference.pack(*codes, bits, group), (codes[0].double() - z) * s


@sweep
def w4a16_linear(device: torch.device) -> Iterator[Answer]:
    """Against float64; q - z is exact, so the bound is that of a float32 sum and the output's
    rounding. Many rows meet a weight rounded to the type of x."""
    for i, (m, n, k, group) in enumerate([*SIZES, (300, 40, 128, 64)]):
        for bits in PACKED_BITS:
            dtype = DTYPES[(i + bits) % 3]
            scale_dtype = ("float16", "float32", "bfloat16")[(i + bits) // 2 % 3]
            packed, w = _weights(n, k, bits, group, scale_dtype)
            x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype) if i % 2 else None
            moved = [t.to(device) for t in packed]
            on = None if bias is None else bias.to(device)
            got = ops.w4a16_linear(x.to(device), *moved, on, n, bits, group)
            want, size = x.double() @ w.T, x.double().abs() @ w.T.abs()
            if bias is not None:
                want, size = want + bias.double(), size + bias.double().abs()
            bound = (k + 3) * 2.0**-24 * size + ROUND[dtype] * want.abs() + 2.0**-25
            if m > 64:
                bound += 2 * ROUND[dtype] * size
            yield f"{m} x {n} x {k}, {bits} bits, group {group}, {dtype}", got, want, bound


@sweep
def w8a8_linear(device: torch.device) -> Iterator[Answer]:
    """Integer sums are exact; scales and the sum over groups round in float32."""
    for i, (m, n, k, group) in enumerate(SIZES):
        for j, bits in enumerate(PACKED_BITS):
            symmetric = (i + j) % 2 == 0
            scale_dtype = ("float32", "float16")[(i + j) // 2 % 2]
            codes = reference.quantize(torch.randn(n, k), bits, group, False, scale_dtype)
            packed = reference.pack(*codes, bits, group)
            sums = None if symmetric else reference.code_sums(codes[0], codes[2], group)
            x, bias = torch.randn(m, k).half(), torch.randn(n) if i % 2 else None
            tail = (n, bits, group, symmetric, None, None)
            want = reference.w8a8_linear(x.float(), *packed, bias, *tail, sums)
            moved = [t if t is None else t.to(device) for t in (*packed, bias, sums)]
            got = ops.w8a8_linear(x.to(device), *moved[:4], *tail, moved[4])
            groups = 1 if group == -1 else -(-k // group)
            bound = 2.0**-11 * want.double().abs() + (groups + 3) * 2.0**-24 * k * 4 + 2.0**-25
            yield f"{m} x {n} x {k}, {bits} bits, group {group}", got, want, bound


@sweep
def w4a4_linear(device: torch.device) -> Iterator[Answer]:
    """As w8a8_linear, with the 4-bit codes that hadamard_quantize gives as well."""
    for i, (m, n, k, group) in enumerate([*SIZES, (37, 40, 192, 64), (70, 150, 320, -1)]):
        codes = reference.quantize(torch.randn(n, k), 4, group, bool(i % 2), "float32")
        packed = reference.pack(*codes, 4, group)
        x = torch.randn(m, k).to(DTYPES[i % 3])
        bias = torch.randn(n) if i % 2 else None
        given = [(x, None, None), (x, None, 0.9)]
        if k % 8 == 0:
            q, s, _ = reference.quantize_per_token(x, True, None, None, bits=4, clip=0.9)
            given.append((reference.words_of_fours(q), s, None))
        for x, scale, clip in given:
            want = reference.w4a4_linear(x, *packed, bias, n, group, scale, clip)
            moved = [t if t is None else t.to(device) for t in (*packed, bias, scale)]
            got = ops.w4a4_linear(x.to(device), *moved[:4], n, group, moved[4], clip)
            groups = 1 if group == -1 else -(-k // group)
            rounding = ROUND[x.dtype] if x.is_floating_point() else 0.0
            bound = 2 * rounding * want.double().abs() + (groups + 3) * 2.0**-24 * k * 4 + 2.0**-25
            yield f"{m} x {n} x {k}, group {group}, {x.dtype}", got, want, bound


@sweep
def int8_mixed_linear(device: torch.device) -> Iterator[Answer]:
    """As w8a8_linear, with a float32 sum over the outliers beside it."""
    for i, (m, n, k, group) in enumerate(SIZES):
        codes = reference.quantize(torch.randn(n, k), 8, group, False, "float32")
        packed = reference.pack(*codes, 8, group)
        x = torch.randn(m, k).half()
        x[:, :: 3 + i] *= 8.0
        bias = torch.randn(n) if i % 2 else None
        kept = torch.arange(0, k, 5) if i % 3 else None
        weight = None if kept is None else torch.randn(len(kept), n)
        for outliers in (None, torch.arange(1, k, 7)):
            tail = (outliers, kept, weight)
            want = reference.int8_mixed_linear(x.float(), *packed, bias, n, group, 6.0, *tail)
            moved = [t if t is None else t.to(device) for t in (*packed, bias, *tail)]
            got = ops.int8_mixed_linear(x.to(device), *moved[:4], n, group, 6.0, *moved[4:])
            size = x.double().abs().amax() * k * 4
            bound = 2.0**-11 * want.double().abs() + 8 * 2.0**-24 * size + 2.0**-25
            yield f"{m} x {n} x {k}, group {group}", got, want, bound


@sweep
def gptq(device: torch.device) -> Iterator[Answer]:
    """The CPU kernel's bits: every chain of multiply-adds runs in its order."""
    shapes = [(5, 64, 32), (33, 300, -1), (18, 384, 128), (7, 200, 25)]
    for i, (rows, k, group) in enumerate(shapes):
        x = torch.randn(2 * k, k)
        h = (x.T @ x).double() + 0.01 * k * torch.eye(k).double()
        v = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)  # upper: H = V V^T
        c = (v / v.diagonal()).float().contiguous()
        w, importance = torch.randn(rows, k).to(DTYPES[i % 3]), h.diagonal().float()
        shuffled = torch.randperm(k) if group == -1 else None
        codes = reference.quantize(w, 4, group, False, "float32")
        for fit, order, points, given in [
            ("in_order", shuffled, 0, (None, None)),
            ("in_order", None, 40, (None, None)),
            ("before", torch.randperm(k), 20 * (i % 2), (None, None)),
            ("in_order", torch.randperm(k) if i % 2 else None, 0, codes[1:]),
        ]:
            if given[0] is None and fit == "in_order" and group == 25 and device.type == "cpu":
                continue  # served by the plain twin, which sums in float64
            head = (4, group, bool(i % 2), "float16" if i % 2 else "float32", fit, points)
            tail = (importance if points else None, order, *given)
            with native_cpu(device):
                want = ops.gptq(w, c, *head, *tail)
            moved = [t if t is None else t.to(device) for t in tail]
            got = ops.gptq(w.to(device), c.to(device), *head, *moved)
            yield from _exact(f"[{rows}, {k}] group {group} {fit} {points}", got, want)


def _off_by_one(x: Tensor) -> Tensor:
    """The same numbers where no access of more than one element is aligned."""
    buffer = x.new_empty(x.numel() + 1)
    buffer[1:] = x.flatten()
    return buffer[1:].view_as(x)


@sweep
def hadamard(device: torch.device) -> Iterator[Answer]:
    """Against float64: at most one rounding per butterfly and per addition of the bases."""
    for i, n in enumerate(HADAMARDS):
        p = plan(n)
        bases = p.bases() if p.m > 1 else []
        signs = (torch.randint(0, 2, (n,)) * 2 - 1).to(torch.int8) if i % 2 else None
        x = torch.randn(_rows(n), n).to(DTYPES[i % 3])
        moved = None if signs is None else signs.to(device)
        given = _off_by_one(x.to(device)) if i % 5 == 3 else x.to(device)
        got = ops.hadamard(given, [base.to(device) for base in bases], moved)
        want = transform(x.double() * (1 if signs is None else signs), p)
        size = x.double().norm(dim=1, keepdim=True)
        bound = (p.k + p.m + 2) * 2.0**-23 * size + 2 * ROUND[x.dtype] * want.abs() + 2.0**-24
        yield f"{n} = {p.m} x 2^{p.k} {x.dtype}", got, want, bound
    for n in (640, 11008):  # rows that halves hold only scaled, and one that they cannot
        p = plan(n)
        x = torch.randn(4, n) * torch.tensor([[1.0], [1e-30], [1e35], [1.0]])
        x[3, 5] = -torch.inf
        got = ops.hadamard(x.to(device), [base.to(device) for base in p.bases()])
        want = transform(x.double(), p)
        bound = (p.k + p.m + 4) * 2.0**-23 * x.double().norm(dim=1, keepdim=True)
        yield f"{n} large and small", got[:3], want[:3], bound[:3]
        yield f"{n} infinite", got[3:], want[3:].float(), None


@sweep
def hadamard_quantize(device: torch.device) -> Iterator[Answer]:
    """Sums run in another order than torch's: compared as numbers, within one step."""
    for i, n in enumerate(HADAMARDS):
        p = plan(n)
        bases = p.bases() if p.m > 1 else []
        signs = (torch.randint(0, 2, (n,)) * 2 - 1).to(torch.int8) if i % 2 else None
        x = torch.randn(_rows(n), n).to(DTYPES[i % 3])
        x[1] = 0.0
        if i % 4 == 0:
            x[2, n // 2] = float("inf")
        moved = [base.to(device) for base in bases], None if signs is None else signs.to(device)
        for bits in (8, 4) if n % 8 == 0 else (8,):
            clip = (None, 1.0, 0.9)[(i + bits // 8) % 3]
            got = ops.hadamard_quantize(x.to(device), *moved, bits, clip)
            want = reference.hadamard_quantize(x, bases, signs, bits, clip)
            relative = (p.k + p.m + 4) * 2.0**-23
            step = want[1].double().nan_to_num(1.0)
            size = x.double().nan_to_num(0.0, 0.0).norm(dim=1)
            what = f"{n} = {p.m} x 2^{p.k} {x.dtype} {bits} bits, clip {clip}"
            yield f"{what} scale", got[1], want[1], relative * size + 1e-30
            back = []
            for q, s in (got, want):
                q = reference.fours_of_words(q.cpu()) if bits == 4 else q.cpu()
                back.append(q.double() * s.cpu().double()[:, None])
            yield what, back[0], back[1], (step * 1.001 + 2**bits * relative * size)[:, None]
