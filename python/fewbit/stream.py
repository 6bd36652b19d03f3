"""``quantize_directory``: a model directory in, a quantised one out, one decoder layer in memory.

The layer loop is that of ``quantize_`` (pipeline.run). Here its layers come from the directory's
safetensors files one at a time (source.Directory), and each finished one goes to the journal
(journal.Journal), whose files become the output. A run that was stopped in any way goes on from its
last finished layer when it is started again, and gives the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from . import card, formats
from .activations import Store
from .calibrate import Windows, windows
from .checkpoint import (
    check_fits,
    described,
    empty_model,
    load_float,
    load_tokenizer,
    refuse_quantized,
    save,
    stored_tensors,
    tied_names,
)
from .conversion import MAX_SIDE, SIDE_FILES, with_section
from .distributed import job, named, place
from .errors import AlreadyQuantizedError, OutOfMemoryError, UnsupportedError, UsageError
from .families import Family, decoder_layers, describe, linear_names
from .formats import Format
from .formats.bitsandbytes import LlmInt8
from .journal import Journal, check_output, folder_of
from .linearise import linearise
from .memory import keep_apart
from .pipeline import Sink, check, chosen, environment, quantize_, run
from .plan import Plan, estimate, stored_dtype
from .progress import Progress
from .recipes import Recipe, build
from .report import REPORT, LinearRecord, Report
from .scheme import Scheme
from .shards import CONFIG, Shards, side_files
from .solvers.auto import Auto
from .source import Directory, Source, scan
from .trail import Trail
from .transforms.fold import RMSNorm

WHOLE = "tune learns from the whole model, in memory, in one process and without a limit"
FLOAT = (".bias", ".kept_weight")  # what is float of a packed Linear


def quantize_directory(
    path: str | os.PathLike,
    output: str | os.PathLike,
    method: str | Recipe = "awq",
    scheme: Scheme | str = "w4a16g128",
    calibration=None,
    *,
    window: int = 512,
    samples: int | None = 32,
    format: str = "compressed-tensors",
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    device: str = "cpu",
    restart: bool = False,
    progress: bool = True,
    callback: Callable[[dict], None] | None = None,
    files: dict[str, bytes] | None = None,
    **options,
) -> Report:
    """Quantise the model in directory ``path`` into ``output``, without holding it in memory.

    Arguments as ``quantize_`` and ``save``; ``dtype``: of what stays float (None: as stored).
    ``memory``: the bytes that this process may take; a run that needs more is refused with the
    smallest change that fits. ``device``: "cpu", or "cuda" to compute each layer on a card (of
    several processes each takes its own); what is kept and written passes through the CPU.
    Called again after a stop, with the same arguments, it goes on where it was; ``restart`` forgets
    the earlier run. The journal lies in OUTPUT.fewbit until the end. A method with "tune" runs in
    memory instead, and from the start.
    ``files``: more files for the output, by name.

    Raises UsageError, UnsupportedError, CalibrationError or CheckpointError before any work, and
    StorageError (a ResumableStop) when the disk fails on the way.
    """
    if method == "auto":
        raise UnsupportedError(
            "method 'auto' tries several widths on the whole model, in memory: use "
            "fewbit.quantize_(model, 'auto', ...) and fewbit.save"
        )
    recipe, writer_format = build(method, scheme, **options), formats.get(format)
    if isinstance(writer_format, LlmInt8):
        writer_format = LlmInt8(getattr(recipe.solver, "threshold", 0.0))
    keep_apart()
    with _out_of_memory(), job(device) as ranks:
        if ranks.writes and restart:
            shutil.rmtree(folder_of(output), ignore_errors=True)
        finished = ranks.share(_finished(Path(output), recipe) if ranks.writes else None)
        if finished is not None:
            return finished
        if ranks.writes:
            check_output(path, output)
        shards, source, data, recipe, plan = _prepare(
            path, recipe, format, calibration, window, samples, dtype, ranks.device
        )
        if data is not None and len(data.batches) < ranks.size:
            raise UsageError(
                f"{ranks.size} processes need as many calibration windows, got {len(data.batches)}"
            )
        if recipe.tune is not None:
            if memory is not None or ranks.size > 1:
                raise UnsupportedError(f"{recipe.name!r}: {WHOLE}")
            return _learned(
                path, output, format, recipe, data, plan.dtype, ranks.device, progress, callback
            )
        plan.require(memory, output)
        if progress and ranks.writes:
            plan.show(folder_of(output))
        surroundings = {**environment(), "device": named(ranks.device)}
        identity = {
            "model": {"config": shards.config, "tensors": scan(shards) if ranks.writes else {}},
            "recipe": recipe.to_dict(),
            "calibration": None if data is None else data.digest(),
            "output": {"format": format, "dtype": str(plan.dtype)},
            "environment": {
                k: surroundings[k] for k in ("fewbit", "torch", "isa", "device")
            },
        }
        model, family = source.model, source.family
        report = Report(recipe.to_dict(), type(model).__name__, environment=surroundings)
        report.source = str(path)
        if data is not None:
            report.calibration = {
                "source": data.source, "tokens": data.tokens, "sha256": data.digest()
            }
        layers = len(decoder_layers(model, family))
        if isinstance(source, Whole):
            source.load()
        with Journal(output, identity, layers, ranks) as journal:
            with Progress(layers, progress and ranks.writes, callback) as shown:
                sink = Committing(journal, source, recipe, writer_format, plan.dtype, data)
                store = Store(journal.root, plan.activations, ranks)
                run(source, recipe, data, report, shown, sink, store)
            if ranks.writes:
                report.seconds = sum(
                    journal.entry(step)["seconds"] for step in range(journal.steps)
                )
                texts = {**side_files(shards.path, SIDE_FILES, MAX_SIDE), **(files or {})}
                texts[REPORT] = report.text().encode()
                section = writer_format.config(sink.schemes, sink.ignore)
                config, texts = with_section(described(source.model, plan.dtype), section, texts)
                journal.complete(config, texts)
                card.write(journal.shards, report)
                journal.publish()
            ranks.share(None)  # nobody leaves before the output is whole
    return report


def _learned(
    path, output, format: str, recipe: Recipe, data: Windows, dtype: torch.dtype,
    device: torch.device, progress: bool, callback,
) -> Report:
    """A recipe with tune, which needs the whole model: in memory, from the start whenever it was
    stopped."""
    model = load_float(path).to(device)
    report = quantize_(
        model, recipe, calibration=data, keep_float=False, progress=progress, callback=callback
    )
    report.source = str(path)
    save(model.to("cpu", dtype), output, format, report=report)
    report.save(Path(output) / REPORT)
    return report


def plan_directory(
    path: str | os.PathLike,
    method: str | Recipe = "awq",
    scheme: Scheme | str = "w4a16g128",
    calibration=None,
    *,
    window: int = 512,
    samples: int | None = 32,
    format: str = "compressed-tensors",
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    device: str = "cpu",
    **options,
) -> Plan:
    """What ``quantize_directory`` with these arguments will take; the same refusals, no work."""
    recipe = build(method, scheme, **options)
    formats.get(format)
    if recipe.tune is not None:
        raise UnsupportedError(f"{recipe.name!r} has no estimate: {WHOLE}")
    plan = _prepare(path, recipe, format, calibration, window, samples, dtype, place(device))[-1]
    plan.fit(memory)
    return plan


def _prepare(
    path, recipe: Recipe, format: str, calibration, window, samples, dtype, device: torch.device
) -> tuple[Shards, Source, Windows | None, Recipe, Plan]:
    shards = Shards(path)
    model = _skeleton(shards, recipe, format)
    data = _windows(path, recipe, calibration, window, samples)
    if isinstance(recipe.solver, Auto):  # its trials need the whole model
        recipe = chosen(load_float(path).to(device), recipe, data)
    source = _source(model, describe(model), shards, recipe, device)
    return shards, source, data, recipe, estimate(source, shards, recipe, data, dtype, device)


class Committing(Sink):
    """Every finished step into the journal."""

    def __init__(
        self, journal: Journal, source: Source, recipe: Recipe, format: Format, dtype: torch.dtype,
        data: Windows | None,
    ) -> None:
        self.journal, self.source, self.recipe = journal, source, recipe
        self.format, self.dtype, self.data = format, dtype, data
        model, family = source.model, source.family
        undo = linearise(model, family)
        self.schemes = {name: recipe.scheme_of(name) for name in linear_names(model)}
        linears = (n for n, m in model.named_modules() if isinstance(m, nn.Linear))
        self.ignore = [name for name in linears if name not in self.schemes]
        undo()
        self.clock = _Clock()

    def outside(self, source: Source) -> None:
        if self.journal.done > 0:
            return
        if not self.journal.ranks.writes:
            self.journal.done = 1
            return
        model = source.model
        if isinstance(model.get_submodule(source.family.final_norm), RMSNorm):
            raise UnsupportedError(
                f"{source.family.final_norm} would become an RMSNorm where this architecture has a "
                "LayerNorm, so that a loaded model would compute something else; rotate with "
                "keeps_mean=True"
            )
        tied = tied_names(model)
        changed = any(not t.needs_stats for t in self.recipe.transforms)
        tensors = {
            name: self._cast(tensor)
            for name, tensor in source.outside(changed)
            if name not in tied
        }
        self.journal.commit(0, tensors, {"seconds": self.clock.lap()})

    def resume(self, report: Report, trail: Trail) -> int:
        done = self.journal.done - 1
        for step in range(1, done + 1):
            entry = self.journal.entry(step)
            report.linears += [LinearRecord(**record) for record in entry["linears"]]
            report.transforms += entry["transforms"]
            if trail.probe is not None:
                trail.probe.records += entry["certificates"]
                trail.probe.outliers += entry["outliers"]
        if 0 < done < self.journal.steps - 1 and trail.nbytes(self.data):
            with self.journal.state() as file:
                trail.read(file, self.data)
        self.clock.lap()
        return done

    def layer(self, index: int, layer: nn.Module, records: dict, trail: Trail) -> None:
        last = index + 2 == self.journal.steps
        size = 0 if last else trail.nbytes(self.data)
        state = trail.chunks(self.data) if size else ()
        if not self.journal.ranks.writes:
            for _ in state:
                pass
            self.journal.done = index + 2
            return
        prefix = f"{self.source.family.layers}.{index}."
        layer.cpu()  # it has done its work
        tensors = {
            name: self._cast(tensor) if not packed or name.endswith(FLOAT) else tensor
            for packed, group in stored_tensors(layer, prefix, self.format)
            for name, tensor in group.items()
        }
        entry = {
            **records,
            "linears": [vars(record) for record in records["linears"]],
            "seconds": self.clock.lap(),
        }
        self.journal.commit(index + 1, tensors, entry, state, size)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to("cpu", self.dtype if tensor.is_floating_point() else tensor.dtype)


# Torch's own words, and what its stable ABI leaves of them when an operator's new tensor fails.
NO_MEMORY = r"allocate memory|aten::(new_empty|empty|contiguous|clone|to)\b.* API call failed"


@contextmanager
def _out_of_memory() -> Iterator[None]:
    """What torch and Python say when the system gives no memory, as one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not re.search(NO_MEMORY, text):
            raise
        wanted = re.search(r"allocate (\d+) bytes", text)
        size = f" for {int(wanted[1]):,} bytes" if wanted else ""
        raise OutOfMemoryError(
            f"the system gave no more memory{size}; what is finished is kept, and the same command "
            "goes on"
        ) from error


