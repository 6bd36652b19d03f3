"""``quantize_``: calibrate, transform, solve, pack; one decoder layer at a time."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from . import _C
from .activations import Store
from .auto import choose
from .calibrate import FloatPass, Windows, capture, collect, run_layer, windows
from .certificate import Probe
from .distributed import Ranks
from .errors import AlreadyQuantizedError, NonFiniteError, UsageError
from .families import Family, decoder_layers, describe
from .integrations import attach
from .linearise import linearise
from .online import carry
from .progress import Progress
from .pseudo import require_activations
from .recipes import Recipe, build
from .report import LinearRecord, Report
from .reproducible import total
from .scheme import FLOAT_BITS, Scheme
from .solvers.auto import Auto
from .source import Source, finite
from .stats import Stats
from .trail import Trail
from .transforms import LayerContext
from .tune import tune_
from .undo import remember, restore_


def quantize_(
    model: nn.Module,
    method: str | Recipe = "awq",
    scheme: Scheme | str = "w4a16g128",
    calibration=None,
    tokenizer=None,
    *,
    window: int = 512,
    samples: int | None = 32,
    keep_float: bool = True,
    progress: bool = True,
    callback: Callable[[dict], None] | None = None,
    **options,
) -> Report:
    """Quantise the decoder linears of a live model, in place.

    ``method``: a name of ``fewbit.recipes.METHODS`` ("rtn", "awq", stacks such as "awq+gptq", or
    "auto", which chooses itself) or a Recipe; ``options`` go to the method. ``calibration``: texts
    (with ``tokenizer``), token ids, or the path of a text file, cut into ``samples`` windows of
    ``window`` tokens. Embeddings, norms and the head stay float. ``keep_float`` keeps a copy of the
    float weights for ``restore_``.

    Everything that can be refused is refused before the model is touched: UsageError,
    CalibrationError or UnsupportedError, one sentence each.
    """
    recipe = build(method, scheme, **options)
    family = describe(model)
    undo = linearise(model, family)
    try:
        check(model, family, recipe)
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not finite(parameter):
                raise NonFiniteError(f"{name} holds values that are not finite")
        data = windows(calibration, tokenizer, window, samples) if recipe.needs_stats else None
    finally:
        undo()
    if isinstance(recipe.solver, Auto):
        recipe = chosen(model, recipe, data)
    started = time.monotonic()
    report = Report(recipe.to_dict(), type(model).__name__, environment=environment())
    report.source = getattr(getattr(model, "config", None), "_name_or_path", "")
    if data is not None:
        report.calibration = {
            "source": data.source, "tokens": data.tokens, "sha256": data.digest()
        }
    teacher = None if recipe.tune is None else copy.deepcopy(model).eval()
    if keep_float:
        remember(model)
    linearise(model, family)
    training = model.training
    model.eval()
    try:
        with Progress(len(decoder_layers(model, family)), progress, callback) as shown:
            seen = data if teacher is None else data.thinned(recipe.tune.solved)
            run(Source(model, family), recipe, seen, report, shown)
        if teacher is not None:
            report.tune = tune_(model, teacher, family, data, recipe.tune)
    except BaseException:
        if keep_float:  # an interrupt or error half-way leaves the model as it was
            restore_(model)
        raise
    finally:
        model.train(training)
    report.seconds = time.monotonic() - started
    attach(model)
    return report


def chosen(model: nn.Module, recipe: Recipe, data: Windows) -> Recipe:
    """auto.choose, with trials that leave no trace."""

    @contextmanager
    def trial(recipe: Recipe, seen: Windows) -> Iterator[None]:
        quantize_(model, recipe, calibration=seen, progress=False)
        try:
            yield
        finally:
            restore_(model)

    return choose(model, recipe, data, trial)


class Sink:
    """Where finished steps go; this one leaves them in the model."""

    def outside(self, source: Source) -> None:
        """What lies around the layers is as it will stay."""

    def resume(self, report: Report, trail: Trail) -> int:
        """How many layers an earlier run has finished; puts their records into the report."""
        return 0

    def layer(self, index: int, layer: nn.Module, records: dict, trail: Trail) -> None:
        """A layer is finished; ``trail`` is in front of the next."""


@torch.no_grad()
def run(
    source: Source, recipe: Recipe, data: Windows | None, report: Report, progress: Progress,
    sink: Sink | None = None, store: Store | None = None,
) -> None:
    """The layer loop of every run, in memory or streamed: ``source`` gives, ``sink`` takes."""
    model, family, sink, store = source.model, source.family, sink or Sink(), store or Store()
    float_transforms = [t for t in recipe.transforms if not t.last]
    # Plain rounding looks at none of what lies around the layers.
    looked_at = data is not None or recipe.transforms
    with source.around() if looked_at else nullcontext():
        for transform in recipe.transforms:
            if transform.needs_tokens:
                device = model.get_submodule(family.embed).weight.device
                batches = [ids.to(device) for ids in data.batches]
                transform.prepare(model, family, recipe.scheme, batches)
        probe = Probe(model, family, float_transforms, data) if float_transforms else None
        for transform in recipe.transforms:
            report.transforms += transform.outside(model, family)
        if probe is not None:
            report.certificates, report.outliers = probe.records, probe.outliers
            probe.outside(model)
        sink.outside(source)
        inputs = None if data is None else capture(model, family, data, store)
    # What the float model feeds each layer, where a solver compares with it.
    floats = FloatPass(inputs) if recipe.solver.needs_cross else None
    trail = Trail(inputs, floats, probe)
    config = getattr(model, "config", None)
    try:
        first = sink.resume(report, trail)
        progress.skip(first)
        for index in range(first, len(decoder_layers(model, family))):
            with source.layer(index) as layer:
                done = _layer(layer, index, recipe, source, config, trail, progress, store.ranks)
                report.linears += done["linears"]
                report.transforms += done["transforms"]
                sink.layer(index, layer, done, trail)
            progress.layer(done["linears"])
    finally:
        trail.close()


def _layer(
    layer: nn.Module, index: int, recipe: Recipe, source: Source, config, trail: Trail,
    progress: Progress, ranks: Ranks,
) -> dict:
    """Transform, solve and pack one layer, move ``trail`` behind it; what was done."""
    family = source.family
    name = f"{family.layers}.{index}"
    context = LayerContext(index, family, config, recipe.scheme, {}, solver=recipe.solver)
    inputs, floats, probe = trail.inputs, trail.floats, trail.probe
    certified, looked = (0, 0) if probe is None else (len(probe.records), len(probe.outliers))
    outputs = None
    if probe is not None:
        probe.before(layer)
    # What needs no statistics (rotations) comes first, so that they describe its result.
    for transform in recipe.transforms:
        if not transform.needs_stats and not transform.last:
            transform.layer(layer, context)
    if inputs is not None:
        keep, only = not recipe.sequential, None
        if not keep and not any(t.needs_stats for t in recipe.transforms):
            only = _steps(family, recipe)[0]  # those of later steps are collected when it is time
        context.stats, outputs = collect(
            layer, family, inputs, name, only=only, floats=floats, keep=keep
        )
    for transform in recipe.transforms:
        if transform.needs_stats and not transform.last:
            transform.layer(layer, context)
            if transform.recollect:
                context.stats, _ = collect(layer, family, inputs, name, floats=floats, keep=False)
    if probe is not None:
        probe.after(layer, name, index)
    float_outputs = None if floats is None else run_layer(layer, floats.inputs)
    records = []
    for step, paths in enumerate(_steps(family, recipe)):
        if step > 0:
            fresh = collect(layer, family, inputs, name, only=paths, floats=floats, keep=False)[0]
            context.stats.update(fresh)
        for group in _shares(family, paths, ranks):
            solved = {
                path: _solve(layer, path, f"{name}.{path}", recipe, context.stats.get(path))
                for path, owner in group if owner == ranks.rank
            }
            for path, owner in group:
                linear = layer.get_submodule(path)
                packed, record = ranks.share(solved.pop(path, None), owner)
                packed = packed.to(linear.weight.device)
                if floats is not None:
                    floats.linears[path] = linear
                carry(linear, packed)
                replace_module(layer, path, packed)
                if floats is None:
                    source.release(linear)
                records.append(record)
                progress.linear(record)
                del linear, packed
    for transform in recipe.transforms:
        if transform.last:
            transform.layer(layer, context)
    if inputs is not None:
        trail.inputs = run_layer(layer, inputs) if recipe.sequential else outputs
        inputs.close()
    if floats is not None:
        floats.inputs.close()
        trail.floats = FloatPass(float_outputs)
    return {
        "linears": records,
        "transforms": [{"layer": context.index, **record} for record in context.records],
        "certificates": [] if probe is None else probe.records[certified:],
        "outliers": [] if probe is None else probe.outliers[looked:],
    }


def _steps(family: Family, recipe: Recipe) -> list[tuple[str, ...]]:
    """The linears of a layer in the order they are solved; statistics are new for every step."""
    if not recipe.true_sequential:
        return [family.linears()]
    return family.inputs()


def _shares(
    family: Family, paths: tuple[str, ...], ranks: Ranks
) -> list[list[tuple[str, int]]]:
    """The linears to solve before the next are shared, with the rank that solves each.

    Linears that read the same input stay together, for what a solver makes of their common
    statistics. One process shares after each, so that its float weight can go.
    """
    number = {path: i for i, group in enumerate(family.inputs()) for path in group}
    owned = [(path, ranks.owner(number[path])) for path in paths]
    return [owned] if ranks.size > 1 else [[pair] for pair in owned]


def _solve(
    layer: nn.Module, path: str, name: str, recipe: Recipe, stats: Stats | None
) -> tuple[nn.Module, LinearRecord]:
    """The packed form of one linear, and how it went."""
    started = time.monotonic()
    linear = layer.get_submodule(path)
    weight = linear.weight.detach()
    scheme = recipe.scheme_of(name)
    packed, info = recipe.solver.build(linear, path, scheme, stats, recipe.integer)
    error, measured = relative_error(weight, packed.weight, stats)
    before = sum(p.numel() * p.element_size() for p in linear.parameters())
    return packed.cpu(), LinearRecord(  # ranks share it by way of the CPU
        name,
        str(scheme),
        error,
        measured,
        0 if stats is None else stats.tokens,
        before,
        packed.nbytes(),
        time.monotonic() - started,
        info,
        weight.numel(),
    )


ERROR_ROWS = 64  # all rows would cost several times the solve itself, and 256 half of it


def relative_error(weight: Tensor, quantized: Tensor, stats: Stats | None) -> tuple[float, str]:
    """||X (W' - W)^T||^2 / ||X W^T||^2 over at most ERROR_ROWS output rows at even distances, or of
    the weights alone without statistics."""
    if stats is not None:
        step = -(-len(weight) // ERROR_ROWS)
        weight, quantized = weight[::step], quantized[::step]
    weight = weight.float()
    dw = quantized - weight
    if stats is not None:
        energy = stats.output_energy(weight)
        return (stats.output_loss(dw) / energy if energy > 0 else 0.0), "output"
    energy = total(weight.square())
    return (total(dw.square()) / energy if energy > 0 else 0.0), "weight"


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` where ``path`` points."""
    parent, _, child = path.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def check(model: nn.Module, family: Family, recipe: Recipe) -> None:
    """Refuse before anything is changed: quantised twice, what cannot run."""
    scheme = recipe.scheme
    chooses = isinstance(recipe.solver, Auto)  # among recipes that do what the scheme says
    if scheme.kv_bits < FLOAT_BITS and not recipe.quantizes_activations and not chooses:
        raise UsageError(
            f"scheme {scheme} quantises the KV cache, which method {recipe.name!r} does not do: "
            f"use a scheme such as w{scheme.bits}a16g128"
        )
    require_activations(scheme, recipe.integer)
    for transform in recipe.transforms:
        transform.check(model, family, scheme)
    layers = decoder_layers(model, family)
    for index, layer in enumerate(layers):
        for path in family.linears():
            name = f"{family.layers}.{index}.{path}"
            linear = layer.get_submodule(path)
            if not isinstance(linear, nn.Linear):
                raise AlreadyQuantizedError(
                    f"{name} is a {type(linear).__name__}, not a Linear: the model is already "
                    "quantised (fewbit.restore_ undoes it)"
                )


def environment() -> dict:
    """What the numbers of a run depend on."""
    return {
        "fewbit": _C.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
    }
