"""F1 to F6, F18: hostile numbers, shapes and sizes. Names begin with the row of the fault table."""

import json
import math
import mmap
import subprocess
import sys

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep import METHODS, digest, quantize

import fewbit
from fewbit import calibrate, evaluate, hadamard, lab, ops, orthogonal, recipes
from fewbit.calibrate import Windows
from fewbit.errors import CalibrationError, UsageError
from fewbit.kv import kv_codes
from fewbit.report import REPORT
from fewbit.reproducible import total
from fewbit.scheme import Scheme
from fewbit.solvers.factor import RUNGS
from fewbit.solvers.gptq import GPTQ
from fewbit.source import finite
from fewbit.stats import Stats
from test_devices import arguments, tensors
from tiny import probe, tiny

RTN = RUNGS.index("rtn")


def stats_of(x):
    return Stats(len(x), x.abs().sum(0), x.abs().amax(0), x.T @ x)


@pytest.mark.parametrize(
    "kind", ["few tokens", "dead", "tiny", "outliers", "nan", "inf", "indefinite"]
)
def test_f01_gptq_finishes_on_every_hessian_and_says_how(kind):
    x = torch.randn(400, 48)
    x = {
        "few tokens": x[:6], "dead": x * (torch.arange(48) % 7 > 0),
        "tiny": x * 1e-20, "outliers": x * 10.0 ** (torch.arange(48) % 6),
        "nan": x.index_fill(1, torch.tensor([3]), float("nan")),
        "inf": x.index_fill(1, torch.tensor([3]), float("inf")), "indefinite": x,
    }[kind]  # fmt: skip
    stats = stats_of(x)
    if kind == "indefinite":
        stats.gram -= stats.gram.diagonal().mean() * torch.eye(48)
    weight = torch.randn(8, 48)
    codes, info = GPTQ().solve(weight, Scheme(group_size=16), stats)
    back = ops.dequantize(*codes, 16)
    assert bool(back.isfinite().all()) and info["ladder"] == RUNGS[info["rung"]]
    rungs = {"indefinite": range(1, RTN + 1), "nan": [RTN], "inf": [RTN]}
    assert info["rung"] in rungs.get(kind, [0])
    if info["rung"] == RTN:
        assert torch.equal(codes.q, ops.quantize(weight, 4, 16)[0])
        with pytest.raises(CalibrationError, match="strict"):
            GPTQ(strict=True).solve(weight, Scheme(group_size=16), stats)


def test_f01_the_rung_is_in_the_report_of_the_output(tmp_path):
    """Two windows of one token each: fewer samples than inputs, and dead columns."""
    model = tiny("llama-gqa")
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data[:40] = 0.0
    model.save_pretrained(tmp_path / "model")
    fewbit.quantize_directory(
        tmp_path / "model", tmp_path / "out", "gptq", "w4a16g8", [[5], [7]], progress=False
    )
    for record in json.loads((tmp_path / "out" / REPORT).read_text())["linears"]:
        info = record["info"]
        assert info["ladder"] == RUNGS[info["rung"]] and info["damp"] > 0
        assert (info["dead"] == 40) == ("gate" in record["name"] or "up" in record["name"])
        assert record["relative_error"] >= 0


ANY_FLOAT = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, -0.0, 1e-45, 1.1754942e-38, 3.4028235e38, math.nan, math.inf, -math.inf]),
)
MATRICES = st.tuples(st.integers(1, 4), st.integers(1, 9)).flatmap(
    lambda size: st.lists(
        st.lists(ANY_FLOAT, min_size=size[1], max_size=size[1]),
        min_size=size[0],
        max_size=size[0],
    )
)


@settings(max_examples=200, deadline=None)
@given(MATRICES, st.sampled_from([2, 3, 4, 8]), st.sampled_from([-1, 1, 3, 8]), st.booleans())
def test_f02_any_floats_give_a_finite_grid_or_are_found(rows, bits, group, symmetric):
    """NaN, infinities, zeros, subnormals and the largest numbers, in any mixture."""
    w = torch.tensor(rows)
    assert finite(w) == bool(w.isfinite().all())
    q, scale, zero_point = ops.quantize(w, bits, group, symmetric)
    back = ops.dequantize(q, scale, zero_point, group)
    assert int(q.max()) < 2**bits
    if not finite(w):
        return
    assert bool((scale > 0).all()) and bool(scale.isfinite().all())
    size = group if group > 0 else w.shape[1]
    step = scale.double().repeat_interleave(size, 1)[:, : w.shape[1]]
    # Half a step, and the roundings of w / s and of (q - z) s; outside of the range of float32
    # the product itself overflows.
    inside = back.isfinite()
    error = (w.double() - back.double()).abs()[inside]
    half = 0.5 * (1 + 2.0**-20) * (2 if not symmetric else 1)
    assert bool((error <= (half * step[inside] + 2.0**-20 * w.double().abs()[inside])).all())


