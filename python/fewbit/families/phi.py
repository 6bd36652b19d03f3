"""Phi-1 to 2: LayerNorm, one norm for attention and MLP, GELU, biases. Phi-3: fused Llama."""

from dataclasses import replace

from . import Family, Sublayer
from .llama import ATTENTION, MLP

FAMILIES = (
    Family(
        name="phi",
        architectures=("PhiForCausalLM",),
        embed="model.embed_tokens",
        layers="model.layers",
        sublayers=(
            replace(ATTENTION, writes="self_attn.dense"),
            Sublayer(
                norm="input_layernorm",
                reads=("mlp.fc1",),
                inner="mlp.fc1",
                writes="mlp.fc2",
                elementwise=False,
            ),
        ),
        final_norm="model.final_layernorm",
        head="lm_head",
        norm="layer",
        refuse={"qk_layernorm=True": "its norms of queries and keys are not described"},
    ),
    Family(
        name="phi3",
        architectures=("Phi3ForCausalLM",),
        embed="model.embed_tokens",
        layers="model.layers",
        sublayers=(
            replace(
                ATTENTION,
                reads=("self_attn.qkv_proj",),
                inner="self_attn.qkv_proj",
                fused="qkv",
                query="",
                key="",
            ),
            replace(
                MLP, reads=("mlp.gate_up_proj",), inner="mlp.gate_up_proj", fused="gate_up"
            ),
        ),
        final_norm="model.norm",
        head="lm_head",
    ),
)
