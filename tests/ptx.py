"""Runs a kernel as nvcc made it: an interpreter of the PTX that the package's kernels compile to.

The emulator (cpp/cuda/emulate.h) runs the kernels' C++; inline PTX has a twin there, and threads
run one after the other. Here the instructions themselves run, written down anew from the PTX ISA
9.0: all threads of some blocks in lockstep, the ones that are behind first. What no result shows is
watched besides, as compute-sanitizer does on a card: accesses that are not aligned, reads of shared
memory that nobody wrote, and two threads at one place, one of them writing, without a barrier in
between (in shared memory and, inside one launch, in global memory).

    with Cards(folder, architecture) as cards:   # the emulator's launches come here
        ops.quantize(..)
    cards.problems                               # what was wrong besides the result

What is counted: how often warps issue each instruction, the sectors of global memory and the passes
over shared memory's banks that accesses take (``cards.costs``).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

WARP = 32
LANES = 1 << 15  # threads that run at once, in whole blocks
MOST_PROBLEMS = 20

TYPES = {
    "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TWICE = {np.uint16: np.uint32, np.int16: np.int32, np.uint32: np.uint64, np.int32: np.int64}
FULL = slice(None)
SHARED = {75: 64 << 10, 80: 163 << 10}  # bytes that a block may have


class Unknown(Exception):
    """An instruction, or a use of one, that this file does not describe."""


# ---- reading PTX -------------------------------------------------------------------------------


@dataclass
class Instruction:
    text: str
    opcode: str
    operands: list[str]
    guard: str = ""  # the predicate's register; "!" in front where it is negated
    target: int = -1  # of a branch
    joins: bool = False  # threads may meet here
    whole: bool = False  # by whole warps: lanes wait here for the others
    run: object = None


@dataclass
class Kernel:
    name: str
    code: list[Instruction]
    widths: dict[str, type]  # a register's prefix to the type of its bits
    shared: dict[str, int]  # a shared variable to its place
    static: int  # bytes of shared variables, without the launch's
    threads: int = 0  # of a block, at most: what registers are given out by; 0: not said
    granule: int = 4  # bytes that accesses to shared memory are watched by


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX file."""
    outside: dict[str, tuple[int, int]] = {}
    found = {}
    pieces = re.split(r"(?m)^(?=\.visible \.entry|\.entry|\.weak \.entry)", text)
    outside.update(_shared(pieces[0]))
    for piece in pieces[1:]:
        name = re.search(r"\.entry\s+([\w$]+)", piece)[1]
        body = piece[piece.index("{") + 1 : piece.rindex("\n}")]
        outside.update(_shared(piece[piece.rindex("\n}") :]))
        found[name] = _kernel(name, body, outside)
        bounds = re.search(r"\.maxntid\s+(\d+)", piece[: piece.index("{")])
        found[name].threads = int(bounds[1]) if bounds else 0
    return found


def _shared(text: str) -> dict[str, tuple[int, int]]:
    """Shared variables: alignment and bytes, 0 where the launch says how many."""
    declared = re.findall(r"\.shared \.align (\d+) \.(\w+) ([\w$]+)(\[\d*\])?;", text)
    sizes = {"": 1, "[]": 0}
    return {
        name: (int(align), np.dtype(TYPES[kind]).itemsize * sizes.get(n, int(n.strip("[]") or 0)))
        for align, kind, name, n in declared
    }


