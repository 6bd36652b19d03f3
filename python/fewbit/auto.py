"""method="auto": mixed widths where they pay, and the recipe that holds up on unseen text.

1. Every linear's cost at every width is predicted: KL(float || quantised) of a token is, to second
   order, half the sum over output channels o of f_o dw_o G dw_o^T / tokens, with f_o the mean
   squared gradient of the log-likelihood by that output (the Fisher information, diagonal over
   channels), G the Gram matrix of the inputs and dw_o the error that GPTQ leaves in row o.
2. A knapsack gives each linear the width with which the sum of costs is least within the size.
3. The candidates, single widths and mixed ones, are quantised on every other calibration window
   (of WINDOWS at even distances, where there are more) and compared by their KL divergence on the
   windows between, then the other way round; the least mean wins, and then runs on all windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import ops
from .calibrate import Windows, capture, collect
from .errors import ShortTextError, UsageError
from .evaluate import compare, log_probabilities
from .families import Family, decoder_layers, describe
from .linearise import linearise
from .recipes import Recipe, build
from .scheme import FLOAT_BITS, Scheme
from .solvers.gptq import GPTQ

WINDOWS = 32  # of the calibration, that the choice is made on
ROWS = 512  # of a linear, whose errors stand for all
BUCKETS = 20000  # of the knapsack's size axis


def choose(
    model: nn.Module,
    recipe: Recipe,
    data: Windows,
    trial: Callable[[Recipe, Windows], AbstractContextManager],
) -> Recipe:
    """The recipe that ``quantize_`` runs in place of ``recipe``, whose solver is Auto; ``model`` is
    left as it was. What ``recipe`` learns afterwards (tune) goes with it.

    All candidates have the group size, grid and activations of the recipe's scheme; its width is
    the single one. A quality ``kl`` is met as predicted, corrected by what the single width was
    predicted to cost and did. Inside ``trial(recipe, windows)`` the model is quantised.
    """
    scheme, bits, kl = recipe.scheme, recipe.solver.bits, recipe.solver.kl
    widths = recipe.solver.widths
    if bits is not None and kl is not None:
        raise UsageError("auto takes a size (bits) or a quality (kl), not both")
    if len(data.batches) < 4:
        raise ShortTextError(
            f"auto needs at least 4 calibration windows to hold one back, got {len(data.batches)}"
        )
    data = data.thinned(WINDOWS)
    halves = [Windows(data.batches[i::2], data.masks[i::2], data.source) for i in (0, 1)]
    family = describe(model)
    undo = linearise(model, family)
    try:
        names, sizes, costs = predict(model, family, scheme, data, widths)
        shapes = [tuple(model.get_submodule(n).weight.shape) for n in names]
    finally:
        undo()
    references = [log_probabilities(model, half) for half in halves]

    def measured(recipe: Recipe) -> float:
        total = 0.0
        for seen, unseen, reference in zip(halves, halves[::-1], references[::-1], strict=True):
            with trial(recipe, seen):
                total += compare(model, unseen, reference).kl
        return total / 2

    found = [(measured(recipe), recipe) for recipe in candidates(scheme)]
    least, best = min(found, key=lambda pair: pair[0])
    single = [widths.index(scheme.bits)] * len(names) if scheme.bits in widths else None
    if kl is not None:
        if single is None:
            raise UsageError(f"auto with kl needs a scheme of one of the widths {tuple(widths)}")
        predicted = float(costs[torch.arange(len(names)), single].sum())
        chosen = smallest(sizes, costs, kl * predicted / least)
        found.clear()  # a single width has no say in the size
    else:
        budget = sum(size_of(shape, scheme) for shape in shapes)
        if bits is not None:
            budget = int(bits * sum(rows * columns for rows, columns in shapes) / 8)
            found.clear()
        chosen = knapsack(sizes, costs, budget)
    mixed = {n: replace(scheme, bits=widths[i]) for n, i in zip(names, chosen, strict=True)}
    several = replace(best, name=f"auto: {best.name}", schemes=mixed)
    found.append((measured(several), several))
    return replace(min(found, key=lambda pair: pair[0])[1], tune=recipe.tune)


def candidates(scheme: Scheme) -> list[Recipe]:
    """The stacks of one width that are worth a trial, by what the scheme quantises."""
    if scheme.activation_bits == FLOAT_BITS:
        names = ("qronos", "awq+qronos", "quarot+qronos")
        return [build(n, scheme) for n in (names if scheme.kv_bits == FLOAT_BITS else names[2:])]
    fitted = {"fit_activations": True}
    rotated = [
        build("quarot+qronos", scheme, **fitted),
        build("quarot+smoothquant+qronos", scheme, alpha="auto", **fitted),
    ]
    if scheme.activation_bits <= 4:  # learning pays only where rotations decide
        spinquant = build("spinquant+smoothquant+qronos", scheme, alpha="auto", **fitted)
        rotated = [rotated[1], spinquant]
    # Nothing else quantises the KV cache; few bits do not survive outliers that are only smoothed.
    plain = scheme.kv_bits == FLOAT_BITS and scheme.activation_bits == 8
    return [build("smoothquant+qronos", scheme), *rotated] if plain else rotated


def size_of(shape: tuple[int, int], scheme: Scheme) -> int:
    """Bytes of a packed weight: codes, and a scale and a zero point (one byte) a group."""
    rows, columns = shape
    scale = 4 if scheme.scale_dtype == "float32" else 2
    return rows * (columns * scheme.bits // 8 + scheme.groups(columns) * (scale + 1))


def predict(
    model: nn.Module, family: Family, scheme: Scheme, data: Windows, widths: Sequence[int]
) -> tuple[list[str], Tensor, Tensor]:
    """Names of all decoder linears; bytes and predicted KL [linears, widths] of each width."""
    gains = fisher(model, family, data)
    names, sizes, costs = [], [], []
    inputs = capture(model, family, data)
    solver = GPTQ()
    with torch.no_grad():
        for index, layer in enumerate(decoder_layers(model, family)):
            stats, inputs = collect(layer, family, inputs, f"{family.layers}.{index}")
            for path in family.linears():
                name, weight = f"{family.layers}.{index}.{path}", layer.get_submodule(path).weight
                step = -(-len(weight) // ROWS)
                part, share = weight[::step].float(), gains[name][::step]
                row = []
                for width in widths:
                    grid = replace(scheme, bits=width)
                    codes, _ = solver.solve(part, grid, stats[path])
                    gram = stats[path].gram
                    dw = (ops.dequantize(*codes, grid.group_size) - part).to(gram.dtype)
                    error = ((dw @ gram) * dw).sum(1) / max(stats[path].tokens, 1)
                    row.append(0.5 * step * float((share * error).sum()))
                names.append(name)
                costs.append(row)
                shape = tuple(weight.shape)
                sizes.append([size_of(shape, replace(scheme, bits=w)) for w in widths])
    return names, torch.tensor(sizes), torch.tensor(costs, dtype=torch.float64)


def fisher(model: nn.Module, family: Family, data: Windows, seed: int = 0) -> dict[str, Tensor]:
    """{linear: [out_features] float64}: the mean over tokens of the squared derivative of the
    log-likelihood of a text drawn from the model itself by each output."""
    sums: dict[str, Tensor] = {}
    hooks = []

    def watch(name: str, linear: nn.Module) -> None:
        sums[name] = torch.zeros(linear.out_features, dtype=torch.float64)

        def add(gradient: Tensor) -> None:
            rows = gradient.reshape(-1, linear.out_features)
            sums[name] += rows.double().square().sum(0).cpu()

        def forward(module, args, out) -> None:
            out.register_hook(add)

        hooks.append(linear.register_forward_hook(forward))

    for index, layer in enumerate(decoder_layers(model, family)):
        for path in family.linears():
            watch(f"{family.layers}.{index}.{path}", layer.get_submodule(path))
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(parameter is embedding)  # so that activations get gradients
        with torch.enable_grad():
            for ids, mask in zip(data.batches, data.masks, strict=True):
                extra = {} if mask is None else {"attention_mask": mask.long()}
                logits = model(input_ids=ids, use_cache=False, **extra).logits.float()
                logits = logits if mask is None else logits[mask]
                scores = logits.reshape(-1, logits.shape[-1]).log_softmax(-1)
                drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator)
                torch.autograd.grad(-scores.gather(1, drawn.to(scores.device)).sum(), embedding)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)
    return {name: total / data.tokens for name, total in sums.items()}


def _least_costs(sizes: Tensor, costs: Tensor) -> tuple[Tensor, Tensor, int]:
    """(cost [buckets + 1], choice [items, buckets + 1], bytes of a bucket): the least sum of costs
    whose sizes, each rounded up to whole buckets, fill at most that many."""
    unit = math.gcd(*sizes.flatten().tolist())
    unit = max(unit, -(-int(sizes.amax(1).sum()) // BUCKETS))
    steps = -(-sizes // unit)
    buckets = int(steps.amax(1).sum())
    least = torch.zeros(buckets + 1, dtype=torch.float64)
    choice = torch.zeros(len(sizes), buckets + 1, dtype=torch.int64)
    for item in range(len(sizes)):
        trials = torch.full((sizes.shape[1], buckets + 1), math.inf, dtype=torch.float64)
        for i, (step, cost) in enumerate(zip(steps[item].tolist(), costs[item], strict=True)):
            trials[i, step:] = least[: buckets + 1 - step] + cost
        least, choice[item] = trials.min(0)
    return least, choice, unit


def _traced(sizes: Tensor, choice: Tensor, unit: int, bucket: int) -> list[int]:
    steps, chosen = -(-sizes // unit), []
    for item in range(len(sizes) - 1, -1, -1):
        chosen.append(int(choice[item, bucket]))
        bucket -= int(steps[item, chosen[-1]])
    return chosen[::-1]


def knapsack(sizes: Tensor, costs: Tensor, budget: int) -> list[int]:
    """For every item (row) the choice (column) with which the sum of ``costs`` is least while the
    sum of ``sizes`` is at most ``budget``; exact for sizes of a common unit, else they are rounded
    up to a 20000th of the whole. Raises UsageError when even the smallest choices are larger."""
    least, choice, unit = _least_costs(sizes, costs)
    bucket = min(budget // unit, len(least) - 1)
    if not math.isfinite(float(least[bucket])):
        raise UsageError(
            f"a size of {budget} bytes is too small: the narrowest weights need "
            f"{int(sizes.amin(1).sum())}"
        )
    return _traced(sizes, choice, unit, bucket)


def smallest(sizes: Tensor, costs: Tensor, limit: float) -> list[int]:
    """As ``knapsack``, but the least sum of sizes whose sum of costs is at most ``limit``."""
    least, choice, unit = _least_costs(sizes, costs)
    enough = (least <= limit).nonzero()
    if len(enough) == 0:
        raise UsageError(
            f"the quality asked for is out of reach: the widest weights are predicted at "
            f"{float(least[-1]) / limit:.2g} times the limit"
        )
    return _traced(sizes, choice, unit, int(enough[0]))
