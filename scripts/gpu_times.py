"""What gpu_check.py times: per op its shapes, the bytes it must move, its operations, its peers.

Shapes and peers are those that the kernels' targets name. A call takes the number of a copy of its
inputs: copies are rotated so that nothing is found in the L2 cache of the call before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit import ops, reference
from fewbit.hadamard import hadamard_matrix, plan

Call = Callable[[int], object]

# Rows and columns of the weight.
LAYERS = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (8192, 28672)]
LLAMA_8B = LAYERS[:3]
FOURS = [(4096, 4096), (11008, 4096)]
SOLVED = [(4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096)]
WIDE = (28672, 8192)
WIDTHS = [128, 4096, 8192, 11008, 14336, 28672, 32768]


@dataclass
class Case:
    """One call: ``rate`` names the measured rate that bounds its ``operations``."""

    shape: str
    call: Call
    moved: float
    operations: float = 0.0
    rate: str = "fp16"
    copies: int = 1
    peers: dict[str, Callable[[], Call]] = field(default_factory=dict)
    refill: Callable[[], None] = lambda: None


class Bench:
    """Makes the cases of a device; ``small`` ones are for a look at graphs and for tests."""

    def __init__(self, device: torch.device, small: bool = False) -> None:
        self.device, self.small = device, small
        self.cache = 0
        if device.type == "cuda" and not small:
            self.cache = torch.cuda.get_device_properties(device).L2_cache_size

    def copies(self, size: float) -> int:
        """How many inputs of ``size`` bytes are twice as large as the cache."""
        return max(1, min(64, -(-2 * self.cache // max(int(size), 1))))

    def some(self, shapes: list) -> list:
        return shapes[:1] if self.small else shapes

    def cut(self, n: int) -> int:
        return min(n, 256) if self.small else n

    def normal(self, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)

    def weights(self, n: int, k: int, bits: int, group: int, scale_dtype: str) -> list[tuple]:
        """Copies of (float16 weight, codes, packed weight)."""
        made = []
        for _ in range(self.copies(n * k * bits / 8)):
            w = self.normal(n, k)
            codes = ops.quantize(w, bits, group, bits == 8, scale_dtype)
            made.append((w, codes, ops.pack(*codes, bits, group)))
        return made

    def floats(self, n: int, k: int) -> list[Tensor]:
        return [self.normal(n, k) for _ in range(self.copies(2 * n * k))]

    # ---- weights -------------------------------------------------------------------------------

    def _grids(self) -> Iterator[tuple[str, int, list[Tensor]]]:
        n, k = (self.cut(s) for s in WIDE)
        inputs = self.floats(n, k)
        for group in self.some([128, 32, 64, -1]):
            yield f"{n} x {k}, group {group}", group, inputs

    def quantize(self) -> Iterator[Case]:
        for shape, group, w in self._grids():
            yield Case(
                shape, lambda i, w=w, g=group: ops.quantize(w[i], 4, g), 3 * w[0].numel(),
                copies=len(w), refill=lambda w=w: w[0].normal_(),
                peers={"torch": lambda w=w, g=group: _plain(reference.quantize, w, 4, g, False,
                                                            "float32")},
            )  # fmt: skip

    def pseudo_quantize(self) -> Iterator[Case]:
        for shape, group, w in self._grids():
            def plain(w=w, g=group):
                return _plain(reference.pseudo_quantize, w, 4, g, False, "float32")

            def compiled(w=w, g=group):
                one = torch.compile(reference.pseudo_quantize)
                return lambda i: one(w[i], 4, g, False, "float32")

            yield Case(
                shape, lambda i, w=w, g=group: ops.pseudo_quantize(w[i], 4, g), 4 * w[0].numel(),
                copies=len(w), refill=lambda w=w: w[0].normal_(),
                peers={"torch": plain, "torch.compile": compiled},
            )  # fmt: skip

    def dequantize(self) -> Iterator[Case]:
        for shape, group, w in self._grids():
            codes = [ops.quantize(x, 4, group) for x in w]
            yield Case(
                shape, lambda i, c=codes, g=group: ops.dequantize(*c[i], g, "float16"),
                3 * w[0].numel(), copies=len(w),
                peers={"torch": lambda c=codes, g=group: _plain_of(reference.dequantize, c, g,
                                                                   "float16")},
            )  # fmt: skip

    def pack(self) -> Iterator[Case]:
        for shape, group, w in self._grids():
            codes = [ops.quantize(x, 4, group, False, "float16") for x in w]
            yield Case(
                shape, lambda i, c=codes, g=group: ops.pack(*c[i], 4, g), 1.5 * w[0].numel(),
                copies=len(w),
                peers={"torch": lambda c=codes, g=group: _plain_of(reference.pack, c, 4, g)},
            )  # fmt: skip

    def unpack(self) -> Iterator[Case]:
        for shape, group, w in self._grids():
            n, k = w[0].shape
            packed = [ops.pack(*ops.quantize(x, 4, group, False, "float16"), 4, group) for x in w]
            yield Case(
                shape, lambda i, p=packed, g=group, n=n, k=k: ops.unpack(*p[i], n, k, 4, g),
                1.5 * n * k, copies=len(w),
                peers={"torch": lambda p=packed, g=group, n=n, k=k: _plain_of(
                    reference.unpack, p, n, k, 4, g)},
            )  # fmt: skip

    def scaled_error(self) -> Iterator[Case]:
        """AWQ's search: 20 candidates; beside it the eager search, and the products alone."""
        for n, k in self.some([(4096, 4096), (14336, 4096)]):
            n, k = self.cut(n), self.cut(k)
            w, s = self.normal(n, k), torch.rand(20, k, device=self.device) + 0.5

            def eager(w=w, s=s):
                def all_of_them(_):
                    for one in s:
                        reference.pseudo_quantize(w * one, 4, 128, False, "float32") / one - w

                return all_of_them

            yield Case(
                f"{n} x {k}, 20 scales", lambda i, w=w, s=s: ops.scaled_error(w, s, 4, 128),
                2 * n * k + 20 * 2 * n * k, refill=w.normal_, peers={"20 eager searches": eager},
            )  # fmt: skip

    def gptq(self) -> Iterator[Case]:
        for n, k in self.some(SOLVED):
            n, k = self.cut(n), self.cut(k)
            w = self.normal(n, k)
            c = torch.triu(self.normal(k, k, dtype=torch.float32), 1) * (0.1 / k**0.5)
            yield Case(
                f"{n} x {k}", lambda i, w=w, c=c: ops.gptq(w, c, 4, 128), n * k * 4.0,
                float(n) * k * k, rate="fp32", refill=w.normal_,
                peers={"a loop over columns in torch": lambda w=w, c=c: lambda i: torch_gptq(w, c)},
            )  # fmt: skip

    # ---- activations ---------------------------------------------------------------------------

    def _tokens(self) -> Iterator[tuple[str, list[Tensor]]]:
        for k in self.some([4096, 8192]):
            for m in self.some([2048, 1, 16384]):
                m, k = self.cut(m), self.cut(k)
                yield f"{m} x {k}", self.floats(m, k)

    def act_stats(self) -> Iterator[Case]:
        for shape, x in self._tokens():
            k = x[0].shape[1]
            total = torch.zeros(k, dtype=torch.float64, device=self.device)
            top = torch.zeros(k, device=self.device)
            yield Case(
                shape, lambda i, x=x, a=total, b=top: ops.act_stats(x[i], a, b),
                2 * x[0].numel(), copies=len(x),
                peers={"torch": lambda x=x, a=total, b=top: _plain(reference.act_stats, x, a, b)},
            )  # fmt: skip

    def quantize_per_token(self) -> Iterator[Case]:
        for shape, x in self._tokens():
            yield Case(
                shape, lambda i, x=x: ops.quantize_per_token(x[i]), 3 * x[0].numel(),
                copies=len(x), refill=lambda x=x: x[0].normal_(),
                peers={"torch": lambda x=x: _plain(reference.quantize_per_token, x, True, None,
                                                   None)},
            )  # fmt: skip

    def norm_quantize(self) -> Iterator[Case]:
        for shape, x in self._tokens():
            norm = torch.rand(x[0].shape[1], device=self.device)

            def compiled(x=x, norm=norm):
                one = torch.compile(reference.norm_quantize)
                return lambda i: one(x[i], norm, None, 1e-6, True, True)

            yield Case(
                shape, lambda i, x=x, norm=norm: ops.norm_quantize(x[i], norm),
                3 * x[0].numel(), copies=len(x), refill=lambda x=x: x[0].normal_(),
                peers={
                    "torch": lambda x=x, norm=norm: _plain(reference.norm_quantize, x, norm, None,
                                                           1e-6, True, True),
                    "torch.compile": compiled,
                },
            )  # fmt: skip

    def _hadamards(self) -> Iterator[tuple[str, list[Tensor], Tensor | None]]:
        for n in self.some(WIDTHS):
            p = plan(n)
            base = None if p.m == 1 else hadamard_matrix(p.m).to(self.device)
            for m in self.some([8192, 1, 64]):
                yield f"{self.cut(m)} x {n} = {p.m} x 2^{p.k}", self.floats(self.cut(m), n), base

    def hadamard(self) -> Iterator[Case]:
        for shape, x, base in self._hadamards():
            def fast(x=x, n=x[0].shape[1]):
                from fast_hadamard_transform import hadamard_transform

                return lambda i: hadamard_transform(x[i], n**-0.5)

            peers = {"clone": lambda x=x: lambda i: x[i].clone()}
            if base is None:
                peers["fast-hadamard-transform"] = fast
            yield Case(
                shape, lambda i, x=x, b=base: ops.hadamard(x[i], b), 4 * x[0].numel(),
                copies=len(x), refill=lambda x=x: x[0].normal_(), peers=peers,
            )  # fmt: skip

    def hadamard_quantize(self) -> Iterator[Case]:
        for bits in (8, 4):
            for shape, x, base in self._hadamards():
                yield Case(
                    f"{shape}, {bits} bits",
                    lambda i, x=x, b=base, bits=bits: ops.hadamard_quantize(x[i], b, None, bits),
                    (2 + bits / 8) * x[0].numel(), copies=len(x),
                    refill=lambda x=x: x[0].normal_(),
                    peers={"clone": lambda x=x: lambda i: x[i].clone()},
                )  # fmt: skip

    # ---- products ------------------------------------------------------------------------------

    def _products(self, layers: list, rows: list[int], bits: int, group: int) -> Iterator[tuple]:
        for n, k in self.some(layers):
            n, k = self.cut(n), self.cut(k)
            made = self.weights(n, k, bits, group, "float16" if bits == 4 else "float32")
            for m in self.some(rows):
                yield f"{m} x {n} x {k}", m, n, k, made, self.normal(m, k)

    def w4a16_linear(self) -> Iterator[Case]:
        rows = [1, 2, 4, 8, 16, 32, 64, 128, 512, 2048]
        for shape, m, n, k, made, x in self._products(LAYERS, rows, 4, 128):
            yield Case(
                shape, lambda i, p=made, x=x, n=n: ops.w4a16_linear(x, *p[i][2], None, n, 4, 128),
                0.52 * n * k + 2 * m * (n + k), 2.0 * m * n * k, copies=len(made),
                refill=x.normal_,
                peers={
                    "torch fp16 linear": lambda p=made, x=x: lambda i: F.linear(x, p[i][0]),
                    "torch int4 (tinygemm)": lambda p=made, x=x: tinygemm(p, x),
                    "gemlite": lambda p=made, x=x: gemlite(p, x),
                    "humming": lambda p=made, x=x: humming(p, x),
                    "bitsandbytes nf4": lambda p=made, x=x: nf4(p, x),
                },
            )  # fmt: skip

    def w8a8_linear(self) -> Iterator[Case]:
        rows = [1, 16, 64, 256, 2048, 8192]
        for shape, m, n, k, made, x in self._products(LAYERS, rows, 8, -1):
            yield Case(
                shape, lambda i, p=made, x=x, n=n: ops.w8a8_linear(x, *p[i][2], None, n),
                n * k + 3 * m * k + 2 * m * n, 2.0 * m * n * k, "int8", len(made),
                refill=x.normal_,
                peers={
                    "torch fp16 linear": lambda p=made, x=x: lambda i: F.linear(x, p[i][0]),
                    "torch._int_mm and scales": lambda p=made, x=x: int_mm(p, x),
                    "torch._scaled_mm fp8": lambda p=made, x=x: scaled_mm(p, x),
                },
            )  # fmt: skip

    def w4a4_linear(self) -> Iterator[Case]:
        for shape, m, n, k, made, x in self._products(FOURS, [16, 2048], 4, -1):
            eight = ops.pack(*ops.quantize(made[0][0], 8, -1, True), 8, -1)
            yield Case(
                shape, lambda i, p=made, x=x, n=n: ops.w4a4_linear(x, *p[i][2], None, n),
                0.5 * n * k + 2.5 * m * k + 2 * m * n, 2.0 * m * n * k, "int8", len(made),
                refill=x.normal_,
                peers={
                    "torch fp16 linear": lambda p=made, x=x: lambda i: F.linear(x, p[i][0]),
                    "our w8a8_linear": lambda e=eight, x=x, n=n: lambda i: ops.w8a8_linear(
                        x, *e, None, n),
                },
            )  # fmt: skip

    def int8_mixed_linear(self) -> Iterator[Case]:
        for outliers in self.some([6, 0, 64]):
            for shape, m, n, k, made, x in self._products(LLAMA_8B, [1, 32, 2048], 8, -1):
                x.clamp_(-4, 4)
                x[0, :outliers] = 20.0
                yield Case(
                    f"{shape}, {outliers} outliers",
                    lambda i, p=made, x=x, n=n: ops.int8_mixed_linear(x, *p[i][2], None, n),
                    n * k + 3 * m * k + 2 * m * n, 2.0 * m * n * k, "int8", len(made),
                    peers={
                        "torch fp16 linear": lambda p=made, x=x: lambda i: F.linear(x, p[i][0]),
                        "bitsandbytes LLM.int8()": lambda p=made, x=x: bitsandbytes_int8(p, x),
                    },
                )  # fmt: skip

    def cases(self, op: str) -> Iterator[Case]:
        return getattr(self, op)()


