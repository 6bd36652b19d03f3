"""The CUDA kernels on the emulator: every sweep of gpu_check, as both kinds of card, threads in
either order. Needs a build with -DFEWBIT_CUDA=EMULATE (scripts/test.sh makes one)."""

import copy

import pytest
import torch

import cuda_sweep
import gpu_check
import gpu_times
from fewbit import _C, ops
from fewbit.hadamard import plan
from fewbit.linear import PackedLinear
from fewbit.online import ActivationQuant, OnlineHadamard, attach
from fewbit.orthogonal import Rotation
from fewbit.pseudo import activation_module
from fewbit.scheme import Scheme

CPU = torch.device("cpu")
emulated = pytest.mark.skipif(
    not hasattr(_C, "emulate_cuda"), reason="built without -DFEWBIT_CUDA=EMULATE"
)


@pytest.fixture
def emulate():
    _C.allow_unverified(True)
    yield _C.emulate_cuda
    _C.emulate_cuda(0)
    _C.allow_unverified(False)


@emulated
@pytest.mark.parametrize("op", cuda_sweep.SWEEPS)
@pytest.mark.parametrize("architecture, descending", [(75, False), (80, True)])
def test_f09_emulated_kernels_agree_with_the_reference(emulate, op, architecture, descending):
    emulate(architecture, descending)
    count, launches = 0, _C.emulated_launches()
    for what, got, want, bound in cuda_sweep.SWEEPS[op](CPU):
        problem = cuda_sweep.wrong(got, want, bound)
        assert not problem, f"{what}: {problem}"
        count += 1
    assert count > 3 and _C.emulated_launches() > launches + 3


@emulated
def test_unverified_kernels_stay_off(emulate):
    """Without an entry for the card an op is its plain twin; with one, its kernel."""
    w, before = torch.randn(4, 64), _C.emulated_launches()
    _C.allow_unverified(False)
    emulate(75)
    want = ops.pseudo_quantize(w, 4, 32)
    assert _C.emulated_launches() == before
    _C.set_verified("pseudo_quantize", 75)
    assert torch.equal(ops.pseudo_quantize(w, 4, 32), want)
    assert _C.emulated_launches() == before + 1
    emulate(80)
    ops.pseudo_quantize(w, 4, 32)
    assert _C.emulated_launches() == before + 1


@emulated
@pytest.mark.parametrize("width", [768, 10368])
@pytest.mark.parametrize("architecture", [75, 80, 90])
def test_four_bit_models_run_the_four_bit_kernels(emulate, architecture, width):
    """Where the scheme allows: per token, with and without a transform, of two bases too."""
    linear = torch.nn.Linear(width, 24).requires_grad_(False)
    plain = PackedLinear.from_linear(linear, "w4a16")
    grid, transform = ActivationQuant(4, clip=0.9), Rotation(width, plan(width))
    clipped, rotated = copy.deepcopy(plain), copy.deepcopy(plain)
    attach(clipped, "online_quant", grid)
    attach(rotated, "online_quant", grid)
    attach(rotated, "online_hadamard", OnlineHadamard(transform))
    fours = Scheme.parse(plain.scheme, activation_bits=4)
    int4 = activation_module(plain.codes(), fours, linear.bias)
    x = torch.randn(3, width)
    for module in (int4, clipped, rotated):
        emulate(0)
        want = module(x)
        emulate(architecture)
        before = _C.emulated_launches()
        got = module(x)
        # Codes and product; from 90 on words become int8 first.
        assert 2 <= _C.emulated_launches() - before <= 3 + (architecture == 90)
        # The order of the transform's sums may move single codes by one.
        step = 2 * float(module.weight.abs().max()) * float(x.norm(dim=1).max()) / 7
        assert float((got - want).abs().max()) <= (step if module is rotated else 1e-4)
        _C.allow_unverified(False)
        before = _C.emulated_launches()
        assert torch.allclose(module(x), want, atol=step) and _C.emulated_launches() == before
        _C.allow_unverified(True)


@emulated
def test_a_launch_that_fails_names_op_and_shape(emulate):
    emulate(75)
    _C.refuse_cuda_launches(True)
    try:
        with pytest.raises(
            RuntimeError,
            match=r"^pseudo_quantize: the CUDA kernel for shape \[3, 8\] was not launched: refused",
        ):
            ops.pseudo_quantize(torch.randn(3, 8), 4, 8)
    finally:
        _C.refuse_cuda_launches(False)


@emulated
@pytest.mark.parametrize("op", gpu_times.OPS)
def test_what_gpu_check_times_runs(emulate, op):
    """Every case, small, with its peers as far as a CPU has them; a clock that only calls."""
    emulate(75)
    bench = gpu_times.Bench(CPU, small=True)
    called = []

    def clock(call, copies):
        call(copies - 1)
        called.append(call)
        return 1.0

    absent = {"torch.compile", "torch int4 (tinygemm)", "gemlite", "humming", "bitsandbytes nf4",
              "fast-hadamard-transform", "torch._int_mm and scales", "torch._scaled_mm fp8",
              "bitsandbytes LLM.int8()"}  # fmt: skip
    before = _C.emulated_launches()
    cases = list(bench.cases(op))
    for case in cases:
        case.refill()
        case.peers = {name: make for name, make in case.peers.items() if name not in absent}
    bench.cases = lambda _: iter(cases)
    rates = dict.fromkeys(("copy", "fp16", "int8", "fp32"), 1e9)
    rows = gpu_times.measure(bench, rates, (op,), clock)
    assert rows and _C.emulated_launches() > before
    assert all(not row["not_measured"] and row["of_limit"] > 0 for row in rows), rows
    assert len(called) == sum(1 + len(row["times_faster_than"]) for row in rows)


def test_a_record_verifies_what_was_right_and_only_that():
    empty = {"verified": {}, "runs": []}
    t4 = {"device": "Tesla T4", "architecture": 75}
    after = gpu_check.updated(empty, 75, {"pack": [], "gptq": ["wrong"]}, t4)
    assert after["verified"] == {"pack": [75]} and after["runs"] == [t4]
    a100 = {"device": "A100", "architecture": 80}
    after = gpu_check.updated(after, 80, {"pack": [], "gptq": []}, a100)
    assert after["verified"] == {"gptq": [80], "pack": [75, 80]}
    after = gpu_check.updated(after, 75, {"pack": ["wrong"]}, t4)  # a later run has the last word
    assert after["verified"] == {"gptq": [80], "pack": [80]} and after["runs"] == [a100, t4]
