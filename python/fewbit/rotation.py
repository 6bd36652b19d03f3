"""Rotate a live float model in one call, with its certificate, and see what that did to outliers.

    rotate_(model, r4="random-hadamard")   # fold, rotate, check the logits
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import TransformError
from .families import decoder_layers, describe, linear_names
from .linearise import linearise
from .scheme import Scheme
from .transforms import LayerContext, Transform
from .transforms.rotate import Rotate


@torch.no_grad()
def apply_(model: nn.Module, transform: Transform) -> list[dict]:
    """Apply a transform that needs no statistics to a whole live model; its records."""
    family = describe(model)
    linearise(model, family)
    transform.check(model, family, Scheme())
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


@torch.no_grad()
def outlier_ratios(model: nn.Module, probe: Tensor) -> dict[str, tuple[float, float, float]]:
    """Per linear, the largest input over the average one, in magnitude: of all numbers, of each
    token (averaged over tokens; what a per-token grid pays), of the channels' means."""
    found, hooks = {}, []
    for name in linear_names(model):

        def look(module, args, name=name):
            x = args[0].reshape(-1, args[0].shape[-1]).abs().float()
            channel = x.mean(0)
            found[name] = (
                float(x.max() / x.mean()),
                float((x.amax(1) / x.mean(1)).mean()),
                float(channel.max() / channel.mean()),
            )

        hooks.append(model.get_submodule(name).register_forward_pre_hook(look))
    try:
        model(input_ids=probe, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found