OPS = (
    "pseudo_quantize", "quantize", "dequantize", "pack", "unpack", "act_stats",
    "quantize_per_token", "norm_quantize", "hadamard", "hadamard_quantize", "w4a16_linear",
    "w8a8_linear", "int8_mixed_linear", "gptq", "scaled_error", "w4a4_linear",
)  # fmt: skip


# ---- peers ---------------------------------------------------------------------------------------


def _plain(f: Callable, inputs: list[Tensor], *arguments) -> Call:
    return lambda i: f(inputs[i], *arguments)


def _plain_of(f: Callable, inputs: list[tuple], *arguments) -> Call:
    return lambda i: f(*inputs[i], *arguments)


def tinygemm(made: list[tuple], x: Tensor) -> Call:
    """torch's int4 product, in bfloat16: zero points become offsets from the middle code."""
    packs, x = [], x.bfloat16()
    for _, (q, s, z), _ in made:
        nibbles = (q[:, ::2] << 4) | q[:, 1::2]
        offset = (8.0 - z.float()) * s.float()
        both = torch.stack([s.float(), offset], -1).transpose(0, 1).bfloat16().contiguous()
        packs.append((torch.ops.aten._convert_weight_to_int4pack(nibbles, 8), both))
    return lambda i: torch.ops.aten._weight_int4pack_mm(x, packs[i][0], 128, packs[i][1])