class _Clock:
    def __init__(self) -> None:
        import time

        self.now = time.monotonic
        self.start = self.now()

    def lap(self) -> float:
        """Seconds since the last call."""
        last, self.start = self.start, self.now()
        return self.start - last


def _skeleton(shards: Shards, recipe: Recipe, format: str) -> nn.Module:
    """The empty model, after everything was refused that headers can tell."""
    refuse_quantized(shards)
    stored_dtype(shards)  # refuses a directory without float tensors
    wrong = [n for n, e in shards.entries.items() if e.dtype.itemsize == 1]
    if wrong:
        dtype = shards.entries[min(wrong)].dtype
        raise AlreadyQuantizedError(
            f"{min(wrong)} is stored as {dtype}: the model is quantised already, although its "
            f"{CONFIG} does not say so; take the original in float16, bfloat16 or float32"
        )
    model = empty_model(shards.path, torch.float32).eval()
    family = describe(model)
    undo = linearise(model, family)
    try:
        check(model, family, recipe)
        check_fits(model, recipe, format)
    finally:
        undo()
    return model


def _windows(path, recipe: Recipe, calibration, window: int, samples: int | None) -> Windows | None:
    if not recipe.needs_stats:
        return None
    text = isinstance(calibration, (str, Path)) or (
        isinstance(calibration, (list, tuple)) and all(isinstance(t, str) for t in calibration)
    )
    return windows(calibration, load_tokenizer(path) if text else None, window, samples)