@pytest.mark.parametrize("method", ["awq", "gptq", "smoothquant"])
def test_f02_searches_survive_zero_and_tiny_weights(method):
    model = tiny("llama-gqa")
    layer = model.model.layers[0]
    layer.mlp.up_proj.weight.data[1:] = 0.0
    layer.self_attn.v_proj.weight.data.mul_(1e-38)
    layer.self_attn.k_proj.weight.data[1:] = 0.0
    scheme = "w8a8" if method == "smoothquant" else "w4a16g16"
    report = fewbit.quantize_(model, method, scheme, probe(3, 20), progress=False)
    assert all(math.isfinite(r.relative_error) for r in report.linears)
    assert bool(model(probe()).logits.isfinite().all())


def test_f02_all_weights_are_scanned_before_the_work(tmp_path):
    model = tiny("llama-gqa")
    model.lm_head.weight.data[3, 4] = float("inf")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    events = []
    with pytest.raises(UsageError, match="lm_head.weight, model.layers.1.mlp.up_proj.weight hold"):
        fewbit.quantize_directory(
            tmp_path / "model", tmp_path / "out", "rtn", "w4a16g8", progress=False,
            callback=events.append,
        )
    assert not events and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_f02_zero_groups_and_dead_channels_have_a_defined_result():
    w = torch.randn(4, 32)
    w[1], w[2, :16] = 0.0, 0.0
    q, scale, zero_point = ops.quantize(w, 4, 16)
    back = ops.dequantize(q, scale, zero_point, 16)
    assert bool((back[1] == 0).all()) and bool((back[2, :16] == 0).all())
    model = tiny("llama-gqa")
    model.model.layers[0].input_layernorm.weight.data[5] = 0.0
    report = fewbit.quantize_(model, "awq", "w4a16g16", probe(3, 20), progress=False)
    assert all(r.relative_error < 0.1 for r in report.linears)