def gemlite(made: list[tuple], x: Tensor) -> Call:
    from gemlite.helper import A16Wn

    maker = A16Wn(device=x.device)
    layers = [maker.from_weights(q, s, z.to(s.dtype), 4, 128) for _, (q, s, z), _ in made]
    return lambda i: layers[i](x)


def humming(made: list[tuple], x: Tensor) -> Call:
    from humming.layer import HummingLayer

    layers = []
    for w, _, _ in made:
        config = {"dtype": "uint4", "group_size": 128, "has_zero_point": True}
        layer = HummingLayer(
            shape_n=w.shape[0], shape_k=w.shape[1], weight_config=config, torch_dtype=w.dtype
        ).to(w.device)
        layer.load_from_unquantized(w)
        layer.transform()
        layers.append(layer)
    return lambda i: layers[i](x)


def nf4(made: list[tuple], x: Tensor) -> Call:
    import bitsandbytes

    packs = [bitsandbytes.functional.quantize_4bit(w, quant_type="nf4") for w, _, _ in made]
    return lambda i: bitsandbytes.matmul_4bit(x, packs[i][0].t(), packs[i][1])


def int_mm(made: list[tuple], x: Tensor) -> Call:
    """int8 product and what belongs to it, apart: quantise, multiply, scale."""
    weights = [((q.int() - 128).to(torch.int8).T, s.float().T) for _, (q, s, _), _ in made]

    def call(i: int) -> Tensor:
        q, s, _ = ops.quantize_per_token(x)
        return (torch._int_mm(q, weights[i][0]) * s[:, None] * weights[i][1]).to(x.dtype)

    return call


