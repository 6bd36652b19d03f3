"""Every kernel against its peers and the machine's limit: python tests/bench_all.py [--json F]

``--write NAME`` keeps the ratios as those of the CPU NAME, for scripts/accuracy_table.py.
The last lines say how much faster two threads are than one.
Ratios are peer time / our time in one run (higher is better), minima and medians of rounds; each
result is checked before it is timed and a wrong one ends the run with status 1. Bars are those of
the project's targets; a missed one is printed, not an error: a busy machine decides that too.
Peers that are not installed (onnxruntime) are left out and named.
"""

import argparse
import json
import os
import warnings
from pathlib import Path

import torch

import bench_gptq
import bench_hadamard
import bench_search_scale
from bench import Case, close, reuse_memory
from fewbit import _C, ops
from fewbit.linear import PackedLinear
from fewbit.ops import pack, quantize

STORED = Path(__file__).resolve().parent / "results" / "kernels.json"
LAYERS = [(4096, 4096), (11008, 4096), (4096, 11008)]  # (out_features, in_features)


def weight_cases(op, n, k, m, bits=4):
    """w4a16 against torch's float layer, onnxruntime, the memory and the matmul rate."""
    w, x = torch.randn(n, k) / 64, torch.randn(m, k)
    codes = quantize(w, bits, 128, False, "float16")
    packed = pack(*codes, bits, 128)
    deq = ops.dequantize(*codes, 128)
    integer = op == "w4a8_linear"

    def ours():
        if integer:
            return ops.w8a8_linear(x, *packed, None, n, bits, 128)
        return ops.w4a16_linear(x, *packed, None, n, bits, 128)

    contenders = {"ours": ours, "torch fp32": lambda: x @ deq.T}
    bars = [("torch fp32", 1.0)]
    peers = {} if bits != 4 else onnx_peers(deq, x, codes)
    contenders |= peers
    size = sum(t.numel() * t.element_size() for t in packed)
    if m in (16, 512) and not integer:
        a = torch.randn(1024, k)
        contenders["matmul 1024"] = lambda: a @ deq.T
        if m == 16:
            bars.append(("matmul 1024", 0.9 * 1024 / 16))
    if "ort acc4" in peers and m == 1:
        bars.append(("ort acc4", 1.2 if integer else 1.0))
    if "ort acc0" in peers and m == 16 and not integer:
        bars.append(("ort acc0", 1.35))
    if integer and m > 1:
        contenders["torch int8"] = dynamic_int8(deq, x)
        bars = [("torch int8", 0.9)] if m == 512 else bars
        if "ort acc4" in peers and m == 16:
            bars.append(("ort acc4", 1.3))
    want = x.double() @ deq.double().T
    check = lambda: close(ours(), want, 3e-2 if integer else 1e-5)  # noqa: E731
    return Case(op, f"M={m} {n}x{k} {bits} bits g128", contenders, check, bars,
                f"{size / 1e6:.1f} MB of weight")  # fmt: skip


