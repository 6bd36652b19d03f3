"""Gemma: norms that multiply by 1 + weight, gated GELU, an embedding times sqrt(hidden)."""

from dataclasses import replace

from . import Family
from .llama import ATTENTION, MLP

_GEMMA = Family(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    embed="model.embed_tokens",
    layers="model.layers",
    sublayers=(ATTENTION, MLP),
    final_norm="model.norm",
    head="lm_head",
    unit_offset=True,
)

FAMILIES = (
    _GEMMA,
    replace(
        _GEMMA,
        name="gemma2",
        architectures=("Gemma2ForCausalLM", "Gemma3ForCausalLM"),
        sublayers=(ATTENTION, replace(MLP, norm="pre_feedforward_layernorm")),
        unrotatable="a norm with gains stands between each output projection and the residual "
        "stream, and gains do not commute with a rotation",
    ),
)
