"""CUDA sources without a GPU: index maps on the host, and what nvcc makes of every kernel."""

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "cpp" / "cuda").glob("*.cu"))
ARCHITECTURES = (75, 80, 86, 89, 90)
FLAGS = [
    "-std=c++20", "-O3", "--fmad=false", f"-I{ROOT / 'cpp' / 'include'}",
    "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v,-warn-spills,-Werror",
]  # fmt: skip


def tool(name):
    """A program of the CUDA toolkit: beside CUDACXX, on PATH, or of the extra `cuda`."""
    chosen = os.environ.get("CUDACXX")
    if chosen and (Path(chosen).parent / name).exists():
        return str(Path(chosen).parent / name)
    packaged = sorted(Path(sys.prefix).glob(f"lib/python*/site-packages/nvidia/*/bin/{name}"))
    return shutil.which(name) or (str(packaged[-1]) if packaged else None)


# ---- index maps ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """name -> {key: value}, as printed by the program that includes the kernels' headers."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("maps") / "maps"
    subprocess.run(
        [compiler, "-std=c++20", f"-I{ROOT / 'cpp' / 'include'}", "-Wno-unknown-pragmas",
         str(ROOT / "tests" / "cuda_maps.cpp"), str(ROOT / "cpp" / "cuda" / "emulate.cpp"),
         "-o", str(program)],
        check=True,
    )  # fmt: skip
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    found = defaultdict(dict)
    for line in printed.splitlines():
        left, right = line.split(" = ")
        name, *key = left.split()
        key = tuple(int(k) if k.isdigit() else k for k in key)
        found[name][key] = tuple(int(v) for v in right.split())
    return found


def test_fragments_are_those_of_the_instruction_set(maps):
    """PTX ISA 9, matrix fragments for mma.m16n8k16 (f16) and mma.m16n8k32 (s8, u8), as written
    there: groupID = lane >> 2, threadID_in_group = lane % 4."""
    for (lane, i), (row, column) in maps["a16"].items():
        group, thread = lane >> 2, lane % 4
        assert row == (group if i in (0, 1, 4, 5) else group + 8)
        assert column == thread * 2 + (i & 1) + (8 if i >= 4 else 0)
    for (lane, i), (row, column) in maps["b16"].items():
        assert row == (lane % 4) * 2 + (i & 1) + (8 if i >= 2 else 0) and column == lane >> 2
    for (lane, i), (row, column) in maps["a8"].items():
        group, thread = lane >> 2, lane % 4
        assert row == (group if i < 4 or 8 <= i < 12 else group + 8)
        assert column == thread * 4 + (i & 3) + (16 if i >= 8 else 0)
    for (lane, i), (row, column) in maps["b8"].items():
        assert row == (lane % 4) * 4 + (i & 3) + (16 if i >= 4 else 0) and column == lane >> 2
    for (lane, i), (row, column) in maps["a4"].items():  # mma.m16n8k64 (s4, u4)
        group, thread = lane >> 2, lane % 4
        assert row == (group if i < 8 or 16 <= i < 24 else group + 8)
        assert column == thread * 8 + (i & 7) + (32 if i >= 16 else 0)
    for (lane, i), (row, column) in maps["b4"].items():
        assert row == (lane % 4) * 8 + (i & 7) + (32 if i >= 8 else 0) and column == lane >> 2
    for (lane, i), (row, column) in maps["c32"].items():
        assert row == (lane >> 2) + (8 if i >= 2 else 0) and column == (lane % 4) * 2 + (i & 1)


@pytest.mark.parametrize(
    "name, rows, columns",
    [
        ("a16", 16, 16),
        ("b16", 16, 8),
        ("a8", 16, 32),
        ("b8", 32, 8),
        ("a4", 16, 64),
        ("b4", 64, 8),
        ("c32", 16, 8),
    ],
)
def test_every_element_of_a_fragment_is_held_once(maps, name, rows, columns):
    cells = list(maps[name].values())
    assert len(cells) == len(set(cells)) == rows * columns
    assert set(cells) == {(r, c) for r in range(rows) for c in range(columns)}