def test_f02_a_non_finite_activation_names_linear_and_sample():
    model = tiny("llama-gqa")
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1e38)
    with pytest.raises(CalibrationError, match="mlp.down_proj is not finite in .* sample 0"):
        fewbit.quantize_(model, "gptq", "w4a16g16", probe(), progress=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_f03_activations_near_the_end_of_float16_do_not_overflow(dtype):
    w = torch.randn(24, 256) * 1e-3
    x = (torch.randn(5, 256).sign() * 6e4).to(dtype)
    for bits in (4, 8):
        codes = ops.quantize(w, bits, 32)
        packed = ops.pack(*codes, bits, 32)
        want = x.double() @ ops.dequantize(*codes, 32).double().T
        products = [ops.w4a16_linear(x, *packed, None, 24, bits, 32),
                    ops.w8a8_linear(x, *packed, None, 24, bits, 32)]  # fmt: skip
        if bits == 8:
            products.append(ops.int8_mixed_linear(x, *packed, None, 24, 32, 6.0))
        for out in products:
            assert bool(out.isfinite().all())
            assert float((out.double() - want).norm() / want.norm()) < 0.01


@pytest.mark.parametrize("k", [1, 3, 7, 10, 33])
@pytest.mark.parametrize("group_size", [-1, 4, 32])
def test_f04_odd_shapes_and_ragged_groups_are_right(k, group_size):
    for m, n in [(0, 3), (1, 1), (5, 17)]:
        codes = ops.quantize(torch.randn(n, k), 4, group_size)
        x = torch.randn(m, k)
        out = ops.w4a16_linear(x, *ops.pack(*codes, 4, group_size), None, n, 4, group_size)
        want = x.double() @ ops.dequantize(*codes, group_size).double().T
        assert out.shape == (m, n) and bool(((out - want).abs() < 1e-4 * (1 + want.abs())).all())


@pytest.mark.parametrize("name", ops.__all__)
def test_f05_no_operator_leaves_or_reads_unwritten_memory(name):
    """Under torch's deterministic fill fresh memory, the scratch of kernels too, is NaN or the
    largest integer: whatever is left unset, or read before it is set, changes a result.

    The whole suite runs in this mode by ``pytest --nan-fill``.
    """
    given = arguments()[name]

    def results():
        own = [a.clone() if isinstance(a, torch.Tensor) else a for a in given]
        made = getattr(ops, name)(*own)
        return [t for t in (*own, *tensors(made)) if isinstance(t, torch.Tensor)]

    want = results()
    torch.use_deterministic_algorithms(True)
    try:
        got = results()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert all(bool(t.isfinite().all()) for t in got if t.is_floating_point())


@pytest.mark.huge
def test_f06_more_than_2_to_31_elements():
    rows, columns = 2**15 + 1, 2**16
    q = torch.zeros(rows, columns, dtype=torch.uint8)
    q[-1, -3:] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    words = ops.pack_fields(q[-2:], 8)
    assert torch.equal(ops.unpack_fields(words, 8, columns), q[-2:])
    scale = torch.ones(rows, columns // 128, dtype=torch.float16)
    back = ops.dequantize(q, scale, torch.zeros_like(scale, dtype=torch.uint8), 128,
                          dtype="float16")  # fmt: skip
    assert back[-1, -3:].tolist() == [1.0, 2.0, 3.0] and float(back[:-1].abs().max()) == 0.0


def zeros(*shape, dtype):
    """A tensor of zeros without memory behind it: the kernel maps its one page of zeros."""
    size = math.prod(shape) * dtype.itemsize
    noreserve = 0x4000  # MAP_NORESERVE; without a name in older Pythons
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).reshape(shape)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("channels", [64, 2**19])
def test_f06_one_operator_over_more_than_2_to_31_elements(channels):
    """Numbers in the last rows of 2^31 + 2^20 elements, zeros before: 32-bit offsets miss them."""
    x = zeros((2**31 + 2**20) // channels, channels, dtype=torch.bfloat16)
    x[-3:] = torch.randn(3, channels).bfloat16()
    sums, most = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels)
    ops.act_stats(x, sums, most)
    last = x[-3:].double().abs()
    assert torch.equal(most.double(), last.amax(0)) and torch.equal(sums, last.sum(0))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.quantize(torch.zeros(2, 4), 4, 2**63 - 1), None),
        (lambda: ops.quantize(torch.zeros(2, 4), 4, -7), "group_size must be -1"),
        (lambda: ops.quantize(torch.zeros(2, 4), 2**40, 4), "bits must be"),
        (lambda: ops.quantize(torch.zeros(4), 4, 4), r"must be \[out_features, in_features\]"),
        (lambda: ops.gram(torch.zeros(2, 4), torch.zeros(3, 3)), "g must have shape"),
        (lambda: ops.pack_fields(torch.zeros(2, 4, dtype=torch.uint8), 0), "bits"),
        (lambda: ops.dequantize(torch.zeros(2, 4, dtype=torch.uint8), torch.ones(9, 9),
                                torch.zeros(2, 1, dtype=torch.uint8), 4), "scale must have shape"),
        (lambda: ops.hadamard(torch.zeros(2, 0)), None),
    ],
)
def test_f07_no_argument_ends_the_process(call, message):
    if message is None:
        try:
            call()
        except ValueError:
            pass
        return
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()


def test_f18_same_bytes_again_and_on_any_number_of_threads():
    def codes():
        model = tiny("opt")
        data = Windows(list(probe(4, 24).split(1)))
        fewbit.quantize_(model, "gptq", "w4a16g16", data, progress=False)
        return {k: v for k, v in model.state_dict().items() if k.endswith("packed")}

    found = on_threads((1, 1, 3), codes)
    for other in found[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items())


def on_threads(counts, run):
    before = torch.get_num_threads()
    try:
        found = []
        for threads in counts:
            torch.set_num_threads(threads)
            found.append(run())
        return found
    finally:
        torch.set_num_threads(before)