def scaled_mm(made: list[tuple], x: Tensor) -> Call:
    """fp8, a scale a row."""
    kind = torch.float8_e4m3fn
    weights = []
    for w, _, _ in made:
        s = w.float().abs().amax(1, keepdim=True) / 448
        weights.append(((w / s).to(kind).T, s.T.contiguous()))

    def call(i: int) -> Tensor:
        s = x.float().abs().amax(1, keepdim=True) / 448
        return torch._scaled_mm(
            (x / s).to(kind), weights[i][0], scale_a=s, scale_b=weights[i][1],
            out_dtype=torch.bfloat16,
        )  # fmt: skip

    return call


def bitsandbytes_int8(made: list[tuple], x: Tensor) -> Call:
    import bitsandbytes

    layers = []
    for w, _, _ in made:
        layer = bitsandbytes.nn.Linear8bitLt(
            w.shape[1], w.shape[0], bias=False, has_fp16_weights=False, threshold=6.0
        )
        layer.weight = bitsandbytes.nn.Int8Params(w.cpu(), has_fp16_weights=False)
        layers.append(layer.to(w.device))
    return lambda i: layers[i](x)


def torch_gptq(w: Tensor, c: Tensor, bits: int = 4, group: int = 128) -> Tensor:
    """The published loop in torch: a launch or more per column, one product per block."""
    x, q = w.float(), torch.empty_like(w, dtype=torch.uint8)
    top = 2.0**bits - 1
    for start in range(0, x.shape[1], group):
        end = min(start + group, x.shape[1])
        block, errors = x[:, start:end].clone(), torch.empty_like(x[:, start:end])
        low, high = block.amin(1).clamp(max=0), block.amax(1).clamp(min=0)
        s = ((high - low) / top).clamp(min=1e-30)
        z = (-low / s).round()
        for j in range(end - start):
            code = ((block[:, j] / s).round() + z).clamp(0, top)
            q[:, start + j] = code.to(torch.uint8)
            errors[:, j] = block[:, j] - (code - z) * s
            block[:, j + 1 :] += errors[:, j, None] * c[start + j, start + j + 1 : end]
        x[:, end:] += errors @ c[start:end, end:]
    return q


