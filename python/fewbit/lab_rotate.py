"""Section 5 of the exercises: rotation, by its own names, over transforms/rotate.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .families import decoder_layers, describe
from .orthogonal import rotation
from .rotation import apply_
from .transforms.fold import FoldNorm, float64, fold_into
from .transforms.rotate import Rotate

__all__ = [
    "fuse_layer_norms_opt",
    "fuse_layer_norms_tinyllama",
    "fuse_ln_linear",
    "get_orthogonal_matrix",
    "plot_2d_layer_comparison",
    "quantize_tinyllama",
    "rotate_model_weight",
]
Q_BITS = 8


def get_orthogonal_matrix(
    size: int, mode: str = "random", dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    """An orthogonal matrix [size, size]: "random", "hadamard" or "random-hadamard"."""
    return rotation(size, mode).matrix().to(device=device, dtype=dtype)


@torch.no_grad()
def fuse_ln_linear(layernorm: nn.Module, linear_layers) -> None:
    """The norm's gain and bias into the linears that read it, in float64, rounded once."""
    linears = list(linear_layers)
    with float64([layernorm, *linears]):
        fold_into(layernorm, linears, unit_offset=False, centre=False)


@torch.no_grad()
def fuse_layer_norms_tinyllama(model: nn.Module) -> None:
    """Every norm of the model into its readers, the last one into the head."""
    apply_(model, FoldNorm(centre=False))


@torch.no_grad()
def fuse_layer_norms_opt(model: nn.Module) -> None:
    """The same for LayerNorm models: gains and biases into the readers, means out of the writers
    (embedding, positions, out_proj, fc2 and their biases). What is left in a norm's place is an
    RMSNorm without parameters, which any R1 passes through."""
    apply_(model, FoldNorm(centre=True))


@torch.no_grad()
def rotate_model_weight(model: nn.Module, R1: Tensor, parity: bool = False) -> None:  # noqa: N803
    """Rotate the residual stream by R1 [hidden, hidden].

    Default: norms folded, means taken out of LayerNorm models, biases and positions rotated, a tied
    head untied: the function stays. Parity: weights only, embedding and every linear by the slide's
    name test (out_proj and fc2, o_proj and down_proj write); a tied weight is turned twice.
    """
    if not parity:
        apply_(model, Rotate(R1, None, keeps_mean=False))
        return
    writers = ("out_proj", "fc2", "o_proj", "down_proj")
    for name, m in model.named_modules():
        if isinstance(m, nn.Embedding):
            m.weight.data = m.weight.data @ R1
        elif isinstance(m, nn.Linear):
            w = m.weight.data
            m.weight.data = R1.T @ w if any(k in name for k in writers) else w @ R1


def quantize_tinyllama(model: nn.Module, quantize_bits: int = Q_BITS) -> nn.Module:
    """W8A8Linear in place of every decoder linear of a Llama-type model."""
    from .lab import W8A8Linear
    from .pipeline import replace_module

    family = describe(model)
    for layer in decoder_layers(model, family):
        for path in family.linears():
            made = W8A8Linear(layer.get_submodule(path), n_bits=quantize_bits)
            replace_module(layer, path, made)
    return model


def plot_2d_layer_comparison(
    output1: Tensor, output2: Tensor, title1: str, title2: str, layer_range=None,
    seq_slice=(100, None),
):
    """|activations| [layers, tokens, channels] of two models side by side, layer by layer."""
    import matplotlib.pyplot as plt

    layers = range(len(output1)) if layer_range is None else layer_range
    figure, axes = plt.subplots(len(layers), 2, squeeze=False, figsize=(10, 3 * len(layers)))
    for row, layer in zip(axes, layers, strict=True):
        for axis, output, title in zip(row, (output1, output2), (title1, title2), strict=True):
            shown = output[layer].detach().float().abs().reshape(-1, output[layer].shape[-1])
            axis.imshow(shown[slice(*seq_slice)].cpu().numpy(), aspect="auto")
            axis.set(title=f"{title}, layer {layer}", xlabel="channel", ylabel="token")
    figure.tight_layout()
    return figure
