"""F1 to F6, F18: hostile numbers, shapes and sizes. Names begin with the row of the fault table."""

import resource

import pytest
import torch

import fewbit
from fewbit import ops
from fewbit.calibrate import Windows
from fewbit.errors import CalibrationError, UsageError
from fewbit.scheme import Scheme
from fewbit.solvers.gptq import GPTQ
from fewbit.stats import Stats
from tiny import probe, tiny


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
    assert bool(back.isfinite().all()) and info["ladder"]
    if kind in ("nan", "inf"):
        assert torch.equal(codes.q, ops.quantize(weight, 4, 16)[0])
        with pytest.raises(CalibrationError, match="strict"):
            GPTQ(strict=True).solve(weight, Scheme(group_size=16), stats)


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
    packed = ops.pack(*ops.quantize(w, 4, 32), 4, 32)
    out = ops.w4a16_linear(x, *packed, None, 24, 4, 32)
    want = x.double() @ ops.dequantize(*ops.quantize(w, 4, 32), 32).double().T
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


def test_f05_no_operator_leaves_or_reads_unwritten_memory():
    """Under torch's deterministic fill fresh memory is NaN, or the largest integer."""
    w, x = torch.randn(37, 50), torch.randn(9, 50)
    torch.use_deterministic_algorithms(True)
    try:
        codes = ops.quantize(w, 4, 16)
        packed = ops.pack(*codes, 4, 16)
        g = torch.zeros(50, 50)
        ops.gram(x, g)
        back = ops.unpack(*packed, 37, 50, 4, 16)
        results = [
            ops.w4a16_linear(x, *packed, None, 37, 4, 16), ops.dequantize(*codes, 16), g,
            ops.pseudo_quantize(w, 4, 16), ops.hadamard(torch.randn(3, 64)),
        ]  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(bool(r.isfinite().all()) for r in results)
    assert all(torch.equal(a, b) for a, b in zip(codes, back, strict=True))


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


def test_f06_index_arithmetic_is_64_bit():
    """Rows far apart: offsets above 2^31 on a mapping that has no memory behind most of it."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        pytest.skip("address space is limited")
    columns = 2**20
    wide = torch.empty(0, dtype=torch.uint8).set_(
        torch.UntypedStorage(2**32), 0, (2**12, columns), (columns, 1)
    )
    row = torch.randint(0, 16, (1, columns), dtype=torch.uint8)
    wide[2**12 - 1] = row
    # The last row begins at byte 2^32 - 2^20: a 32-bit offset would read another one.
    words = ops.pack_fields(wide[2**12 - 1 :], 4)
    assert torch.equal(ops.unpack_fields(words, 4, columns), row)


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

    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 1, 3):
            torch.set_num_threads(threads)
            found.append(codes())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items())