def test_a_lane_ends_with_eight_neighbouring_columns(maps):
    rows = {key: value[0] for key, value in maps["packed_row"].items()}
    assert sorted(rows.values()) == list(range(32))
    for thread in range(4):
        mine = [rows[maps["c32"][thread, e][1], i] for e in (0, 1) for i in range(4)]
        assert mine == list(range(8 * thread, 8 * thread + 8))
    # What lane (g, t) loads, rows 4 (g % 4) + i of panel g / 4, is position g of tile i.
    for group in range(8):
        assert [rows[group, i] for i in range(4)] == [
            16 * (group // 4) + 4 * (group % 4) + i for i in range(4)
        ]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_units_hold_what_the_packed_layout_says(maps, bits):
    """Against reference.pack: one code of a unit set, all bits of it."""
    import torch

    from fewbit import reference

    columns = reference.unit_columns(bits)
    for k in range(columns):
        q = torch.zeros(1, columns, dtype=torch.uint8)
        q[0, k] = 2**bits - 1
        scale, zero = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8)
        words = reference.pack(q, scale, zero, bits, -1)[0].reshape(-1, 16)[:, 0].tolist()
        words = [w % 2**32 for w in words] + [0, 0]
        printed = maps["unit"][bits, k]
        assert list(printed[:3]) == words[:3]
        quads = [0] * (columns // 4)
        quads[k // 4] = (2**bits - 1) << 8 * (k % 4)
        assert list(printed[3:]) == quads


def test_words_of_activations_are_units_of_the_weights(maps):
    """Code i of eight lies where code i of a 4-bit unit does, in two's complement."""
    for (i,), (one, word, code) in maps["four"].items():
        assert maps["unit"][4, i][0] == 15 * one and word == one and code == -1


def test_stream_k_does_every_piece_once_and_adds_parts_in_order(maps):
    """Every way to cut up to 7 tiles of up to 9 pieces into runs."""
    runs, parts = defaultdict(list), defaultdict(list)
    for (*cut, block, _), run in maps["run"].items():
        runs[tuple(cut)].append((block, *run))
    for (*cut, tile), part in maps["parts"].items():
        parts[tuple(cut)].append((tile, *part))
    for (tiles, depth, blocks), given in runs.items():
        sizes = [sum(r[3] - r[2] for r in given if r[0] == b) for b in range(blocks)]
        assert max(sizes) - min(sizes) <= 1  # an even share
        slots = [slot for *_, whole, slot in given if not whole]
        assert len(set(slots)) == len(slots) and all(s < 2 * blocks for s in slots)
        shares = any(not whole for *_, whole, _ in given)
        for tile, begin, end, said in parts[tiles, depth, blocks]:
            assert said or not shares  # a workspace and a second kernel where one is needed
            pieces = sorted((first, last, whole, slot) for _, t, first, last, whole, slot in given
                            if t == tile)  # fmt: skip
            assert pieces[0][0] == 0 and pieces[-1][1] == depth
            assert all(a[1] == b[0] for a, b in zip(pieces, pieces[1:], strict=False))
            if begin == end:
                assert len(pieces) == 1 and pieces[0][2]
            else:  # what sum_parts reads, in its order
                read = [2 * b + (b == begin) for b in range(begin, end + 1)]
                assert read == [slot for *_, slot in pieces]


def test_shared_places_are_a_permutation_without_bank_conflicts(maps):
    place = [maps["shared_place"][e,][0] for e in range(32768)]
    assert sorted(place) == list(range(32768))
    assert all(p // 32 == e // 32 for e, p in enumerate(place))
    assert all(p // 4 == place[e - e % 4] // 4 for e, p in enumerate(place))  # 16 bytes together

    def banks(bits, words):  # of numbers that differ in these bits
        of = [sum(1 << b for i, b in enumerate(bits) if n >> i & 1) for n in range(1 << len(bits))]
        return [place[e] % 32 // words for e in of]

    for lo in range(3, 13):  # eight lanes with 16 bytes: bits beside the chunks'
        lanes = [b for b in range(3, 15) if not lo <= b < lo + 3][:3]
        assert len(set(banks(lanes, 4))) == 8, lo
    for k in range(5, 13):  # a base's fragments: 32 lanes with 4 bytes, 16 with 8
        assert len(set(banks([0, 1, 2, k + 1, k + 2], 1))) == 32, k
        assert len(set(banks([1, 2, k, k + 1], 2))) == 16, k


def test_lanes_read_x_from_different_banks(maps):
    """The lanes that one cycle serves (8 of 16 bytes, 16 of 8) touch each bank once."""
    for (x, bits, _, _), (columns, _, _, _, pitch, _, _) in maps["shape"].items():
        if columns != 8 and x != "int4":
            continue
        size = {"half": 2, "int8": 1, "int4": 0.5}[x]
        width = int(min(columns, 16 if x == "int4" else 8) * size)
        for first in range(0, 32, 128 // width):
            banks = [
                int(lane // 4 * pitch + lane % 4 * columns * size) // 4 % 32 + word
                for lane in range(first, first + 128 // width)
                for word in range(width // 4)
            ]
            assert len(set(banks)) == 32, (x, bits)


def test_blocks_fit_every_card(maps):
    for (_, _, _, level), (*_, shared) in maps["shape"].items():
        assert shared <= (64 if level == 75 else 99) * 1024


# ---- what nvcc makes of them ---------------------------------------------------------------------

# Kernels that read rows by 16 bytes an access. Others take a word or a channel a thread, so that a
# warp reads whole lines.
READ_WIDE = (
    "product_bfloat", "gemv", "hadamard", "norm_quantize", "product_codes", "product_half",
    "pseudo_quantize", "quantize", "quantize_per_token", "scaled_error",
)  # fmt: skip


def compile_for(architecture, source, folder):
    """The cubin. Without spills a kernel has at most 255 registers a thread, and two blocks of four
    warps, as products start, have their 65536 on a multiprocessor."""
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    done = subprocess.run(
        [tool("nvcc"), *FLAGS, f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
         "-cubin", "-o", str(cubin), str(source)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for spills in re.findall(r"(\d+) bytes spill", done.stderr):
        assert spills == "0", done.stderr[-3000:]
    return cubin


def compile_all(architecture, folder):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(lambda s: compile_for(architecture, s, folder), SOURCES))
    return {s.stem: cubin for s, cubin in zip(SOURCES, made, strict=True)}


def instructions(cubin):
    text = subprocess.run([tool("nvdisasm"), "-c", cubin], capture_output=True, text=True).stdout
    return set(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", text, re.M))


def check_instructions(architecture, cubins):
    found = {name: instructions(cubin) for name, cubin in cubins.items()}
    for name, used in found.items():
        assert len(used) > 3 or name in ("device",), (name, "nothing was compiled")
        assert not {i for i in used if i.startswith(("LDL", "STL"))}, (name, "uses local memory")
    half, bfloat, codes = (found[f"product_{x}"] for x in ("half", "bfloat", "codes"))
    fours = {i for i in codes if i.startswith("IMMA") and "S4" in i}
    copies = [any(i.startswith("LDGSTS") and i.endswith("128") for i in used)
              for used in (half, codes)]  # fmt: skip
    if architecture == 75:
        assert "HMMA.1688.F32" in half and "IMMA.8816.S8.U8" in codes
        assert fours == {"IMMA.8832.S4.U4"} and not any(copies)
        assert not any(i.startswith("HMMA") for i in bfloat)  # no such products there
    else:
        assert "HMMA.16816.F32" in half and "IMMA.16832.S8.U8" in codes and all(copies)
        assert "HMMA.16816.F32.BF16" in bfloat
        assert fours == (set() if architecture == 90 else {"IMMA.16864.S4.U4"})
    for name in READ_WIDE[1:] if architecture == 75 else READ_WIDE:  # no bfloat16 there
        wide = ("LDG.E.128", "LDGSTS.E.BYPASS.128", "LDGSTS.E.BYPASS.LTC128B.128")
        assert any(i.startswith(wide) for i in found[name]), (name, "no 16-byte loads")
    for name in ("pseudo_quantize", "dequantize", "dense_packed", "hadamard", "scaled_error"):
        assert any(i.startswith("STG.E.128") for i in found[name]), (name, "no 16-byte stores")


needs_nvcc = pytest.mark.skipif(
    tool("nvcc") is None, reason="no nvcc: pip install 'fewbit[cuda]', or a CUDA toolkit on PATH"
)


@needs_nvcc
@pytest.mark.timeout(1200)
def test_compiles_for_a_t4_without_warnings_or_spills(tmp_path):
    cubins = compile_all(75, tmp_path)
    if tool("nvdisasm"):
        check_instructions(75, cubins)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_for_every_card(tmp_path, architecture):
    """pytest -m slow tests/test_cuda_build.py; CUDACXX=/path/to/nvcc takes another compiler."""
    cubins = compile_all(architecture, tmp_path)
    if tool("nvdisasm"):
        check_instructions(architecture, cubins)


@needs_nvcc
@pytest.mark.skipif(tool("cuobjdump") is None, reason="no cuobjdump: pip install 'fewbit[cuda]'")
def test_a_binary_holds_every_card_and_ptx_for_later_ones(tmp_path):
    """The architectures of cuda.cmake, for a smallest kernel."""
    text = (ROOT / "cpp" / "cuda" / "cuda.cmake").read_text()
    said = re.search(r"default_architectures (75-real.*)\)", text).group(1).split()
    codes = []
    for one in said:
        number, real = one.split("-")[0], one.endswith("-real")
        code = f"sm_{number}" if real else f"[sm_{number},compute_{number}]"
        codes.append(f"-gencode=arch=compute_{number},code={code}")
    library = tmp_path / "object.o"
    subprocess.run(
        [tool("nvcc"), *FLAGS, *codes, "-c", "-Xcompiler=-fPIC", "-o", str(library),
         str(ROOT / "cpp" / "cuda" / "w4a4_linear.cu")],
        check=True, capture_output=True,
    )  # fmt: skip
    listed = [
        subprocess.run([tool("cuobjdump"), flag, library], capture_output=True, text=True).stdout
        for flag in ("-lelf", "-lptx")
    ]
    assert set(re.findall(r"sm_(\d+)\.cubin", listed[0])) == {str(a) for a in ARCHITECTURES}
    assert set(re.findall(r"sm_(\d+)\.ptx", listed[1])) == {"90"}
