"""The CUDA kernels on the emulator: every sweep of gpu_check, as both kinds of card, threads in
either order. Needs a build with -DFEWBIT_CUDA=EMULATE (scripts/test.sh makes one)."""

import pytest
import torch

import cuda_sweep
from fewbit import _C, ops

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
def test_kernel_agrees_with_reference(emulate, op, architecture, descending):
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