def wide(folder, hidden, inner):
    """One Llama layer that is wide enough for torch to share its sums and products out."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, vocab_size=500,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def same_output(model, folder, method, tokens):
    """Every byte of the output, the errors and certificates in its report too."""

    def output():
        out = folder / f"out-{torch.get_num_threads()}"
        quantize(model, out, method, tokens)
        return digest(out)

    one, two = on_threads((1, 2), output)
    assert one == two


@pytest.mark.parametrize("method", METHODS)
def test_f18_layers_of_real_width_give_the_same_output_on_two_threads(tmp_path, method):
    same_output(wide(tmp_path / "model", 512, 1408), tmp_path, method, 48)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", METHODS)
def test_f18_layers_of_2048_columns_give_the_same_output_on_two_threads(tmp_path, method):
    same_output(wide(tmp_path / "model", 2048, 5632), tmp_path, method, 128)


PRODUCTS = """
import torch
from fewbit.reproducible import strict
strict()
shapes = (64, 1408, 1408), (64, 2048, 2048), (512, 4096, 1024), (48, 1408, 512), (96, 512, 1408)
for dtype in torch.float32, torch.float64:
    for m, k, n in shapes:
        a, b, found = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype), []
        for threads in 1, 2, 3, 4:
            torch.set_num_threads(threads)
            found.append(a @ b)
        assert all(torch.equal(found[0], other) for other in found), (dtype, m, k, n)
"""


def test_f18_products_are_the_same_bits_on_any_number_of_threads():
    subprocess.run([sys.executable, "-c", PRODUCTS], check=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300_000), st.integers(0, 2**31))
def test_f18_sums_are_the_same_bits_on_any_number_of_threads(count, seed):
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    one, two, three = on_threads((1, 2, 3), lambda: total(x))
    assert one == two == three
    exact = math.fsum(x.tolist())
    assert abs(one - exact) <= 2.0**-52 * 64 * float(x.double().abs().sum())


ABSURD = {
    "gptq": ("points", "sweeps", "block"), "awq": ("points",), "quarot": ("seed",),
    "mixed": ("seed",), "spinquant": ("steps", "range_steps"),
    "gptq+tune": ("epochs", "batch", "solved"),
}  # fmt: skip


@pytest.mark.parametrize(
    "method, option", [(method, option) for method, names in ABSURD.items() for option in names]
)
@pytest.mark.parametrize("value", [-1, 2**40, 2**63])
def test_f07_an_option_of_absurd_size_is_one_sentence(method, option, value):
    with pytest.raises(UsageError, match=rf"{option} must be in \d+\.\.\d+, got {value}"):
        recipes.build(method, "w4a16g8", **{option: value})


SIZES = {  # would take hours, or all memory, before they fail
    "order of a Hadamard matrix": hadamard.hadamard_matrix,
    "order of a Hartley matrix": hadamard.hartley_matrix,
    "width of a Hadamard transform": hadamard.plan,
    "width of a rotation": lambda n: orthogonal.rotation(n, "random"),
    "order of a matrix": lambda n: orthogonal.rotation(min(n, 2**20)).matrix(),
    "bits": lambda n: kv_codes(torch.ones(1, 8), n),
    "n_bit": lambda n: lab.pseudo_quantize_tensor(torch.ones(1, 8), n, parity=True),
    "n_bits": lambda n: lab.quantize_weight_per_tensor_absmax(torch.ones(1, 8), n),
    "new": lambda n: evaluate.speed(None, torch.ones(8), new=n),
    "prompt": lambda n: evaluate.speed(None, torch.ones(8), prompt=n),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [2**31, 2**63 - 1, 2**80])
def test_f07_a_number_of_absurd_size_is_one_sentence(name, value):
    with pytest.raises(UsageError, match=rf"{name} must be in \d+\.\.\d+, got \d+"):
        SIZES[name](value)


@pytest.mark.parametrize("name", ["window", "samples"])
@pytest.mark.parametrize("value", [-1, 0, 10**9, 2**63])
def test_f07_windows_of_absurd_size_are_one_sentence(name, value):
    with pytest.raises(UsageError, match=rf"{name} must be in 1\.\.\d+, got {value}"):
        calibrate.cut(torch.zeros(64, dtype=torch.int64), **{
            "window": 8, "samples": 2, "source": "text", name: value,
        })