# ---- measuring -----------------------------------------------------------------------------------


def seconds(call: Call, copies: int = 1) -> float:
    """A call's time: the median of graph replays, or of plain calls where it cannot be captured."""

    def timed(run: Callable[[], None], calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    for i in range(copies):
        call(i)
    torch.cuda.synchronize()
    once = timed(lambda: call(0), 1)
    count = max(copies if once < 1e-3 else 1, min(20, int(0.02 / max(once, 1e-9))), 1)

    def run() -> None:
        for i in range(count):
            call(i % copies)

    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    except Exception:  # a peer that waits for the card; what it costs is part of its time
        torch.cuda.synchronize()
    run()
    return statistics.median(timed(run, count) for _ in range(9))


def rates_of(device: torch.device, n: int = 4096) -> dict[str, float]:
    """What this card does in this run: bytes a second copied (16 n n of them), operations a second
    multiplied (n x n)."""
    source = torch.empty(16 * n * n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates = {"copy": 2 * source.numel() / seconds(lambda i: target.copy_(source))}
    flops = 2.0 * n**3
    half = torch.randn(n, n, device=device, dtype=torch.float16)
    rates["fp16"] = flops / seconds(lambda i: half @ half)
    single = half.float()
    rates["fp32"] = flops / seconds(lambda i: single @ single)
    eight = torch.randint(-127, 128, (n, n), device=device, dtype=torch.int8)
    try:
        rates["int8"] = flops / seconds(lambda i: torch._int_mm(eight, eight.T))
    except RuntimeError as error:
        print(f"torch._int_mm does not run here ({str(error)[:80]}): int8 counts as twice fp16")
        rates["int8"] = 2 * rates["fp16"]
    return rates


def measure(
    bench: Bench, rates: dict[str, float], chosen: tuple[str, ...] = OPS,
    clock: Callable[[Call, int], float] = seconds,
) -> list[dict]:  # fmt: skip
    """Every op and its peers against the op's limit; peers that do not run say why."""
    rows = []
    for op in chosen:
        for case in bench.cases(op):
            ours = clock(case.call, case.copies)
            limit = max(case.moved / rates["copy"], case.operations / rates[case.rate])
            ratios, missing = {}, {}
            for name, make in case.peers.items():
                try:
                    ratios[name] = clock(make(), case.copies) / ours
                except Exception as error:
                    missing[name] = f"{type(error).__name__}: {str(error)[:80]}"
            rows.append({
                "op": op, "shape": case.shape, "us": 1e6 * ours, "of_limit": limit / ours,
                "times_faster_than": ratios, "not_measured": missing,
            })  # fmt: skip
            others = ", ".join(f"{r:.2f}x {name}" for name, r in ratios.items())
            print(f"{op:18} {case.shape:32} {1e6 * ours:10.1f} us {100 * limit / ours:4.0f} % of"
                  f" the limit  {others}", flush=True)  # fmt: skip
            for name, why in missing.items():
                print(f"{'':18} {name} was not measured: {why}", flush=True)
    return rows
