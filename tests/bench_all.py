"""Every kernel against its peers and the machine's limit: python tests/bench_all.py [--json F]

Ratios are peer time / our time in one run (higher is better), minima and medians of rounds; each
result is checked before it is timed and a wrong one ends the run with status 1. Bars are those of
the project's targets; a missed one is printed, not an error: a busy machine decides that too.
Peers that are not installed (onnxruntime) are left out and named.
"""

import argparse
import json
import os
import platform

import torch

from bench import Case, close
from fewbit import _C, ops
from fewbit.ops import pack, quantize

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
    if m == 1:
        buffer = torch.ones(max(size // 4, 1 << 24))  # past the cache: scaled to our bytes below
        scale = 4 * buffer.numel() / size
        contenders["read"] = buffer.sum
        # bar: our bytes per second >= 0.85 of the read's
        if not integer and size > 16 << 20:
            bars.append(("read", 0.85 * scale))
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
    """Against copying the same bytes to a tensor that exists, and to a fresh one."""
    w = torch.randn(4096, 11008)
    q, s, z = quantize(w)
    packed = pack(q, s, z)
    codes, floats = torch.empty_like(q), torch.empty_like(w)

    def copies(source, target):
        return {"copy": lambda: target.copy_(source), "clone": source.clone}

    def case(op, ours, check, source, target):
        contenders = {"ours": ours} | copies(source, target)
        # A fresh result pays for its page faults, as clone's does: both are told apart.
        bars = [("copy", 1 / 1.3), ("clone", 1 / 1.3)]
        return Case(op, "4096x11008 fp32 4 bits g128", contenders, check, bars)

    equal = torch.testing.assert_close
    from fewbit import reference

    few = (w[:64], 4, 128, False, "float32")
    # Each is compared with copying as many bytes as it reads and writes.
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
    yield Case("quantize_per_token", "2048x4096 fp32",
               {"ours": lambda: ops.quantize_per_token(x)} | copies(x[: len(target)], target),
               lambda: equal(ops.quantize_per_token(x[:64])[0], want, rtol=0, atol=0),
               [("copy", 1 / 1.3)])  # fmt: skip


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


def overhead_case():
    w, x = torch.randn(16, 16), torch.randn(16, 16)
    packed = pack(*quantize(w, 4, 16), 4, 16)

    def many(f):
        def run():
            for _ in range(1000):
                f()
        return run

    contenders = {
        "ours": many(lambda: ops.w4a16_linear(x, *packed, None, 16, 4, 16)),
        "torch fp32": many(lambda: torch.nn.functional.linear(x, w)),
    }
    return Case("call overhead", "1000 calls of 16x16", contenders, lambda: None, [],
                "bar: at most 5 us above torch: 1 ms is 1 us a call")  # fmt: skip


def cases(quick):
    for n, k in LAYERS[:1] if quick else LAYERS:
        yield lambda n=n, k=k: weight_cases("w4a16_linear", n, k, 1)
        yield lambda n=n, k=k: weight_cases("w4a8_linear", n, k, 1)
    for m in (2, 4, 8, 16, 32, 64, 512):
        yield lambda m=m: weight_cases("w4a16_linear", 4096, 4096, m)
    for m in (16, 512):
        yield lambda m=m: weight_cases("w4a8_linear", 4096, 4096, m)
    if not quick:
        for bits in (2, 3, 8):
            for m in (1, 16, 512):
                yield lambda m=m, bits=bits: weight_cases("w4a16_linear", 4096, 4096, m, bits)
    for m in (1, 16, 512):
        yield lambda m=m: w8a8_case(4096, 4096, m)
    for outliers in (0, 6, 64):
        for m in (1, 512):
            yield lambda m=m, outliers=outliers: w8a8_case(4096, 4096, m, outliers)
    yield overhead_case


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results here too")
    parser.add_argument("--threads", default="1,2", help="thread counts, in turn")
    parser.add_argument("--only", default="", help="operators whose name holds this")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    a = parser.parse_args()
    results = []
    for threads in map(int, a.threads.split(",")):
        torch.set_num_threads(threads)
        print(f"# {_C.isa()}, {threads} threads, load {os.getloadavg()[0]:.1f}", flush=True)
        made = [c for c in cases(a.quick)]
        for make in made:
            case = make()
            if a.only in case.op:
                case.run(a.rounds)
                print(case.line(), flush=True)
                results.append(case.result)
        for group in (copy_cases, statistics_cases):
            for case in group():
                if a.only in case.op:
                    case.run(a.rounds)
                    print(case.line(), flush=True)
                    results.append(case.result)
    if a.json:
        machine = {"isa": _C.isa(), "cpu": platform.processor(), "load": os.getloadavg()[0]}
        with open(a.json, "w") as f:
            json.dump({"machine": machine, "results": results}, f, indent=1)


if __name__ == "__main__":
    main()
