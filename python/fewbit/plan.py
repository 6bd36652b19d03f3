"""What a run will take, from headers and a second of measuring: memory, disk, time.

Memory is a sum of what is alive at the same time in each phase, as the code makes it; the largest
phase is the peak. Times are counts of work over rates measured on this machine just before.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from . import ops
from .calibrate import Windows
from .distributed import CPU
from .durable import storing
from .errors import AlreadyQuantizedError, OutputError, UsageError
from .families import decoder_layers
from .linearise import linearise
from .memory import resident, trim
from .recipes import Recipe
from .shards import Shards
from .solvers.gptq import GPTQ
from .source import Directory, Source
from .stats import Stats, sum_type

MIB = 1 << 20
LIBRARIES = 96 * MIB  # code and buffers that the first products and rotations bring in
LEAST_WINDOW = 64  # tokens; statistics of shorter windows are not worth having
FLOAT, WIDE = 4, 8  # bytes of the types that are computed in
WIDEST = 4096  # columns of a linear that is solved to see how long it takes
PRODUCT = {"cpu": 768, "cuda": 2048}  # order of the matrices that keep a processor busy


@dataclass
class Phase:
    """One part of a run: peak ``memory`` in bytes above the empty process, ``card`` of the card's,
    and seconds in all."""

    name: str
    memory: int
    seconds: float
    card: int = 0


@dataclass
class Plan:
    """``base``: bytes the process has without the model; ``disk``: bytes the run writes at most at
    one time; ``activations``: bytes of hidden states that stay in memory; ``free``: bytes of the
    card ``device`` that nobody else has."""

    base: int
    phases: list[Phase]
    disk: int
    output: int
    dtype: torch.dtype
    hidden: int = 0  # bytes of one set of hidden states
    window: int = 0  # tokens of the longest calibration window
    passing: int = 0  # bytes that each of them takes on its way through a layer
    activations: float = float("inf")
    device: torch.device = CPU
    free: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def memory(self) -> int:
        return self.base + max(phase.memory for phase in self.phases)

    @property
    def card(self) -> int:
        return max(phase.card for phase in self.phases)

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    def require(self, memory: int | None, output) -> None:
        """Raise UsageError unless memory and disk suffice; hidden states spill to disk if needed.

        The message names the smallest change that fits.
        """
        self.fit(memory)
        folder = next(p for p in Path(output).absolute().parents if p.exists())
        free, needed = shutil.disk_usage(folder).free, int(self.disk * 1.05)
        if needed > free:
            raise OutputError(
                f"{folder} has {free:,} bytes free, but the run needs {needed:,} there: free "
                f"{needed - free:,} bytes or choose another output"
            )

    def fit(self, memory: int | None) -> None:
        """Let hidden states spill to disk, or raise UsageError with what would fit."""
        if self.card > self.free:
            worst = max(self.phases, key=lambda phase: phase.card)
            fits = all(p.card <= self.free for p in self.phases if p.name != "layers")
            raise UsageError(
                f"{self.device} has {self.free // MIB} MiB free, and phase {worst.name!r} needs "
                f"{-(-self.card // MIB)} MiB there: free as much, or use device "
                f"'cpu'{self._shorter(self.card - self.free, fits)}"
            )
        if memory is None:
            return
        over = self.memory - memory
        if over <= 0:
            return
        kept = 2 * self.hidden  # before and behind the layer
        if self.hidden and over <= kept:
            self.activations = kept - over
            self.phases = [
                replace(p, memory=p.memory - (over if p.name == "layers" else 0))
                for p in self.phases
            ]
            self.disk += over
            self.notes.append(f"{over:,} bytes of hidden states go to disk")
            over = self.memory - memory
        if over > 0:
            worst = max(self.phases, key=lambda phase: phase.memory)
            needs = -(-self.memory // MIB)
            others = [p.memory for p in self.phases if p.name != "layers"]
            fits = self.device == CPU and self.base + max(others, default=0) <= memory
            shorter = self._shorter(over, fits)
            raise UsageError(
                f"--memory {memory // MIB}MiB is too little: phase {worst.name!r} needs {needs} "
                f"MiB; the smallest change that fits is --memory {needs}MiB{shorter}"
            )

    def _shorter(self, over: int, others_fit: bool) -> str:
        """', or --window N' where windows of N tokens would take ``over`` bytes less."""
        window = self.window - -(-over // self.passing) if self.passing else 0
        return f", or --window {window}" if window >= LEAST_WINDOW and others_fit else ""

    def __str__(self) -> str:
        on_card = self.device != CPU
        card = f"{self.card / MIB:,.0f} MiB of {self.device}, " if on_card else ""
        lines = [
            f"plan      {self.memory / MIB:,.0f} MiB of memory, {card}{self.disk / MIB:,.0f} MiB "
            f"of disk, {_time(self.seconds)}"
        ]
        for phase in self.phases:
            peak = (self.base + phase.memory) / MIB
            card = f" {phase.card / MIB:>8,.0f} MiB of {self.device}" if on_card else ""
            lines.append(f"  {phase.name:<10}{peak:>8,.0f} MiB {_time(phase.seconds):>10}{card}")
        lines.append(f"  output    {self.output / MIB:>8,.0f} MiB")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def show(self, journal: Path) -> None:
        print(f"{self}\n  journal   {journal}", file=sys.stderr, flush=True)

    def to_dict(self) -> dict:
        return {
            "memory": self.memory, "disk": self.disk, "seconds": self.seconds,
            "output": self.output, "notes": self.notes,
            "device": str(self.device), "card": self.card,
            "phases": {p.name: {"memory": self.base + p.memory, "seconds": p.seconds,
                                "card": p.card} for p in self.phases},
        }


def _time(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"


@dataclass(frozen=True)
class Rates:
    """Of this machine, now: flop/s of products, weights/s through solve and pack (both where the
    layers are computed), bytes/s of the disk."""

    products: float
    weights: float
    write: float
    read: float
    gram: float = math.inf  # tokens times columns^2 a second
    solve: float = math.inf  # rows times columns^2
    factor: float = math.inf  # columns^3


def measure(
    recipe: Recipe, shards: Shards, folder: Path, columns: int, device: torch.device = CPU
) -> Rates:
    """A second of work of each kind; ``columns``: of the widest linear."""
    from .recipes import rtn

    generator = torch.Generator().manual_seed(0)
    size = PRODUCT[device.type]
    a = torch.randn(size, size, generator=generator).to(device)
    products = 2 * size**3 / _best(lambda: a @ a, device=device)
    shape = 2048, min(columns, WIDEST)  # as large as layers are: no cache holds them
    linear = nn.Linear(shape[1], shape[0], bias=False, device=device)
    linear.weight.data.copy_(torch.randn(shape, generator=generator))
    solver, scheme = rtn(recipe.scheme).solver, recipe.scheme

    def solve() -> None:
        from .pipeline import relative_error

        module = solver.build(linear, "", scheme, None, False)[0]
        relative_error(linear.weight.data, module.weight, None)
        module.codes()

    weights = linear.weight.numel() / _best(solve, 3, device)
    block = bytes(4 * MIB)

    def write() -> None:
        with storing(folder, len(block)), tempfile.TemporaryFile(dir=folder) as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())

    written = len(block) / _best(write, 2)
    name = max(shards.entries, key=lambda n: min(shards.entries[n].nbytes, 64 * MIB))
    started = time.perf_counter()
    tensor = shards.read(name)
    part = tensor.reshape(-1)[: 16 * MIB].to(torch.float32, copy=True)
    read = part.numel() * tensor.element_size() / (time.perf_counter() - started)
    shards.close()
    if not recipe.needs_stats:
        return Rates(products, weights, written, read)
    return Rates(products, weights, written, read, *_second_order(recipe, columns, device))


def _second_order(
    recipe: Recipe, columns: int, device: torch.device
) -> tuple[float, float, float]:
    """Rates of Gram matrices, and of a solver that factors them, on a linear of few rows."""
    columns, rows, tokens = min(columns, WIDEST), 256, 512
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator).to(device)
    gram = torch.zeros(columns, columns, dtype=sum_type(columns, device), device=device)
    summed = tokens * columns**2 / _best(lambda: ops.gram(x, gram), 3, device)
    x = x[:rows]
    solver = copy.deepcopy(getattr(recipe.solver, "base", recipe.solver))
    if not isinstance(solver, GPTQ):
        return summed, math.inf, math.inf
    size = x.abs()
    stats = Stats(rows, size.sum(0), size.amax(0), gram, gram if solver.needs_cross else None)
    both, again = (
        _best(lambda: solver.solve(x, recipe.scheme, stats), 1, device) for _ in range(2)
    )  # the second finds the factor of the first
    return summed, rows * columns**2 / again, columns**3 / max(both - again, 1e-3)


def _best(run, repeats: int = 4, device: torch.device = CPU) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        if device != CPU:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[len(seconds) // 2]


def stored_dtype(shards: Shards) -> torch.dtype:
    """The float type that most of a directory's bytes are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for entry in shards.entries.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    if not sizes:
        raise AlreadyQuantizedError(f"{shards.path} holds no float tensors")
    return max(sizes, key=sizes.__getitem__)


