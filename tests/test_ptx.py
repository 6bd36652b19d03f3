"""The CUDA kernels as nvcc compiles them, run by the interpreter of ptx.py: results against the
reference, and what results do not show. Needs nvcc and a build with -DFEWBIT_CUDA=EMULATE."""

import ctypes
import shutil

import pytest
import torch

import bench_cuda_costs
import cuda_sweep
import gpu_times
from fewbit import _C
from ptx import Cards, compile_ptx
from test_cuda_build import FLAGS, SOURCES, needs_nvcc, tool

pytestmark = [
    needs_nvcc,
    pytest.mark.skipif(
        not hasattr(_C, "emulate_cuda"), reason="built without -DFEWBIT_CUDA=EMULATE"
    ),
    pytest.mark.timeout(600),
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """architecture -> a folder with the PTX of every source."""
    folder = tmp_path_factory.mktemp("ptx")
    made = set()

    def of(architecture):
        if architecture not in made:
            compile_ptx(tool("nvcc"), SOURCES, architecture, FLAGS[:4], folder)
            made.add(architecture)
        return folder

    yield of
    shutil.rmtree(folder)


@pytest.mark.parametrize("architecture", [75, 80])
@pytest.mark.parametrize("op", cuda_sweep.SWEEPS)
def test_f09_compiled_kernels_agree_with_the_reference(compiled, architecture, op):
    torch.manual_seed(0)
    with Cards(compiled(architecture), architecture) as cards:
        for what, got, want, bound in cuda_sweep.SWEEPS[op](CPU):
            problem = cuda_sweep.wrong(got, want, bound)
            assert not problem and not cards.problems, (what, problem, cards.problems)
    assert sum(cards.launched.values()) > 3


@pytest.mark.parametrize(
    "op, kernel, barriers",
    [
        ("hadamard", "hadamard", 1),
        ("norm_quantize", "norm_quantize", 2),
        ("w4a16_linear", "product", 1),
        ("w8a8_linear", "product", 1),
        ("int8_mixed_linear", "outlier_list", 1),
        ("gptq", "gptq_update", 2),
    ],
)
def test_a_barrier_that_is_missing_is_found(compiled, op, kernel, barriers):
    """One after the other is taken out of a kernel that is right; some are for another launch."""
    case = next(gpu_times.Bench(CPU, small=True).cases(op))
    with Cards(compiled(75), 75) as cards:
        case.call(0)
        assert not cards.problems
        name = next(n for n in cards.launched if f"{len(kernel)}{kernel}" in n)
        found = 0
        for one in cards.kernels[name].code:
            if one.opcode != "bar.sync":
                continue
            one.opcode, one.run = "nop", lambda m, a: None
            case.call(0)
            one.opcode, one.run = "bar.sync", None
            found += any("without a barrier" in p or "nobody wrote" in p for p in cards.problems)
            cards.problems.clear()
        case.call(0)
    assert found >= barriers and not cards.problems


def test_kernels_issue_no_more_instructions_than_they_need(compiled):
    """Nor much fewer than the bounds of bench_cuda_costs.py say, or those are to be moved."""
    for case in bench_cuda_costs.cases():
        cost = bench_cuda_costs.measure(case, compiled(case.architecture))
        assert 0.5 * case.most < cost.instructions <= case.most, cost
        assert cost.passes < 1.2, cost


FAULTS = """
struct Args { int* out; };
__shared__ int s[256];
extern "C" {
__global__ void __launch_bounds__(256) right(Args a) {
  s[threadIdx.x] = threadIdx.x * 3;
  __syncthreads();
  a.out[threadIdx.x] = s[255 - threadIdx.x];
}
__global__ void unbounded(Args a) {
  a.out[threadIdx.x] = 1;
}
__global__ void __launch_bounds__(256) shared_race(Args a) {
  s[threadIdx.x] = threadIdx.x;
  a.out[threadIdx.x] = s[255 - threadIdx.x];
}
__global__ void __launch_bounds__(256) warp_race(Args a) {
  s[threadIdx.x] = threadIdx.x;
  a.out[threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void __launch_bounds__(256) warp_right(Args a) {
  s[threadIdx.x] = threadIdx.x;
  __syncwarp();
  a.out[threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void __launch_bounds__(256) written_after_read(Args a) {
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const int other = s[255 - threadIdx.x];
  s[threadIdx.x] = other;
  a.out[threadIdx.x] = other;
}
__global__ void __launch_bounds__(256) nobody_wrote(Args a) {
  if (threadIdx.x < 8) s[threadIdx.x] = 1;
  __syncthreads();
  a.out[threadIdx.x] = s[threadIdx.x];
}
__global__ void __launch_bounds__(256) two_values(Args a) {
  s[threadIdx.x / 2] = threadIdx.x;
  __syncthreads();
  a.out[threadIdx.x] = s[threadIdx.x / 2];
}
__global__ void __launch_bounds__(256) outside(Args a) {
  s[threadIdx.x * 2] = 1;
  a.out[threadIdx.x] = 0;
}
__global__ void __launch_bounds__(256) misaligned(Args a) {
  const int4 v = *reinterpret_cast<int4*>(a.out + 1);
  a.out[threadIdx.x] = v.x + v.y + v.z + v.w;
}
__global__ void __launch_bounds__(256) global_race(Args a) {
  a.out[threadIdx.x] = a.out[255 - threadIdx.x];
}
__global__ void __launch_bounds__(256) blocks_write_one_place(Args a) {
  a.out[threadIdx.x] = blockIdx.x;
}
__global__ void __launch_bounds__(256) left_out(Args a) {
  if (threadIdx.x < 3)
    a.out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, int(threadIdx.x), 1);
}
}
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    source = folder / "faults.cu"
    source.write_text(FAULTS)
    compile_ptx(tool("nvcc"), [source], 75, ["-std=c++20"], folder)
    return folder


@pytest.mark.parametrize(
    "kernel, said",
    [
        ("right", ""),
        ("warp_right", ""),
        ("unbounded", "launch bounds"),
        ("shared_race", "without a barrier after another's write"),
        ("warp_race", "without a barrier after another's write"),
        ("written_after_read", "without a barrier after another's read"),
        ("nobody_wrote", "nobody wrote"),
        ("two_values", "different values"),
        ("outside", "outside the block's shared memory"),
        ("misaligned", "no multiple of 16"),
        ("global_race", "global memory that another thread writes"),
        ("blocks_write_one_place", "two threads write one place of global memory"),
        ("left_out", "not every lane reaches"),
        ("undescribed", "not in the PTX"),
    ],
)
def test_a_fault_is_found(faults, kernel, said):
    out = torch.zeros(1024, dtype=torch.int32)
    cards = Cards(faults, 75)
    args = bytes(ctypes.c_void_p(out.data_ptr()))
    cards.launch(kernel, (2 if "blocks" in kernel else 1, 1, 1), (256, 1, 1), 0, args)
    if said:
        assert any(said in problem for problem in cards.problems), cards.problems
    else:
        assert not cards.problems
        want = [3 * (255 - i) for i in range(256)] if kernel == "right" else \
            [i ^ 1 for i in range(256)]  # fmt: skip
        assert out[:256].tolist() == want
