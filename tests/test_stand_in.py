"""torch's CUDA build and launches of our kernels without a card, over a stand-in for its runtime.

    pytest -m slow tests/test_stand_in.py

needs nvcc and an environment with numpy, pytest and a CUDA build of torch (gigabytes): the one that
runs the tests, or FEWBIT_CUDA_PYTHON=/path/to/its/python. fewbit is built for it as for a card,
with stand_in/cudart.cpp in the place of the runtime library; gpu_check.py asks it what it asks a
card.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from test_cuda_build import tool

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = ROOT / "tests" / "stand_in"
PYTHON = os.environ.get("FEWBIT_CUDA_PYTHON") or (sys.executable if torch.version.cuda else None)
SEGMENTATION_FAULT = -11

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(PYTHON is None, reason="no CUDA build of torch: set FEWBIT_CUDA_PYTHON"),
    pytest.mark.skipif(tool("nvcc") is None, reason="no nvcc: pip install 'fewbit[cuda]'"),
]


def do(*command):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of cmake and ninja, if there
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def undefined(library):
    return do("nm", "-D", "--undefined-only", library).split()[1::2]


def runtime_library(folder, packages):
    """libcudart.so.13 and libcuda.so.1; what torch wants of them and cudart.cpp lacks says so."""
    made = folder / "cudart.o"
    do(tool("nvcc"), "-std=c++20", "-O1", "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror", "-c",
       STAND_IN / "cudart.cpp", "-o", made)  # fmt: skip
    defined = do("nm", "--defined-only", made).splitlines()
    has = {line.split()[2] for line in defined if " T " in line}
    wanted = {s.split("@")[0] for path in packages.glob("torch/lib/*.so") for s in undefined(path)
              if s.endswith("@libcudart.so.13") or s.startswith("cu") and "_" not in s}  # fmt: skip
    lacking = sorted(s for s in wanted - has if s.startswith(("cuda", "__cuda", "cu")))
    stubs = folder / "unserved.cpp"
    stubs.write_text('extern "C" int stand_in_unserved(const char*);\n' + "".join(
        f'extern "C" int {name}() {{ return stand_in_unserved("{name}"); }}\n' for name in lacking
    ))  # fmt: skip
    versions, empty = folder / "versions", folder / "empty.cpp"
    versions.write_text("libcudart.so.13 { global: *; };\n")
    empty.write_text("")
    runtime = folder / "libcudart.so.13"
    do("c++", "-shared", "-fPIC", "-o", runtime, made, stubs, "-Wl,-soname,libcudart.so.13",
       f"-Wl,--version-script={versions}", "-ldl")  # fmt: skip
    do("c++", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", empty, "-Wl,-soname,libcuda.so.1",
       "-Wl,--no-as-needed", runtime)  # fmt: skip
    return runtime


def kernel_library(folder):
    """Our kernels as plain C++, with the emulator of CUDA threads."""
    cuda = ROOT / "cpp" / "cuda"
    sources = [*cuda.glob("*.cu"), cuda / "emulate.cpp", STAND_IN / "kernels.cpp"]
    flags = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas",
             "-U_FORTIFY_SOURCE", f"-I{ROOT / 'cpp' / 'include'}"]  # fmt: skip
    objects = [folder / f"{s.name}.o" for s in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda s, o: do("c++", *flags, "-xc++", "-c", s, "-o", o), sources, objects))
    library = folder / "libkernels.so"
    do("c++", "-shared", "-Wl,-Bsymbolic", "-o", library, *objects, "-ldl")
    return library


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """Runs Python with torch's CUDA build, our module and the stand-in; gives the process."""
    folder = tmp_path_factory.mktemp("stand_in")
    packages = Path(do(PYTHON, "-c", "import torch; print(torch.__path__[0])").strip()).parent
    runtime, kernels = runtime_library(folder, packages), kernel_library(folder)
    build, package = folder / "build", folder / "python"  # beside it what gpu_check.py takes along
    pybind11 = do(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    do("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DFEWBIT_CUDA=ON", f"-DCUDART={runtime}",
       "-DCMAKE_CUDA_ARCHITECTURES=75-real", "-DCMAKE_CUDA_RUNTIME_LIBRARY=None",
       f"-DCMAKE_CUDA_COMPILER={tool('nvcc')}", f"-DPython_EXECUTABLE={PYTHON}",
       f"-Dpybind11_DIR={pybind11}")  # fmt: skip
    do("cmake", "--build", build)
    shutil.copytree(ROOT / "python", package, ignore=shutil.ignore_patterns("_C*.so"))
    for name in (
        "scripts/gpu_check.py", "scripts/gpu_times.py", "tests/cuda_sweep.py", "tests/grids.py",
        "tests/test_devices.py", "tests/faults/fuzz_ops.py",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for module in build.glob("cpp/_C*.so"):
        shutil.copy(module, package / "fewbit")

    def run(*command, architecture=75, unverified=True, own_allocations=False):
        return subprocess.run(
            [PYTHON, *map(str, command)], capture_output=True, text=True, cwd=folder,
            env={
                **os.environ, "LD_PRELOAD": str(runtime), "LD_LIBRARY_PATH": str(folder),
                "FEWBIT_STAND_IN": str(architecture), "FEWBIT_STAND_IN_KERNELS": str(kernels),
                "PYTHONPATH": f"{STAND_IN}:{package}",
                "FEWBIT_CUDA_UNVERIFIED": str(int(unverified)),
                **({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if own_allocations else {}),
            },
        )  # fmt: skip

    return run


def says(card, text, **options):
    done = card("-c", "import torch\nfrom fewbit import ops\n" + text, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.parametrize("architecture", [75, 80, 86, 89, 90])
def test_gpu_check(card, architecture):
    """Every kernel against reference.py, launched as on a card, and out of a graph."""
    done = card("scripts/gpu_check.py", "--compare", architecture=architecture)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert f"sm_{architecture}" in done.stdout and done.stdout.count("ok  ") == 17


def test_gpu_check_times_and_writes_the_record(card, tmp_path):
    record = tmp_path / "verified.json"
    shutil.copy(ROOT / "python" / "fewbit" / "verified.json", record)
    done = card("scripts/gpu_check.py", "--small", "--record", record, "--only",
                "quantize", "w4a16_linear", "act_stats")  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    written = json.loads(record.read_text())
    assert written["verified"]["quantize"] == written["verified"]["act_stats"] == [75]
    assert {row["op"] for row in written["runs"][-1]["times"]} == {
        "quantize", "w4a16_linear", "act_stats"
    }  # fmt: skip


def test_kernels_run_on_the_card_of_their_tensors_and_leave_the_current_one(card):
    said = says(card, """
w = torch.randn(8, 128)
for device in ("cuda:1", "cuda:0"):
    q, want = ops.quantize(w.to(device), 4, 32)[0], ops.quantize(w, 4, 32)[0]
    print(q.device, torch.cuda.current_device(), torch.equal(q.cpu(), want))
""")  # fmt: skip
    assert said.splitlines() == ["cuda:1 0 True", "cuda:0 0 True"]


@pytest.mark.parametrize("unverified", [True, False])
def test_wrong_arguments_are_said_in_one_sentence(card, unverified):
    said = says(card, """
w = torch.randn(16, 64)
packed = ops.pack(*ops.quantize(w, 4, 16), 4, 16)
on = [p.cuda() for p in packed]
q, s, z = [t.cuda() for t in ops.quantize(w, 8, 16)]
order = torch.zeros(64, dtype=torch.long).cuda()
calls = [
    lambda: ops.quantize(w.cuda(), 99),
    lambda: ops.quantize(w.cuda().int()),
    lambda: ops.pack(q, s, z, 4, 16),
    lambda: ops.gptq(w.cuda(), torch.eye(64).cuda(), order=order),
    lambda: ops.w4a16_linear(w, on[0], packed[1], packed[2], None, 16, 4, 16),
    lambda: ops.w4a16_linear(w.cuda(), *packed, None, 16, 4, 16),
    lambda: ops.gram(w, torch.zeros(64, 64).cuda()),
    lambda: ops.hadamard(w, torch.ones(2, 2).cuda()),
]
for call in calls:
    try:
        call()
        print("served")
    except ValueError as error:
        print(str(error))
""", unverified=unverified)  # fmt: skip
    both = "tensors must lie on one device, got"
    order = "order must hold every column 0..63 once" + ", got 0 at 1" * unverified
    assert said.splitlines() == [
        "bits must be in 2..8, got 99 [FB100]",
        "w must be float32, float16 or bfloat16, got Int [FB100]",
        "q holds codes above 15, the largest of 4 bits [FB100]",
        f"{order} [FB100]",
        f"w4a16_linear: {both} cpu and cuda:0 [FB100]",
        f"w4a16_linear: {both} cuda:0 and cpu [FB100]",
        f"gram: {both} cpu and cuda:0 [FB100]",
        f"hadamard: {both} cpu and cuda:0 [FB100]",
    ]


def test_an_error_of_torch_keeps_its_words(card):
    said = says(card, """
w, scale = torch.randn(1024, 1024), torch.ones(4096, 1024)  # a result of 16 GB
try:
    ops.scaled_error(w.cuda(), scale.cuda())
except RuntimeError as error:
    print(error)
""")  # fmt: skip
    assert said.startswith("scaled_error: CUDA out of memory. Tried to allocate 16.00 GiB")


@pytest.mark.parametrize("architecture", [75, 80])
def test_no_arguments_end_the_process(card, architecture):
    """Every allocation ends at a page that is closed: a kernel that reads on from it would, too."""
    done = card(
        "tests/faults/fuzz_ops.py", "--device", "cuda", "--calls", 3000, "--seed", architecture,
        "--without", "coordinate_descent", "gptq",  # plain torch for most of them: slow
        architecture=architecture, own_allocations=True,
    )  # fmt: skip
    assert done.returncode == 0 and "nothing else" in done.stdout, done.stderr[-3000:]


# ---- that the stand-in can fail ------------------------------------------------------------------


def test_memory_of_a_card_is_closed_to_the_host(card):
    done = card("-c", """
import ctypes, torch
x = torch.ones(4).cuda()
assert float(x.cpu()[0]) == 1.0
ctypes.c_float.from_address(x.data_ptr()).value
""")  # fmt: skip
    assert done.returncode == SEGMENTATION_FAULT


def test_memory_ends_where_an_allocation_does(card):
    done = card("-c", """
import ctypes, torch
x = torch.ones(64).cuda()
runtime = ctypes.CDLL("libcudart.so.13")
here = ctypes.create_string_buffer(300)
pointer, size_t = ctypes.c_void_p, ctypes.c_size_t
copy = lambda size: runtime.cudaMemcpy(here, pointer(x.data_ptr()), size_t(size), 4)
assert copy(256) == 0
copy(257)
""", own_allocations=True)  # fmt: skip
    assert done.returncode == SEGMENTATION_FAULT, done.stderr


def test_nothing_waits_or_leaves_the_stream_while_a_graph_is_recorded(card):
    said = says(card, """
x, held = torch.randn(4, 64).cuda(), torch.empty(4, 64).cuda()
default = torch.cuda.current_stream()
torch.cuda.synchronize()
def other_stream():
    with torch.cuda.stream(default):
        ops.quantize(x, 4, 32)
for bad in (torch.cuda.synchronize, other_stream, lambda: x.cpu()):
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            ops.pseudo_quantize_(held, 4, 32)
            bad()
        print("recorded")
    except RuntimeError:
        print("refused")
""")  # fmt: skip
    assert said.split() == ["refused"] * 3
