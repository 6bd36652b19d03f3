"""Rotate a live float model in one call, with its certificate; the lab's steps one by one.

    rotate_(model, r4="random-hadamard")          # fold, rotate, check the logits
    fuse_layer_norms(model); rotate_model_weight(model, get_orthogonal_matrix(2048))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MissingExtraError, TransformError, UsageError
from .families import decoder_layers, describe, linear_names
from .linearise import linearise
from .orthogonal import given_rotation, rotation
from .scheme import Scheme
from .transforms import LayerContext, Transform
from .transforms.fold import FoldNorm, float64, fold_into, untie_head
from .transforms.rotate import Rotate


@torch.no_grad()
def apply_(model: nn.Module, transform: Transform) -> list[dict]:
    """Apply a transform that needs no statistics to a whole live model; its records."""
    family = describe(model)
    linearise(model, family)
    records = transform.outside(model, family)
    for index, layer in enumerate(decoder_layers(model, family)):
        context = LayerContext(index, family, model.config, Scheme(), {})
        transform.layer(layer, context)
        records += [{"layer": index, **record} for record in context.records]
    return records


def rounding_bound(model: nn.Module) -> float:
    """How far, relative to the rms logit, rounding alone may move logits of a rotated model.

    Every linear rounds its weight and its input once (unit u of the model's type) and sums K
    products in float32 at least (unit v); independent errors of L linears in a row, K in the mean
    square, and 8 standard deviations: 8 (u sqrt(2 L) + v sqrt(K L)).
    """
    linears = [model.get_submodule(name) for name in linear_names(model)]
    dtype = next(model.parameters()).dtype
    unit = torch.finfo(dtype).eps
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    width = sum(linear.in_features for linear in linears) / len(linears)
    return 8 * (unit * (2 * len(linears)) ** 0.5 + wide * (width * len(linears)) ** 0.5)


@torch.no_grad()
def certificate(model: nn.Module, before: Tensor, probe: Tensor) -> dict:
    """Logits of ``probe`` now against ``before``: rms change over rms, and the bound.

    Raises TransformError where rounding cannot explain the change.
    """
    after = model(input_ids=probe, use_cache=False).logits.to(torch.float64)
    before = before.to(torch.float64)
    change = float((after - before).square().mean().sqrt() / before.square().mean().sqrt())
    bound = rounding_bound(model)
    if not change <= bound:
        raise TransformError(
            f"the rotated model's logits differ by {change:.3g} of their rms, rounding explains "
            f"{bound:.3g}: the rotation does not fit this model"
        )
    return {"change": change, "bound": bound, "tokens": probe.numel()}


@torch.no_grad()
def rotate_(model: nn.Module, probe: Tensor | None = None, **options) -> dict:
    """Fold and rotate ``model`` in place (options: transforms.rotate.Rotate) and certify it.

    ``probe``: token ids int64 [batch, tokens]; by default 64 ids spread over the vocabulary.
    Returns the certificate. Raises what Rotate raises, and TransformError beyond the bound.
    """
    if probe is None:
        probe = torch.linspace(0, model.config.vocab_size - 1, 64).long()[None]
    probe = probe.to(next(model.parameters()).device)
    before = model(input_ids=probe, use_cache=False).logits
    rotate = Rotate(**options)
    apply_(model, rotate)
    return {**rotate.to_dict(), **certificate(model, before, probe)}


# ---- the lab's steps -----------------------------------------------------------------------------


def get_orthogonal_matrix(
    size: int, mode: str = "random", dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu", seed: int = 0,
) -> Tensor:
    """An orthogonal matrix [size, size]: "random", "hadamard" or "random-hadamard".

    Built in float64 and rounded once to ``dtype``.
    """
    return rotation(size, mode, seed).matrix().to(device=device, dtype=dtype)


@torch.no_grad()
def fuse_ln_linear(layernorm: nn.Module, linear_layers: Sequence[nn.Linear]) -> None:
    """Gain and bias of a norm into the linears that read it; the norm keeps 1 and 0."""
    linears = list(linear_layers)
    with float64([layernorm, *linears]):
        fold_into(layernorm, linears, unit_offset=False, centre=True)


@torch.no_grad()
def fuse_layer_norms(model: nn.Module) -> None:
    """All norms into their readers, the final one into the (untied) head.

    The means of LayerNorm models go into what writes to the residual stream, and RMSNorm without
    parameters stands where LayerNorm stood: any rotation may follow.
    """
    apply_(model, FoldNorm(centre=True))


@torch.no_grad()
def rotate_model_weight(model: nn.Module, R1: Tensor) -> None:  # noqa: N803  (the lab's name)
    """Embedding W R1, readers W R1, writers R1^T W and R1^T b, head W R1.

    ``R1`` [hidden, hidden] orthogonal. Norms that still have gains are folded first.
    """
    family = describe(model)
    untie_head(model, family)
    r1 = given_rotation(R1, model.config.hidden_size)
    apply_(model, Rotate(R1, None, keeps_mean=family.norm == "layer" and r1.keeps_mean()))


def plot_2d_layer_comparison(
    output1: Any,
    output2: Any,
    title1: str,
    title2: str,
    layer_range: tuple[int, int] | None = None,
    seq_slice: tuple[int, int | None] = (100, None),
):
    """Magnitudes of hidden states, tokens by channels, of two models side by side.

    ``output1`` and ``output2``: model outputs with ``hidden_states``, or lists of tensors
    [batch, tokens, hidden], one per layer. One row of pictures per layer of ``layer_range``, on one
    colour scale, with max / mean in the title. Returns the matplotlib Figure.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib: pip install fewbit[report]") from error
    pair = [list(getattr(o, "hidden_states", None) or o) for o in (output1, output2)]
    if len(pair[0]) != len(pair[1]):
        raise UsageError(f"the outputs have {len(pair[0])} and {len(pair[1])} layers")
    first, last = layer_range or (0, len(pair[0]))
    layers = range(len(pair[0]))[first:last]
    if not layers:
        raise UsageError(f"layer_range {layer_range} holds none of {len(pair[0])} layers")
    figure = Figure(figsize=(10, 2.4 * len(layers)), layout="constrained")
    grid = figure.subplots(len(layers), 2, squeeze=False)
    for row, index in enumerate(layers):
        states = [p[index][0].detach().float().abs().cpu() for p in pair]
        start = min(seq_slice[0], states[0].shape[0] - 1)  # a short text is shown from its end
        states = [s[start : seq_slice[1]] for s in states]
        top = max(float(s.max()) for s in states)
        for axis, state, title in zip(grid[row], states, (title1, title2), strict=True):
            picture = axis.imshow(state.T.numpy(), aspect="auto", vmin=0, vmax=top, cmap="viridis")
            ratio = float(state.max() / state.mean())
            axis.set_title(f"{title}, layer {index}: max / mean {ratio:.1f}", fontsize=9)
            axis.set_xlabel("token", fontsize=8)
            axis.set_ylabel("channel", fontsize=8)
        figure.colorbar(picture, ax=list(grid[row]))
    return figure