def _source(
    model: nn.Module, family: Family, shards: Shards, recipe: Recipe, device: torch.device
) -> Source:
    """Layer by layer where that is possible, else the whole model, loaded by transformers."""
    learned = [type(t).__name__ for t in recipe.transforms if t.needs_tokens]
    if learned:
        return Whole(model, family, shards, device, f"{learned[0]} learns from the whole model")
    try:
        return Directory(model, family, shards, device)
    except UnsupportedError as error:
        return Whole(model, family, shards, device, f"only transformers can convert it: {error}")


class Whole(Source):
    """A model that cannot be streamed, and why; loaded when the run starts."""

    def __init__(
        self, model: nn.Module, family: Family, shards: Shards, device: torch.device, reason: str
    ) -> None:
        super().__init__(model, family)
        self.path, self.device, self.reason = shards.path, device, reason

    def load(self) -> None:
        self.model = load_float(self.path).to(self.device)
        linearise(self.model, self.family)


def _finished(output: Path, recipe: Recipe) -> Report | None:
    """The report of this run, if it was stopped between publishing its output and cleaning up."""
    root = folder_of(output)
    published = root.exists() and not (root / "checkpoint").exists()
    if not published or not (output / REPORT).exists():
        return None
    report = Report.load(output / REPORT)
    if report.recipe != json.loads(json.dumps(recipe.to_dict())):
        return None
    shutil.rmtree(root, ignore_errors=True)
    return report