def memory_case():
    """A weight larger than the caches against reading as many bytes."""
    n, k = 28672, 8192
    codes = quantize(torch.randn(n, k) / 64, 4, 128, False, "float16")
    x, packed = torch.randn(1, k), pack(*codes, 4, 128)
    buffer = torch.ones(sum(t.numel() * t.element_size() for t in packed) // 4)
    ours = lambda: ops.w4a16_linear(x, *packed, None, n, 4, 128)  # noqa: E731
    check = lambda: close(ours(), x.double() @ ops.dequantize(*codes, 128).double().T, 1e-5)  # noqa: E731
    return Case("w4a16_linear", f"M=1 {n}x{k} 4 bits g128", {"ours": ours, "read": buffer.sum},
                check, [("read", 0.85)])  # fmt: skip


def onnx_peers(w, x, codes):
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return {}
    n, k = w.shape
    q, s, z = codes
    pairs = q.reshape(n, k // 128, 64, 2)
    zeros = torch.nn.functional.pad(z, (0, z.shape[1] % 2)).reshape(n, -1, 2)
    initial = {
        "b": (pairs[..., 0] | pairs[..., 1] << 4).contiguous(),
        "s": s.float().flatten(),
        "z": (zeros[..., 0] | zeros[..., 1] << 4).flatten(),
    }
    found = {}
    for level in (0, 4):
        node = helper.make_node(
            "MatMulNBits", ["x", "b", "s", "z"], ["y"], domain="com.microsoft", K=k, N=n, bits=4,
            block_size=128, accuracy_level=level,
        )  # fmt: skip
        graph = helper.make_graph(
            [node], "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, n])],
            [numpy_helper.from_array(t.numpy(), name) for name, t in initial.items()],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        feed = {"x": x.numpy()}
        got = torch.from_numpy(session.run(None, feed)[0])
        close(got, x @ w.T, 3e-2)
        found[f"ort acc{level}"] = lambda s=session, f=feed: s.run(None, f)
    return found


def dynamic_int8(w, x):
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight.data = w
    model = torch.ao.quantization.quantize_dynamic(
        torch.nn.Sequential(layer), {torch.nn.Linear}, dtype=torch.qint8
    )
    return lambda: model(x)


def w8a8_case(n, k, m, outliers=None):
    w, x = torch.randn(n, k) / 64, torch.randn(m, k).clamp(-5, 5)
    packed = pack(*quantize(w, 8, -1, True), 8, -1)

    def plain():
        return ops.w8a8_linear(x, *packed, None, n)

    if outliers is None:
        check = lambda: close(plain(), x @ w.T, 3e-2)  # noqa: E731
        peers = {"torch int8": dynamic_int8(w, x), "torch fp32": lambda: x @ w.T}
        contenders = {"ours": plain} | peers
        return Case("w8a8_linear", f"M={m} {n}x{k}", contenders, check, [("torch int8", 1.0)])
    x[:, torch.randperm(k)[:outliers]] = 20.0
    ours = lambda: ops.int8_mixed_linear(x, *packed, None, n)  # noqa: E731
    check = lambda: close(ours(), x @ w.T, 3e-2)  # noqa: E731
    contenders = {"ours": ours, "our w8a8": plain}
    shape = f"M={m} {n}x{k} {outliers} outliers"
    return Case("int8_mixed_linear", shape, contenders, check, [("our w8a8", 0.9)])


def copy_cases():
    """Against copying as many bytes as are read and written."""
    w = torch.randn(4096, 11008)
    q, s, z = quantize(w)
    packed = pack(q, s, z)
    codes, floats = torch.empty_like(q), torch.empty_like(w)

    def case(op, ours, check, source, target, shape="4096x11008 fp32 4 bits g128"):
        contenders = {"ours": ours, "copy": lambda: target.copy_(source)}
        return Case(op, shape, contenders, check, [("copy", 1 / 1.3)])

    equal = torch.testing.assert_close
    from fewbit import reference

    few = (w[:64], 4, 128, False, "float32")
    yield case("pseudo_quantize", lambda: ops.pseudo_quantize(w),
               lambda: equal(ops.pseudo_quantize(*few), reference.pseudo_quantize(*few), rtol=0,
                             atol=0), w, floats)  # fmt: skip
    scratch = w.clone()
    yield case("pseudo_quantize_", lambda: ops.pseudo_quantize_(scratch), lambda: None, w, floats)
    part = w[: 4096 * 5 // 8]  # 4 bytes read and 1 written, as a copy that reads and writes 2.5
    yield case("quantize", lambda: quantize(w),
               lambda: equal(quantize(*few)[0], reference.quantize(*few)[0], rtol=0, atol=0),
               part, floats[: len(part)])  # fmt: skip
    yield case("dequantize", lambda: ops.dequantize(q, s, z),
               lambda: equal(ops.dequantize(q, s, z), ops.pseudo_quantize(w), rtol=0, atol=0),
               part, floats[: len(part)])  # fmt: skip
    part = q[: 4096 * 3 // 4]  # 1 byte read and 1/2 written
    back = lambda: ops.unpack(*packed, 4096, 11008)  # noqa: E731
    yield case("pack", lambda: pack(q, s, z), lambda: equal(back()[0], q), part, codes[: len(part)])
    yield case("unpack", back, lambda: equal(back()[0], q), part, codes[: len(part)])
    x = torch.randn(2048, 4096)
    target = torch.empty_like(x)[: 2048 * 5 // 8]
    want = reference.quantize_per_token(x[:64], True, None, None)[0]
    yield case("quantize_per_token", lambda: ops.quantize_per_token(x),
               lambda: equal(ops.quantize_per_token(x[:64])[0], want, rtol=0, atol=0),
               x[: len(target)], target, "2048x4096 fp32")  # fmt: skip


def statistics_cases():
    x = torch.randn(2048, 4096)
    g = torch.zeros(4096, 4096)
    total, top = torch.zeros(4096, dtype=torch.float64), torch.zeros(4096)

    def check_gram():
        part = torch.zeros(4096, 4096)
        ops.gram(x, part)
        close(part, x.T @ x, 1e-5)

    def check_stats():
        sums, most = torch.zeros(4096, dtype=torch.float64), torch.zeros(4096)
        ops.act_stats(x, sums, most)
        close(sums, x.double().abs().sum(0), 1e-12)

    yield Case("gram", "2048x4096", {"ours": lambda: ops.gram(x, g), "x.T @ x": lambda: x.T @ x},
               check_gram, [("x.T @ x", 1.0)])  # fmt: skip
    yield Case("act_stats", "2048x4096",
               {"ours": lambda: ops.act_stats(x, total, top), "read": x.sum},
               check_stats, [("read", 1 / 1.3)])  # fmt: skip


CALLS = 100  # few, so that some round is free of other processes


class Overhead(Case):
    """Microseconds of a call above torch's."""

    def run(self, rounds):
        super().run(10 * rounds)
        least = self.result["min_ms"]
        self.result["us_above_torch"] = 1e3 * (least["ours"] - least["torch"]) / CALLS

    def line(self):
        above = self.result["us_above_torch"]
        missed = "" if above <= 5 else ", MISSED"
        threads = self.result["threads"]
        return f"{threads}t {self.op:18} {above:.1f} us a call above torch (bar 5{missed})"


def overhead_cases():
    """A call of 16x16 beside torch's linear; for modules, beside nn.Linear."""
    w, x, g = torch.randn(16, 16), torch.randn(16, 16), torch.zeros(16, 16)
    codes = quantize(w, 4, 16)
    packed, bytes_ = pack(*codes, 4, 16), pack(*quantize(w, 8, -1, True), 8, -1)
    one, total, top = torch.ones(16), torch.zeros(16, dtype=torch.float64), torch.zeros(16)
    calls = {
        "quantize": lambda: quantize(w, 4, 16),
        "dequantize": lambda: ops.dequantize(*codes, 16),
        "pseudo_quantize": lambda: ops.pseudo_quantize(w, 4, 16),
        "pack": lambda: pack(*codes, 4, 16),
        "unpack": lambda: ops.unpack(*packed, 16, 16, 4, 16),
        "quantize_per_token": lambda: ops.quantize_per_token(x),
        "norm_quantize": lambda: ops.norm_quantize(x, one),
        "act_stats": lambda: ops.act_stats(x, total, top),
        "gram": lambda: ops.gram(x, g),
        "hadamard": lambda: ops.hadamard(x),
        "w4a16_linear": lambda: ops.w4a16_linear(x, *packed, None, 16, 4, 16),
        "w4a8_linear": lambda: ops.w8a8_linear(x, *packed, None, 16, 4, 16),
        "w8a8_linear": lambda: ops.w8a8_linear(x, *bytes_, None, 16),
        "int8_mixed_linear": lambda: ops.int8_mixed_linear(x, *bytes_, None, 16),
    }
    layer = torch.nn.Linear(16, 16)
    module = PackedLinear.from_linear(layer, "w4a16g128")
    pairs = {op: (call, lambda: torch.nn.functional.linear(x, w)) for op, call in calls.items()}
    pairs["PackedLinear"] = (lambda: module(x), lambda: layer(x))

    def many(f):
        def run():
            for _ in range(CALLS):
                f()

        return run

    for op, (ours, theirs) in pairs.items():
        contenders = {"ours": many(ours), "torch": many(theirs)}
        yield Overhead(op, f"{CALLS} calls of 16x16", contenders, lambda: None, [])


def solver_results(only):
    """The solver and the search of one 4096 x 4096 layer; bars are of ours to eager torch."""
    found = []
    for op, measure, bar in (
        ("gptq solve", lambda: bench_gptq.speed(repeats=1)["ratio"], 1 / 3),
        ("awq search", lambda: bench_search_scale.main(repeats=1)["ratio"], 1 / 6),
    ):
        if only in op:
            ratio = measure()
            missed = "" if ratio <= bar else ", MISSED"
            print(f"{op:21} {ratio:.3f} of eager (bar {bar:.3f}{missed})", flush=True)
            threads = torch.get_num_threads()
            found.append({"op": op, "threads": threads, "of eager": ratio, "bar": bar})
    return found


def ratios(results):
    """{row: {"bar": least ratio, threads: ratio}} of all results; widths of the Hadamard transform
    are counted, and of the calls the dearest stands for all."""
    found, widths, calls = {}, {}, {}

    def put(row, bar, threads, ratio):
        found.setdefault(row, {"bar": round(bar, 3)})[str(threads)] = round(ratio, 3)

    for r in results:
        threads = r["threads"]
        if "of eager" in r:
            put(f"{r['op']} over eager torch", 1 / r["bar"], threads, 1 / r["of eager"])
        elif "us_above_torch" in r:
            calls.setdefault(threads, []).append(r["us_above_torch"])
        elif r["op"] == "hadamard":
            for b in r["bars"]:
                kind = "2^k" if b["bar"] > 0.5 else "m 2^k"
                widths.setdefault((kind, b["bar"], threads), []).append(b["ratio"] >= b["bar"])
        else:
            for b in r["bars"]:
                bar, ratio, label = b["bar"], b["ratio"], b["against"]
                if label == "matmul 1024":  # of 1024 rows, which take as many products
                    rows = int(r["shape"].split()[0][2:]) / 1024
                    bar, ratio, label = bar * rows, ratio * rows, "the matmul rate"
                put(f"{r['op']} {r['shape']} over {label}", bar, threads, ratio)
    for (kind, bar, threads), met in widths.items():
        row = f"hadamard, share of {len(met)} widths {kind} within {1 / bar:.1f} clones"
        put(row, 1.0, threads, sum(met) / len(met))
    for threads, above in calls.items():
        put(f"5 us over the call of 16x16 above torch's, dearest of {len(above)} operators", 1.0,
            threads, 5.0 / max(max(above), 0.01))  # fmt: skip
    return found


def print_scaling(results):
    """Time on one thread over time on two; the bar is for ops bound by arithmetic."""
    least = {(r["op"], r["shape"], r["threads"]): r["min_ms"]["ours"]
             for r in results if "shape" in r and "us_above_torch" not in r}  # fmt: skip
    for (op, shape, threads), time in least.items():
        if threads == 2 and (op, shape, 1) in least:
            print(f"2 threads: {least[op, shape, 1] / time:.2f}x  {op} {shape}")


def cases(quick):
    def weights(op, n, k, m, bits=4):
        return op, lambda: weight_cases(op, n, k, m, bits)

    for n, k in LAYERS[:1] if quick else LAYERS:
        yield weights("w4a16_linear", n, k, 1)
        yield weights("w4a8_linear", n, k, 1)
    yield "w4a16_linear", memory_case
    for m in (2, 4, 8, 16, 32, 64, 512):
        yield weights("w4a16_linear", 4096, 4096, m)
    for m in (16, 512):
        yield weights("w4a8_linear", 4096, 4096, m)
    if not quick:
        for bits in (2, 3, 8):
            for m in (1, 16, 512):
                yield weights("w4a16_linear", 4096, 4096, m, bits)
    for m in (1, 16, 512):
        yield "w8a8_linear", lambda m=m: w8a8_case(4096, 4096, m)
    for outliers in (0, 6, 64):
        for m in (1, 512):
            yield "int8_mixed_linear", lambda m=m, o=outliers: w8a8_case(4096, 4096, m, o)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results here too")
    parser.add_argument("--write", metavar="NAME", help="keep the ratios as those of this CPU")
    parser.add_argument("--threads", default="1,2", help="thread counts, in turn")
    parser.add_argument("--only", default="", help="operators whose name holds this")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    a = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.ao is the peer
    reuse_memory()
    results = []
    for threads in map(int, a.threads.split(",")):
        torch.set_num_threads(threads)
        print(f"# {_C.isa()}, {threads} threads, load {os.getloadavg()[0]:.1f}", flush=True)
        for op, make in cases(a.quick):
            if a.only in op:
                case = make()
                case.run(a.rounds)
                print(case.line(), flush=True)
                results.append(case.result)
        groups = (copy_cases, statistics_cases, bench_hadamard.cases, overhead_cases)
        for group in groups:
            for case in group():
                if a.only in case.op:
                    case.run(a.rounds)
                    print(case.line(), flush=True)
                    results.append(case.result)
        if not a.quick:
            results += solver_results(a.only)
    print_scaling(results)
    if a.json:
        machine = {"isa": _C.isa(), "load": os.getloadavg()[0]}
        with open(a.json, "w") as f:
            json.dump({"machine": machine, "results": results}, f, indent=1)
    if a.write:
        stored = json.loads(STORED.read_text()) if STORED.exists() else {}
        stored[a.write] = {"isa": _C.isa(), "rows": ratios(results)}
        STORED.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