def estimate(
    source: Source, shards: Shards, recipe: Recipe, data: Windows | None,
    dtype: torch.dtype | None = None, device: torch.device = CPU,
) -> Plan:
    """The plan of quantising a model directory; reads headers, and a few megabytes for the rate."""
    model, family = source.model, source.family
    free = 0 if device == CPU else torch.cuda.mem_get_info(device)[0]
    dtype = dtype or stored_dtype(shards)
    layers = decoder_layers(model, family)
    inside = f"{family.layers}."
    around = {n: p.numel() for n, p in model.named_parameters() if not n.startswith(inside)}
    undo = linearise(model, family)
    shapes = [
        (linear.out_features, linear.in_features)
        for linear in (layers[0].get_submodule(path) for path in family.linears())
    ]
    undo()
    widest = max(k for _, k in shapes)
    rates = measure(recipe, shards, Path(tempfile.gettempdir()), widest, device)
    trim()  # a tokenizer leaves hundreds of bytes for each token of the text
    base = resident() + LIBRARIES
    width = {path: shape for path, shape in zip(family.linears(), shapes, strict=True)}
    groups = [[width[path] for path in paths] for paths in family.inputs()]  # of common inputs
    sizes = [n * k for n, k in shapes]
    weights = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
    rest = weights - sum(sizes)
    packed = [e * recipe.scheme.bits / 8 + 6 * e / recipe.scheme.group_of(k)
              for e, (_, k) in zip(sizes, shapes, strict=True)]
    biggest, count = max(sizes), len(layers)
    stored = stored_dtype(shards).itemsize
    tokens = 0 if data is None else sum(b.numel() for b in data.batches)
    window = 0 if data is None else max(b.numel() for b in data.batches)
    hidden = FLOAT * tokens * model.config.hidden_size
    floats = 2 if recipe.solver.needs_cross else 1  # sets of hidden states
    float_transforms = [t for t in recipe.transforms if not t.last]
    rotated = any(not t.needs_stats and not t.last for t in recipe.transforms)
    whole = not isinstance(source, Directory)

    # Around the layers: the tables and the head, their wide copies, the probe's shaken head.
    table, outer = max(around.values()), sum(around.values())
    needed = data is not None or bool(float_transforms)
    outside = dtype.itemsize * outer
    if needed:
        shaken = FLOAT * table if float_transforms else 0
        wide = WIDE * (outer + table) if rotated else 0
        outside = max(FLOAT * outer + stored * table, FLOAT * outer + shaken, wide,
                      (FLOAT + dtype.itemsize) * outer)
    # One layer. It is read; a run of windows is summed up beside the sums so far; transforms
    # search, and the probe shakes it; then float weights still to be solved, packed ones, and
    # the linear in hand.
    sums = passing = 0
    if data is not None:
        cross = WIDE if recipe.solver.needs_cross else 0
        sums = sum(k * k * (sum_type(k).itemsize + cross) for (_, k), *_ in groups)
        passing = 4 * FLOAT * (max(k for _, k in shapes) + model.config.hidden_size)
    floats_stay = recipe.solver.needs_cross
    solving = max(
        FLOAT * (weights if floats_stay else sum(sizes[i:]) + rest) + sum(packed[:i])
        + transient(recipe, n, k)
        for i, (n, k) in enumerate(shapes)
    )
    layer = max(
        FLOAT * weights + stored * biggest,
        FLOAT * weights + sums * min(2, tokens // max(window, 1)) + passing * window,
        sums + solving,
    )
    if float_transforms:
        searched = any(t.needs_stats for t in float_transforms)
        largest = max(sum(n * k for n, k in group) for group in groups)
        layer = max(
            layer,
            FLOAT * (weights + 2 * biggest) + searched * sums,
            FLOAT * (weights + 3 * largest) + sums if searched else 0,
        )
    if rotated:
        layer = max(layer, WIDE * (weights + 2 * biggest))
    if whole:
        layer += FLOAT * (outer + weights * count)
        outside += FLOAT * weights * count
    on_card = {"around": 0, "layers": 0}
    if device != CPU:  # the CPU reads, keeps hidden states and writes
        on_card = {"around": LIBRARIES + needed * outside, "layers": LIBRARIES + layer}
        outside = (stored + FLOAT) * table + dtype.itemsize * outer
        layer = (stored + FLOAT) * biggest + sum(packed) + dtype.itemsize * rest
        if whole:
            outside += FLOAT * (outer + weights * count)
    layer += 2 * floats * hidden
    scanning = min(shards_largest(shards), 256 * MIB) + stored * max(
        e.nbytes // e.dtype.itemsize for e in shards.entries.values()
    )
    nbytes = sum(e.nbytes for e in shards.entries.values())
    output = int(dtype.itemsize * (outer + rest * count) + sum(packed) * count)
    written = output + floats * hidden * count
    seconds = count * sum(
        work(recipe, rates, n, k, tokens, first=i == 0)
        for group in groups
        for i, (n, k) in enumerate(group)
    )
    forward = 2 * tokens * sum(sizes) * count * (2 + 2 * (floats - 1)) / rates.products
    io = stored * weights * count / rates.read + written / rates.write
    notes = [f"the whole model is in memory: {source.reason}"] if whole else []
    return Plan(
        base,
        [
            Phase("scan", scanning, 2 * nbytes / rates.read),
            Phase("around", outside, outer * stored / rates.read, on_card["around"]),
            Phase("layers", int(layer), seconds + forward + io, int(on_card["layers"])),
        ],
        output + 2 * floats * hidden + 8 * MIB,
        output,
        dtype,
        hidden * floats,
        window,
        passing,
        device=device,
        free=free,
        notes=notes,
    )


def shards_largest(shards: Shards) -> int:
    files: dict[str, int] = {}
    for entry in shards.entries.values():
        files[entry.file] = files.get(entry.file, 0) + entry.nbytes
    return max(files.values())


def transient(recipe: Recipe, n: int, k: int) -> int:
    """Bytes beside the weights while one linear is solved: codes, the way back, the error."""
    e, kind = n * k, type(getattr(recipe.solver, "base", recipe.solver)).__name__
    if kind == "GPTQ":  # the factor, while it is made; then beside the goal and its codes
        wide = WIDE * e if recipe.solver.needs_cross else 0
        return max(int(1.45 * FLOAT * k * k), FLOAT * k * k + 6 * e + 3 * wide)
    if kind == "Clip":
        return 24 * e + FLOAT * k * k
    return (16 if recipe.needs_stats else 12) * e


def work(recipe: Recipe, rates: Rates, n: int, k: int, tokens: int, first: bool) -> float:
    """Seconds of statistics, search, solving and packing for one linear; the ``first`` of those
    that read an input pays for what they share."""
    from .pipeline import ERROR_ROWS

    seconds = n * k / rates.weights
    if not recipe.needs_stats:
        return seconds
    seconds += 2.0 * min(n, ERROR_ROWS) * k * k / rates.products  # the error report
    seconds += n * k * k / rates.solve
    if first:
        seconds += tokens * k * k / rates.gram + float(k) ** 3 / rates.factor
    for transform in recipe.transforms:
        if type(transform).__name__ == "SearchScale":
            seconds += 2.0 * n * k * k * 4 / rates.products
    return seconds