def _kernel(name: str, body: str, outside: dict[str, tuple[int, int]]) -> Kernel:
    variables = {**outside, **_shared(body)}
    widths = {
        prefix: TYPES[kind.replace("f", "b").replace("s", "b") if kind != "pred" else kind]
        for kind, prefix in re.findall(r"\.reg \.(\w+)\s+(%[a-z]+)<", body)
    }
    shared, at = {}, 0
    for variable, (align, size) in variables.items():  # the launch's bytes come last, size 0
        if variable not in body:
            continue
        if size:
            at = -(-at // align) * align
            shared[variable] = at
            at += size
    static = -(-at // 16) * 16
    shared.update({v: static for v, (_, size) in variables.items() if not size})

    code, labels, joins = [], {}, True
    body = re.sub(r"//[^\n]*", "", body)
    for line in re.split(r"[;\n]", body):
        line = line.strip()
        label = re.match(r"([$\w]+):\s*", line)
        if label:
            labels[label[1]], joins = len(code), True
            line = line[label.end() :]
        if not line or line[0] in ".{}":
            continue
        guard, opcode, rest = re.match(r"(?:@(!?%p\d+)\s+)?([\w.:]+)\s*(.*)", line).groups()
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        code.append(Instruction(line, opcode, operands, guard or "", joins=joins))
        code[-1].whole = opcode.startswith(("shfl", "mma", "bar.warp"))
        joins = opcode.startswith(("bra", "bar.sync", "ret")) or code[-1].whole
        code[-1].joins |= code[-1].whole
    for one in code:
        if one.opcode.startswith("bra"):
            one.target = labels[one.operands[0]]
    kernel = Kernel(name, code, widths, shared, static)
    if re.search(r"\b(ld|st)\.shared\.[us](8|16)", body):
        kernel.granule = 1
    for one in code:
        if not one.opcode.startswith(("bra", "bar.sync", "ret")):
            one.run = _compile(one, kernel)
    return kernel


# ---- operands ----------------------------------------------------------------------------------
# A reader is called with a machine and its active lanes, a slice or their numbers.


def _reader(text: str, kernel: Kernel, kind: type):
    """Values of an operand as ``kind``: a register's low bits, or a constant."""
    if text[0] == "%" and text in SPECIAL:
        which = SPECIAL[text]
        return lambda m, a: m.special[which][a].astype(kind, copy=False)
    if text[0] == "%":
        width = kernel.widths[text.rstrip("0123456789")]
        size, wanted = np.dtype(width).itemsize, np.dtype(kind).itemsize
        if width is np.bool_ or size == wanted:
            return lambda m, a: m.register(text, width)[a].view(kind)
        if size > wanted:
            narrow = UNSIGNED[wanted]
            return lambda m, a: m.register(text, width)[a].astype(narrow).view(kind)
        raise Unknown(f"{text} holds less than {kind.__name__}")
    if text[:2] in ("0f", "0d"):
        bits = UNSIGNED[4 if text[1] == "f" else 8](int(text[2:], 16))
        constant = np.array(bits).view(np.float32 if text[1] == "f" else np.float64)
        constant = constant.view(kind) if kind not in TWICE else constant.view(kind)
    elif text in kernel.shared:
        constant = np.array(kernel.shared[text], dtype=kind)
    elif text.startswith(kernel.name + "_param"):
        constant = np.array(0, dtype=kind)
    else:
        value = int(text, 0)
        if kind is np.bool_:
            constant = np.array(value != 0)
        elif np.dtype(kind).kind == "f":
            raise Unknown(f"{text} as a float")
        else:
            size = 8 * np.dtype(kind).itemsize
            constant = np.array(value % 2**size, dtype=UNSIGNED[size // 8]).view(kind)
    return lambda m, a: constant


SPECIAL = {
    f"%{name}.{axis}": f"{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid")
    for axis in "xyz"
}  # fmt: skip


def _writer(text: str, kernel: Kernel):
    """Puts a result into a register, extended by its sign or zeros where that is wider."""
    if text == "_":
        return lambda m, a, value: None
    width = kernel.widths[text.rstrip("0123456789")]
    size = np.dtype(width).itemsize

    def put(m, a, value):
        value = np.asarray(value)
        if value.dtype != width:
            if value.dtype.itemsize != size:
                signed = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
                wide = signed[size] if value.dtype.kind == "i" else UNSIGNED[size]
                value = value.astype(wide)
            value = value.view(width)
        m.register(text, width)[a] = value

    return put


def _address(text: str, kernel: Kernel):
    """[register + offset] or [variable + offset]."""
    base, _, offset = text[1:-1].partition("+")
    offset = int(offset or 0)
    if base in kernel.shared:
        constant = np.array(kernel.shared[base] + offset)
        return lambda m, a: constant
    if base.startswith(kernel.name + "_param"):
        constant = np.array(offset)
        return lambda m, a: constant
    width = kernel.widths[base.rstrip("0123456789")]
    step = width(offset % 2 ** (8 * np.dtype(width).itemsize))  # addresses wrap as registers do
    return lambda m, a: (m.register(base, width)[a] + step).astype(np.int64)


def _vector(text: str) -> list[str]:
    return re.findall(r"[^{},\s]+", text) if text[0] == "{" else [text]


# ---- instructions ------------------------------------------------------------------------------


def _divide(a, b):
    if a.dtype.kind == "f":
        return a / b
    _check_divisor(b)
    quotient = a // b
    if a.dtype.kind == "i":  # towards zero
        quotient += ((a % b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)
    return quotient


def _remainder(a, b):
    return a - _divide(a, b) * b


def _check_divisor(b):
    if (b == 0).any():
        raise Unknown("a division by zero")


def _low_or_high(a, b, high: bool):
    """The low or the high half of a product."""
    kind = np.result_type(a, b).type
    if not high:
        return a * b
    if kind in TWICE:
        bits = 8 * np.dtype(kind).itemsize
        return (a.astype(TWICE[kind]) * b.astype(TWICE[kind]) >> bits).astype(kind)
    signed = kind is np.int64
    a, b = np.broadcast_arrays(a, b)
    product = [int(x) * int(y) >> 64 for x, y in zip(a.ravel(), b.ravel(), strict=True)]
    return np.array([p % 2**64 for p in product], np.uint64).view(np.int64 if signed else kind)


def _wide(a, b):
    kind = TWICE[np.result_type(a, b).type]
    return a.astype(kind) * b.astype(kind)


def _shift(left: bool, a, b):
    """Amounts past the width give zeros, or copies of the sign."""
    bits = 8 * a.dtype.itemsize
    amount = np.minimum(b, bits - 1).astype(a.dtype)
    shifted = a << amount if left else a >> amount
    if a.dtype.kind == "i" and not left:
        return shifted
    return np.where(b >= bits, a.dtype.type(0), shifted)


def _multiply_add(a, b, c):
    """float32 a b + c rounded once. The product is exact in float64; the sum is rounded to odd
    there, so that rounding it again gives the same (Boldo and Melquiond, 2008)."""
    if a.dtype == np.float64:
        raise Unknown("fma of float64")
    a, b, c = (np.asarray(v, np.float64) for v in (a, b, c))
    product = a * b
    total = product + c
    back = total - product
    rest = (product - (total - back)) + (c - back)
    bits = np.atleast_1d(total).view(np.int64).copy()
    move = np.isfinite(rest) & (rest != 0) & (bits & 1 == 0)
    bits += np.where(move, np.where((rest > 0) == (total > 0), 1, -1), 0)
    return bits.view(np.float64).astype(np.float32)


def _extreme(least: bool, a, b):
    """min and max: the other where one is NaN; -0 is less than 0."""
    if a.dtype.kind != "f":
        return np.minimum(a, b) if least else np.maximum(a, b)
    value = np.fmin(a, b) if least else np.fmax(a, b)
    zero = (a == 0) & (b == 0)
    sign = (np.signbit(a) | np.signbit(b)) if least else (np.signbit(a) & np.signbit(b))
    return np.where(zero, np.where(sign, a.dtype.type(-0.0), a.dtype.type(0)), value)


COMPARE = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _compare(how: str, a, b):
    if a.dtype.kind != "f":
        return a != b if how == "ne" else COMPARE[how](a, b)
    either = np.isnan(a) | np.isnan(b)
    if how in ("nan", "num"):
        return either if how == "nan" else ~either
    if how == "ne":
        return (a != b) & ~either
    if how in COMPARE:
        return COMPARE[how](a, b)
    return either | (a != b if how == "neu" else COMPARE[how[:-1]](a, b))


def _to_integer(value, kind):
    """A float already rounded: held to the range, NaN gives 0."""
    info = np.iinfo(kind)
    value = np.nan_to_num(value.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    held = np.clip(value, float(info.min), float(info.max))
    past = value >= float(info.max)  # which float64 may round up
    return np.where(past, info.max, np.where(past, 0, held).astype(kind)).astype(kind)


def _convert(parts: list[str]):
    to, source = TYPES[parts[-2]], TYPES[parts[-1]]
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    how = next((rounding[p] for p in parts if p in rounding), None)
    floats = [np.dtype(k).kind == "f" for k in (source, to)]
    if floats == [True, False]:
        return source, lambda v: _to_integer(how(v), to)
    if floats == [True, True] and how is not None:
        return source, lambda v: how(v).astype(to)
    return source, lambda v: v.astype(to)


def _permute(a, b, selector):
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        which = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (which & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint8)
        sign = np.where(byte & 0x80, np.uint8(0xFF), np.uint8(0))
        byte = np.where(which & np.uint32(8), sign, byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def _logic(table: int, a, b, c):
    """lop3: bit 4 a + 2 b + c of the table, for each bit of the operands."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for row in range(8):
        if table >> row & 1:
            given = [v if row >> place & 1 else ~v for v, place in ((a, 2), (b, 1), (c, 0))]
            result |= given[0] & given[1] & given[2]
    return result


def _insert(field_, into, start, length):
    """bfi: ``length`` low bits of a field at bit ``start`` of a value."""
    kind = into.dtype.type
    bits = 8 * into.dtype.itemsize
    start, length = int(start) & 0xFF, int(length) & 0xFF
    mask = ((1 << length) - 1) << start & (1 << bits) - 1
    return (into & kind(~mask & (1 << bits) - 1)) | (field_ << kind(start) & kind(mask))


def _dot_bytes(a, b, c):
    bytes_of = [np.atleast_1d(v).astype(np.int32)[:, None].view(np.int8) for v in (a, b)]
    return (bytes_of[0].astype(np.int32) * bytes_of[1].astype(np.int32)).sum(1, np.int32) + c


def _bfloat(v):
    """The bits of the nearest bfloat16, ties to even."""
    bits = np.asarray(v, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.where(np.isnan(v), np.uint32(0x7FFF), rounded >> np.uint32(16))


def _two_bfloats(high, low):
    return _bfloat(high) << np.uint32(16) | _bfloat(low)


def _halves(operation, a, b):
    pair = [np.ascontiguousarray(np.broadcast_to(v, np.broadcast(a, b).shape)) for v in (a, b)]
    left, right = (v.view(np.float16).astype(np.float32) for v in pair)
    return operation(left, right).astype(np.float16).view(np.uint32)


def _halves_multiply_add(a, b, c):
    """Rounded once: products and sums of halves that a half can show are exact in float64."""
    shape = np.broadcast(a, b, c).shape
    a, b, c = (np.ascontiguousarray(np.broadcast_to(v, shape)).view(np.float16).astype(np.float64)
               for v in (a, b, c))  # fmt: skip
    return (a * b + c).astype(np.float16).view(np.uint32)


TWO = {"add": np.add, "sub": np.subtract, "div": _divide, "rem": _remainder,
       "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
       "shl": partial(_shift, True), "shr": partial(_shift, False),
       "min": partial(_extreme, True), "max": partial(_extreme, False)}  # fmt: skip
ONE = {"mov": lambda v: v, "not": np.bitwise_not, "neg": np.negative, "abs": np.abs,
       "sqrt": np.sqrt, "rcp": lambda v: np.float32(1) / v, "cvta": lambda v: v}  # fmt: skip


def _compile(one: Instruction, kernel: Kernel):
    """What the instruction does to a machine's active lanes."""
    parts = one.opcode.split(".")
    name, operands = parts[0], one.operands
    if name == "mma":
        return _matrix(parts, operands, kernel)
    if name in ("ld", "st"):
        return _access(name, parts[1:], operands, kernel)
    if name == "cp":
        return _copies(parts, operands, kernel)
    if name == "shfl":
        return _shuffle(parts, operands, kernel)
    if one.opcode == "bar.warp.sync":
        return lambda m, a: m.warp_barrier(a)
    if name == "mov" and "{" in "".join(operands):
        return _split_or_join(operands, kernel)

    kind = TYPES.get(parts[-1])
    read = partial(_reader, kernel=kernel, kind=kind)
    if name == "setp":
        left, right = (read(o) for o in operands[1:])
        put, how = _writer(operands[0], kernel), parts[1]
        return lambda m, a: put(m, a, _compare(how, left(m, a), right(m, a)))
    if name == "selp":
        yes, no = (read(o) for o in operands[1:3])
        which = _reader(operands[3], kernel, np.bool_)
        put = _writer(operands[0], kernel)
        return lambda m, a: put(m, a, np.where(which(m, a), yes(m, a), no(m, a)))
    if name == "cvt" and parts[1:] == ["rn", "bf16x2", "f32"]:
        return _plain(_two_bfloats, operands, kernel, [np.float32] * 2)
    if name == "cvt" and parts[1:] == ["rn", "bf16", "f32"]:
        return _plain(lambda v: _bfloat(v).astype(np.uint16), operands, kernel, [np.float32])
    if name == "cvt":
        source, convert = _convert(parts)
        return _plain(convert, operands, kernel, [source])
    if one.opcode == "fma.rn.f16x2":
        return _plain(_halves_multiply_add, operands, kernel, [np.uint32] * 3)
    if parts[-1] == "f16x2" and name in ("add", "sub"):
        return _plain(partial(_halves, TWO[name]), operands, kernel, [np.uint32] * 2)
    if name in ("shl", "shr"):
        return _plain(TWO[name], operands, kernel, [kind, np.uint32])
    if name in ("mul", "mad") and "f" not in parts[-1]:
        product = _wide if "wide" in parts else partial(_low_or_high, high="hi" in parts)
        if name == "mul":
            return _plain(product, operands, kernel, [kind] * 2)
        third = TWICE[kind] if "wide" in parts else kind
        return _plain(lambda a, b, c: product(a, b) + c, operands, kernel, [kind] * 2 + [third])
    if name == "mul":
        return _plain(np.multiply, operands, kernel, [kind] * 2)
    if name == "fma":
        return _plain(_multiply_add, operands, kernel, [kind] * 3)
    if name == "prmt" and len(parts) == 2:
        return _plain(_permute, operands, kernel, [np.uint32] * 3)
    if name == "lop3":
        return _plain(partial(_logic, int(operands[4], 0)), operands[:4], kernel, [np.uint32] * 3)
    if name == "bfi":
        return _plain(_insert, operands, kernel, [kind, kind, np.uint32, np.uint32])
    if name == "dp4a" and parts[1:] == ["s32", "s32"]:
        return _plain(_dot_bytes, operands, kernel, [np.int32] * 3)
    if one.opcode == "max.NaN.f32":
        return _plain(np.maximum, operands, kernel, [kind] * 2)
    if name in TWO:
        return _plain(TWO[name], operands, kernel, [kind] * 2)
    if name in ONE:
        return _plain(ONE[name], operands, kernel, [kind])
    raise Unknown(one.text)


def _plain(function, operands, kernel, kinds):
    if len(operands) != 1 + len(kinds):
        raise Unknown(f"{operands} for {len(kinds)} sources")
    sources = [_reader(o, kernel, k) for o, k in zip(operands[1:], kinds, strict=True)]
    put = _writer(operands[0], kernel)
    return lambda m, a: put(m, a, function(*[s(m, a) for s in sources]))


def _split_or_join(operands, kernel):
    to, source = (_vector(o) for o in operands)
    if len(to) == 1:  # the first is the lowest part
        width = kernel.widths[to[0].rstrip("0123456789")]
        part = UNSIGNED[np.dtype(width).itemsize // len(source)]
        readers, put = [_reader(o, kernel, part) for o in source], _writer(to[0], kernel)
        bits = 8 * np.dtype(part).itemsize

        def join(m, a):
            values = [width(r(m, a)) << width(bits * i) for i, r in enumerate(readers)]
            put(m, a, np.bitwise_or.reduce(np.broadcast_arrays(*values)))

        return join
    width = kernel.widths[source[0].rstrip("0123456789")]
    part = UNSIGNED[np.dtype(width).itemsize // len(to)]
    read, bits = _reader(source[0], kernel, width), 8 * np.dtype(part).itemsize
    puts = [_writer(o, kernel) for o in to]

    def split(m, a):
        value = read(m, a)
        for i, put in enumerate(puts):
            put(m, a, (value >> width(bits * i)).astype(part))

    return split


def _access(name, parts, operands, kernel):
    """ld and st: of the parameter, of shared or of global memory."""
    parts = [p for p in parts if p not in ("nc", "volatile")]
    space, kind = parts[0], TYPES[parts[-1]]
    where = _address(operands[name == "ld"], kernel)
    registers = _vector(operands[name == "st"])
    size = np.dtype(kind).itemsize
    if space not in ("param", "shared", "global") or (space == "param" and name == "st"):
        raise Unknown(f"{name}.{space}")
    if name == "ld":
        puts = [_writer(r, kernel) for r in registers]
        load = {"param": "load_parameter", "shared": "load_shared", "global": "load_global"}[space]

        def run(m, a):
            at = where(m, a)
            values = getattr(m, load)(a, at, size, len(puts))
            for put, value in zip(puts, values, strict=True):
                put(m, a, value.view(kind))

        return run
    sources = [_reader(r, kernel, UNSIGNED[size]) for r in registers]
    save = {"shared": "store_shared", "global": "store_global"}[space]
    return lambda m, a: getattr(m, save)(a, where(m, a), size, [s(m, a) for s in sources])


def _copies(parts, operands, kernel):
    """cp.async.cg of 16 bytes, as many of them from memory as the last operand says."""
    if parts == ["cp", "async", "commit_group"]:
        return lambda m, a: m.end_copies(a)
    if parts == ["cp", "async", "wait_group"]:
        left = int(operands[0])
        return lambda m, a: m.wait_for_copies(a, left)
    if parts != ["cp", "async", "cg", "shared", "global"] or operands[2] != "16":
        raise Unknown(".".join(parts))
    to, source = _address(operands[0], kernel), _address(operands[1], kernel)
    size = _reader(operands[3], kernel, np.uint32)
    return lambda m, a: m.copy_later(a, to(m, a), source(m, a), size(m, a))


def _shuffle(parts, operands, kernel):
    """shfl.sync.bfly or idx: PTX ISA 9.7.9.6."""
    to, _, inside = operands[0].partition("|")
    put, put_inside = _writer(to, kernel), _writer(inside or "_", kernel)
    width = kernel.widths[operands[1].rstrip("0123456789")]
    lane_of, clamp, members = (_reader(o, kernel, np.uint32) for o in operands[2:5])
    how = parts[2]
    if how not in ("bfly", "idx"):
        raise Unknown(".".join(parts))

    def run(m, a):
        if (members(m, a) != 0xFFFFFFFF).any():
            raise Unknown("a shuffle of part of a warp")
        lane = m.lane[a]
        c = clamp(m, a).astype(np.int64)
        segment, last = c >> 8 & 31, c & 31
        most, least = (lane & segment) | (last & ~segment), lane & segment
        by = lane_of(m, a).astype(np.int64) & 31
        other = lane ^ by if how == "bfly" else least | (by & ~segment)
        ok = other <= most
        other = np.where(ok, other, lane)
        put(m, a, m.register(operands[1], width)[m.number[a] - lane + other])
        put_inside(m, a, ok)

    return run


# mma: rows, columns, depth; bits of an element; what A and B hold. Where element e of a lane's
# registers lies, from the figures of PTX ISA 9.7.14.5 (group = lane / 4, t = lane % 4).
def _matrix(parts, operands, kernel):
    if parts[:3] != ["mma", "sync", "aligned"] or parts[4:6] != ["row", "col"]:
        raise Unknown(".".join(parts))
    rows, columns, depth = map(int, re.fullmatch(r"m(\d+)n(\d+)k(\d+)", parts[3]).groups())
    bits = {"f16": 16, "bf16": 16, "s8": 8, "u8": 8, "s4": 4, "u4": 4}
    result, a_kind, b_kind, sum_kind = parts[6:]
    if (columns, result) != (8, sum_kind) or bits[a_kind] != bits[b_kind]:
        raise Unknown(".".join(parts))
    each = 32 // bits[a_kind]  # elements of a register
    lane = np.arange(WARP)
    group, t = lane // 4, lane % 4

    def places(count, of_a):
        """(lane, e) to (row or column, k): registers go through rows first, then through k."""
        register, e = np.divmod(np.arange(count * each), each)
        row_half, k_half = (register % 2, register // 2) if of_a and rows == 16 else (0, register)
        k = k_half * 4 * each + t[:, None] * each + e
        line = group[:, None] + 8 * row_half + 0 * e
        return np.broadcast_to(line, k.shape), k

    to, left, right, add = (_vector(o) for o in operands)
    maps = [places(len(left), True), places(len(right), False)]
    if maps[0][1].max() + 1 != depth or maps[1][1].max() + 1 != depth:
        raise Unknown(".".join(parts))
    e = np.arange(rows // 4)
    c_row, c_column = group[:, None] + 8 * (e // 2), t[:, None] * 2 + e % 2
    number = np.float32 if result == "f32" else np.int32
    readers = [[_reader(o, kernel, np.uint32) for o in some] for some in (left, right)]
    sums = [_reader(o, kernel, number) for o in add]
    puts = [_writer(o, kernel) for o in to]

    def fragment(m, a, which, kind):
        words = np.stack([r(m, a).reshape(-1, WARP) for r in readers[which]], -1)
        if kind == "f16":
            values = words.view(np.float16).astype(np.float64)
        elif kind == "bf16":
            halves = words.view(np.uint16).astype(np.uint32) << np.uint32(16)
            values = halves.view(np.float32).astype(np.float64)
        else:
            shifts = np.arange(each, dtype=np.uint32) * np.uint32(bits[kind])
            values = (words[..., None] >> shifts & np.uint32(2 ** bits[kind] - 1)).astype(np.int64)
            if kind[0] == "s":
                values -= (values >> bits[kind] - 1) << bits[kind]
            values = values.reshape(*words.shape[:2], -1)
        matrix = np.zeros((len(words), rows if which == 0 else columns, depth), values.dtype)
        matrix[:, maps[which][0], maps[which][1]] = values
        return matrix

    def run(m, a):
        left, right = fragment(m, a, 0, a_kind), fragment(m, a, 1, b_kind).swapaxes(1, 2)
        total = np.zeros((len(left), rows, columns), left.dtype)
        for i, before in enumerate(sums):
            total[:, c_row[:, i], c_column[:, i]] = before(m, a).reshape(-1, WARP)
        if number is np.int32:
            total += left @ right
        else:
            for k in range(0, depth, depth // 2):
                step = slice(k, k + depth // 2)
                total = _cut_sum(total, left[:, :, step, None] * right[:, None, step, :])
        for i, put in enumerate(puts):
            mine = total[:, c_row[:, i], c_column[:, i]].reshape(-1)
            put(m, a, mine.astype(np.int64).astype(np.int32) if number is np.int32
                else mine.astype(np.float32))  # fmt: skip

    return run


def _cut_sum(total: np.ndarray, products: np.ndarray) -> np.ndarray:
    """total [warps, rows, columns] + products [warps, rows, terms, columns], as tensor cores add:
    all terms aligned to the largest, what is below its 24 bits cut off, and the sum cut to float32
    (Fasi et al. 2021, PeerJ CS 7:e330: V100, T4, A100; later cards keep some bits more)."""

    def exponent(x):
        return np.maximum(np.frexp(x)[1] - 24, -149)

    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.maximum(np.abs(products).max(2), np.abs(total))
        last = exponent(largest)
        up = np.ldexp(1.0, -last)
        scaled = np.trunc(total * up) + np.trunc(products * up[:, :, None]).sum(2)
        exact = np.ldexp(scaled, last)
        last = exponent(exact)
        cut = np.ldexp(np.trunc(np.ldexp(exact, -last)), last)
        return np.where(np.isfinite(largest), cut, total + products.sum(2))


# ---- memory ------------------------------------------------------------------------------------


class AllMemory:
    """This process's memory by address."""

    FIRST = 4096

    def __init__(self) -> None:
        self.views = {}
        for size, kind in UNSIGNED.items():
            holder = type("Memory", (), {})()
            holder.__array_interface__ = {
                "data": (self.FIRST, False), "typestr": np.dtype(kind).str, "version": 3,
                "shape": ((2**47 - self.FIRST) // size,),
            }  # fmt: skip
            self.views[size] = np.asarray(holder)

    def at(self, address, size: int):
        return self.views[size], (address - self.FIRST) // size


MEMORY = AllMemory()


@dataclass
class Watch:
    """Who last wrote and read each granule of shared memory, and when: barriers passed so far."""

    shape: tuple[int, int]
    writer: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        def filled(value):
            return np.full(self.shape, value, np.int32)

        self.writer, self.written, self.write_sync = filled(-1), filled(-1), filled(0)
        self.first, self.last = filled(-1), filled(-1)  # readers, from .. to
        self.read, self.read_sync = filled(-1), filled(0)
        self.pending = np.zeros(self.shape, bool)


class Machine:
    """Some blocks of a launch."""

    def __init__(self, cards: Cards, kernel: Kernel, blocks, grid, block, shared, args) -> None:
        threads = block[0] * block[1] * block[2]
        self.cards, self.kernel, self.args = cards, kernel, np.frombuffer(args, np.uint8)
        self.total = len(blocks) * threads
        self.number = np.arange(self.total)
        self.block, self.thread = np.divmod(self.number, threads)
        self.lane, self.warp = self.thread % WARP, self.thread // WARP
        warps = -(-threads // WARP)
        self.a_warp = self.block * warps + self.warp  # of all blocks
        self.whole = threads % WARP == 0
        of_grid = np.asarray(blocks)[self.block]
        self.real_block = of_grid
        x, y, z = (np.uint32(v) for v in grid)
        self.special = {
            "tid.x": (self.thread % block[0]).astype(np.uint32),
            "tid.y": (self.thread // block[0] % block[1]).astype(np.uint32),
            "tid.z": (self.thread // (block[0] * block[1])).astype(np.uint32),
            "ctaid.x": (of_grid % x).astype(np.uint32),
            "ctaid.y": (of_grid // x % y).astype(np.uint32),
            "ctaid.z": (of_grid // x // y).astype(np.uint32),
        }  # fmt: skip
        for axis, size, count in zip("xyz", block, (x, y, z), strict=True):
            self.special[f"ntid.{axis}"] = np.full(self.total, size, np.uint32)
            self.special[f"nctaid.{axis}"] = np.full(self.total, count, np.uint32)
        self.registers: dict[str, np.ndarray] = {}
        size = -(-(kernel.static + shared) // 16) * 16
        # What nobody wrote is NaN, and is told apart by Watch.
        self.shared = np.full((len(blocks), max(size, 16)), 0xFF, np.uint8)
        self.watch = Watch((len(blocks), self.shared.shape[1] // kernel.granule))
        self.syncs = np.zeros(len(blocks), np.int32)
        self.warp_syncs = np.zeros(self.a_warp[-1] + 1, np.int32)
        self.alive = np.full(len(blocks), threads)
        self.waits = np.full(self.total, -1)
        self.waiting = np.zeros(len(blocks), np.int64)
        self.commits = np.zeros(self.total, np.int32)
        self.copies: list[tuple] = []
        self.now: Instruction | None = None
        self.issued = np.zeros(len(kernel.code) + 1, np.int64)

    def register(self, name: str, width) -> np.ndarray:
        found = self.registers.get(name)
        if found is None:
            found = self.registers[name] = np.zeros(self.total, width)
        return found

    def problem(self, what: str) -> None:
        self.cards.problem(f"{self.kernel.name}: {what} at {self.now.text}")

    # ---- accesses ------------------------------------------------------------------------------

    def _aligned(self, at, size: int) -> None:
        if (at % size != 0).any():
            self.problem(f"an address that is no multiple of {size}")
            raise Unknown("not aligned")

    def load_parameter(self, a, at, size: int, count: int):
        at = np.atleast_1d(at)
        values = []
        for i in range(count):
            place = (at[:, None] + size * i + np.arange(size)).astype(np.int64)
            if place.max() >= len(self.args):
                raise Unknown("a read past the parameter")
            values.append(self.args[place].copy().view(UNSIGNED[size])[:, 0])
        return values

    def load_global(self, a, at, size: int, count: int):
        at = np.broadcast_to(at, self.number[a].shape)
        self._aligned(at, size * count)
        self.cards.count_sectors(self, a, at, size * count)
        self.cards.seen(self, a, at, size * count, False)
        memory, first = MEMORY.at(at, size)
        return [memory[first + i] for i in range(count)]

    def store_global(self, a, at, size: int, values) -> None:
        at = np.broadcast_to(at, self.number[a].shape)
        self._aligned(at, size * len(values))
        self.cards.count_sectors(self, a, at, size * len(values))
        self.cards.seen(self, a, at, size * len(values), True)
        memory, first = MEMORY.at(at, size)
        for i, value in enumerate(values):
            memory[first + i] = value

    def _shared(self, a, at, size: int):
        at = np.broadcast_to(at, self.number[a].shape)
        self._aligned(at, size)
        if (at < 0).any() or (at + size > self.shared.shape[1]).any():
            self.problem("an address outside the block's shared memory")
            raise Unknown("outside shared memory")
        return self.block[a], at

    def load_shared(self, a, at, size: int, count: int):
        block, at = self._shared(a, at, size * count)
        self.cards.count_passes(self, a, at, size * count)
        self._watch_read(a, block, at, size * count)
        view = self.shared.view(UNSIGNED[size])
        return [view[block, at // size + i] for i in range(count)]

    def store_shared(self, a, at, size: int, values) -> None:
        block, at = self._shared(a, at, size * len(values))
        self.cards.count_passes(self, a, at, size * len(values))
        self._watch_write(a, block, at, size * len(values))
        view = self.shared.view(UNSIGNED[size])
        for i, value in enumerate(values):
            view[block, at // size + i] = value
            if (view[block, at // size + i] != value).any():
                self.problem("two threads write different values to one place")

    def _granules(self, at, size: int):
        g = self.kernel.granule
        return [at // g + i for i in range(max(1, size // g))]

    def _unordered(self, a, block, who, when, sync):
        """Whether an access of thread ``who`` since the last barrier may come after one now."""
        same_warp = who // WARP == self.warp[a]
        synced = same_warp & (sync < self.warp_syncs[self.a_warp[a]])
        return (when == self.syncs[block]) & (who != self.thread[a]) & ~synced

    def _watch_read(self, a, block, at, size: int) -> None:
        w, thread = self.watch, self.thread[a]
        for k in self._granules(at, size):
            here = block, k
            if (w.writer[here] < 0).any():
                self.problem("shared memory that nobody wrote is read")
            if self._unordered(a, block, w.writer[here], w.written[here], w.write_sync[here]).any():
                self.problem("shared memory is read without a barrier after another's write")
            if w.pending[here].any():
                self.problem("shared memory is read while a copy to it is under way")
            since = w.read[here] == self.syncs[block]
            first = np.where(since, np.minimum(w.first[here], thread), thread)
            last = np.where(since, np.maximum(w.last[here], thread), thread)
            # Of equal places the last assignment stays: the least thread, then the greatest.
            w.first[block[::-1], k[::-1]] = first[::-1]
            w.last[here] = last
            w.read[here] = self.syncs[block]
            w.read_sync[here] = self.warp_syncs[self.a_warp[a]]

    def _watch_write(self, a, block, at, size: int) -> None:
        w = self.watch
        for k in self._granules(at, size):
            here = block, k
            if self._unordered(a, block, w.writer[here], w.written[here], w.write_sync[here]).any():
                self.problem("shared memory is written without a barrier after another's write")
            for who in (w.first, w.last):
                if self._unordered(a, block, who[here], w.read[here], w.read_sync[here]).any():
                    self.problem("shared memory is written without a barrier after another's read")
            w.writer[here], w.written[here] = self.thread[a], self.syncs[block]
            w.write_sync[here] = self.warp_syncs[self.a_warp[a]]

    def copy_later(self, a, to, source, size) -> None:
        lanes = self.number[a]
        block, to = self._shared(a, to, 16)
        self._aligned(np.where(size > 0, source, 0), 16)
        self._watch_write(a, block, to, 16)
        self.cards.count_sectors(self, a, source, 16)
        for k in self._granules(to, 16):
            self.watch.pending[block, k] = True
        size = np.broadcast_to(size, lanes.shape)
        self.copies.append((lanes, self.commits[lanes].copy(), to, source, size))

    def end_copies(self, a) -> None:
        self.commits[a] += 1

    def wait_for_copies(self, a, left: int) -> None:
        waits = np.zeros(self.total, bool)
        waits[a] = True
        rest = []
        for lanes, group, to, source, size in self.copies:
            ready = waits[lanes] & (group < self.commits[lanes] - left)
            if ready.any():
                block, at, full = self.block[lanes[ready]], to[ready], size[ready] > 0
                if (size[ready] % 16 != 0).any():
                    raise Unknown("a copy of less than 16 bytes")
                view = self.shared.view(np.uint64)
                for i in range(2):
                    memory, first = MEMORY.at(np.where(full, source[ready], 8192), 8)
                    value = np.zeros(len(at), np.uint64)
                    value[full] = memory[first[full] + i]
                    view[block, at // 8 + i] = value
                for k in self._granules(at, 16):
                    self.watch.pending[block, k] = False
                self._watch_write(lanes[ready], block, at, 16)
            if not ready.all():
                keep = ~ready
                rest.append((lanes[keep], group[keep], to[keep], source[keep], size[keep]))
        self.copies = rest

    def warp_barrier(self, a) -> None:
        self.warp_syncs[np.unique(self.a_warp[a])] += 1

    # ---- running -------------------------------------------------------------------------------

    def run(self) -> None:
        """Threads at the least instruction go on first: those that parted meet again."""
        code = self.kernel.code
        pending: dict[int, list[np.ndarray]] = {0: [self.number]}
        parked: dict[int, list[np.ndarray]] = {}  # lanes that wait for the others of their warp

        def push(pc, lanes):
            if len(lanes):
                pending.setdefault(pc, []).append(lanes)

        while pending:
            pc = min(pending)
            groups = pending.pop(pc) + parked.pop(pc, [])
            lanes = groups[0] if len(groups) == 1 else np.sort(np.concatenate(groups))
            a = FULL if len(lanes) == self.total else lanes
            here = np.bincount(self.a_warp[a], minlength=len(self.warp_syncs))
            complete = here[self.a_warp[a]] == WARP
            warps, whole, begin = np.count_nonzero(here), complete.all(), pc
            while True:
                one = code[pc]
                if one.joins and (pc in parked or (pending and pc >= min(pending))) and pc > begin:
                    push(pc, lanes)
                    break
                self.now = one
                if one.whole and not whole:
                    parked.setdefault(pc, []).append(lanes[~complete])
                    push(pc, lanes[complete])
                    break
                if one.run is not None:
                    if one.guard:
                        some = lanes[self._holds(one.guard, a)]
                        if len(some):
                            one.run(self, some)
                    else:
                        one.run(self, a)
                    pc += 1
                    continue
                pc += 1
                if one.target >= 0:
                    taken = self._holds(one.guard, a) if one.guard else None
                    if taken is None or taken.all():
                        push(one.target, lanes)
                    else:
                        push(one.target, lanes[taken])
                        push(pc, lanes[~taken])
                elif one.opcode == "ret":
                    gone = self._holds(one.guard, a) if one.guard else np.ones(len(lanes), bool)
                    np.subtract.at(self.alive, self.block[lanes[gone]], 1)
                    push(pc, lanes[~gone])
                    for waiting_at, some in self._released():
                        push(waiting_at, some)
                else:
                    if one.operands != ["0"]:
                        raise Unknown(one.text)
                    self.waits[lanes] = pc
                    np.add.at(self.waiting, self.block[lanes], 1)
                    for waiting_at, some in self._released():
                        push(waiting_at, some)
                break
            self.issued[begin] += warps
            self.issued[pc] -= warps
        if parked:
            self.problem("a warp-wide instruction that not every lane reaches")
        if self.waiting.any():
            self.problem("a barrier that not every thread of the block reaches")

    def _holds(self, guard: str, a) -> np.ndarray:
        value = self.register(guard.lstrip("!"), np.bool_)[a]
        return ~value if guard[0] == "!" else value

    def _released(self):
        """Threads of blocks whose every thread waits, by where they go on."""
        ready = (self.waiting == self.alive) & (self.waiting > 0)
        if not ready.any():
            return
        lanes = self.number[ready[self.block] & (self.waits >= 0)]
        places = self.waits[lanes]
        self.waits[lanes] = -1
        self.waiting[ready] = 0
        self.syncs[ready] += 1
        for pc in np.unique(places):
            yield int(pc), lanes[places == pc]


# ---- launches ----------------------------------------------------------------------------------


@dataclass
class Counts:
    """What the launches of a kernel cost."""

    opcodes: Counter[str] = field(default_factory=Counter)  # how often warps issued each
    bytes: int = 0  # of global memory, asked for
    sectors: int = 0  # of 32 bytes that these lie in, warp by warp
    turns: int = 0  # accesses to shared memory: 32 lanes of 4 bytes, 16 of 8, 8 of 16
    passes: int = 0  # that the banks need for them


class Cards:
    """The emulator's launches, run here from the PTX of ``folder`` for one architecture."""

    def __init__(self, folder: Path, architecture: int, counting: bool = False) -> None:
        self.kernels: dict[str, Kernel] = {}
        self.text = {}
        for file in folder.glob(f"*.{architecture}.ptx"):
            text = file.read_text()
            for name in re.findall(r"\.entry\s+([\w$]+)", text):
                self.text[name] = file
        self.architecture, self.counting = architecture, counting
        self.problems: list[str] = []
        self.launched: Counter[str] = Counter()
        self.costs: dict[str, Counts] = defaultdict(Counts)
        self._log: list[tuple] = []

    def __enter__(self) -> Cards:
        from fewbit import _C

        _C.allow_unverified(True)
        _C.emulate_cuda(self.architecture)
        _C.run_launches_by(self.launch)
        return self

    def __exit__(self, *_) -> None:
        from fewbit import _C

        _C.run_launches_by(None)
        _C.emulate_cuda(0)
        _C.allow_unverified(False)

    def problem(self, text: str) -> None:
        if text not in self.problems and len(self.problems) < MOST_PROBLEMS:
            self.problems.append(text)

    def launch(self, name: str, grid, block, shared: int, args: bytes) -> None:
        """Never raises: a launch is somebody's C++ call."""
        self.launched[name] += 1
        try:
            with np.errstate(all="ignore"):
                self._launch(name, list(grid), list(block), shared, args)
        except Unknown as error:
            self.problem(f"{name}: {error}")
        except Exception as error:  # a fault of this file, to be seen as one
            self.problem(f"{name}: {type(error).__name__}: {error}")

    def _launch(self, name: str, grid, block, shared: int, args: bytes) -> None:
        if name not in self.kernels:
            if name not in self.text:
                raise Unknown("not in the PTX")
            self.kernels.update(parse(self.text[name].read_text()))
        kernel = self.kernels[name]
        if not 0 < block[0] * block[1] * block[2] <= kernel.threads:
            self.problem(f"{name}: blocks of {block} threads, launch bounds of {kernel.threads}")
        if kernel.static + shared > SHARED[self.architecture]:
            self.problem(f"{name}: {kernel.static + shared} bytes of shared memory in a block")
        if kernel.static > 2048 and shared:  # which start() of device.h asks the card for
            self.problem(f"{name}: {kernel.static} bytes of static beside dynamic shared memory")
        count = grid[0] * grid[1] * grid[2]
        at_once = max(1, LANES // (block[0] * block[1] * block[2]))
        self._log.clear()
        for first in range(0, count, at_once):
            blocks = range(first, min(count, first + at_once))
            machine = Machine(self, kernel, blocks, grid, block, shared, args)
            machine.run()
            self._count(kernel, machine)
        self._check_global(kernel)

    # ---- global memory between threads ---------------------------------------------------------

    def seen(self, m: Machine, a, at, size: int, writes: bool) -> None:
        block, thread = m.real_block[a], m.thread[a]
        self._log.append((writes, at, size, block, thread, m.syncs[m.block[a]].copy(), m.now.text))

    def _check_global(self, kernel: Kernel) -> None:
        """Places that one thread writes, and another reads or writes with no barrier in between."""
        writes = [entry for entry in self._log if entry[0]]
        if not writes:
            return
        granule = min(entry[2] for entry in writes)
        owners = []
        for _, at, size, block, thread, sync, _ in writes:
            for i in range(0, size, granule):
                owners.append(np.stack([(at + i) // granule, block, thread, sync]))
        table = np.concatenate(owners, 1)
        table = table[:, np.argsort(table[0], kind="stable")]
        same = table[0, 1:] == table[0, :-1]
        if (same & _apart(table[1:, 1:], table[1:, :-1])).any():
            self.problem(f"{kernel.name}: two threads write one place of global memory")
        places = table[0]
        for writes_, at, size, block, thread, sync, text in self._log:
            if writes_:
                continue
            for i in range(0, size, min(granule, size)):
                k = (at + i) // granule
                found = np.minimum(np.searchsorted(places, k), len(places) - 1)
                hit = places[found] == k
                if (hit & _apart(table[1:, found], np.stack([block, thread, sync]))).any():
                    self.problem(f"{kernel.name}: global memory that another thread writes is read"
                                 f" at {text}")  # fmt: skip

    # ---- costs ---------------------------------------------------------------------------------

    def _count(self, kernel: Kernel, machine: Machine) -> None:
        costs = self.costs[kernel.name]
        for one, times in zip(kernel.code, np.cumsum(machine.issued), strict=False):
            costs.opcodes[one.opcode] += int(times)

    def count_sectors(self, m: Machine, a, at, size: int) -> None:
        if not self.counting:
            return
        costs = self.costs[m.kernel.name]
        sectors = [(at + i) // 32 for i in range(0, size, 16)]
        keys = np.concatenate([m.a_warp[a] << 43 | s for s in sectors])
        costs.sectors += len(np.unique(keys))
        costs.bytes += size * len(m.number[a])

    def count_passes(self, m: Machine, a, at, size: int) -> None:
        """Passes over shared memory's 32 banks of 4 bytes; lanes of 8 and 16 bytes in parts."""
        if not self.counting:
            return
        parts = max(1, size // 4)
        turn = m.a_warp[a] * parts + m.lane[a] * parts // WARP
        words = np.concatenate([at // 4 + i for i in range(parts)])
        turns = np.concatenate([turn] * parts)
        distinct = np.unique(np.stack([turns, words]), axis=1)
        banks, hits = np.unique(distinct[0] * 32 + distinct[1] % 32, return_counts=True)
        worst = np.zeros(banks[-1] // 32 + 1, np.int64)
        np.maximum.at(worst, banks // 32, hits)
        costs = self.costs[m.kernel.name]
        costs.passes += int(worst.sum())
        costs.turns += int((worst > 0).sum())


def _apart(one, other):
    """Of (block, thread, barriers passed): different threads without a barrier between them."""
    return (one[0] != other[0]) | ((one[1] != other[1]) & (one[2] == other[2]))


def compile_ptx(nvcc: str, sources: list[Path], architecture: int, flags: list[str],
                folder: Path) -> None:  # fmt: skip
    """PTX of every source into ``folder``, as NAME.ARCHITECTURE.ptx."""

    def one(source: Path) -> None:
        to = folder / f"{source.stem}.{architecture}.ptx"
        command = [nvcc, *flags, "-ptx", f"-arch=compute_{architecture}", "-o", to, source]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-3000:])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, sources))
