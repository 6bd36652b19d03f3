"""Llama, Mistral, Qwen2, Qwen3: RMSNorm, SwiGLU, rotary, grouped-query attention.

Qwen2 has biases on q, k and v; Qwen3 normalises each query and key head.
"""

from . import Family, Sublayer

ATTENTION = Sublayer(
    norm="input_layernorm",
    reads=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    inner="self_attn.v_proj",
    writes="self_attn.o_proj",
    heads=True,
    query="self_attn.q_proj",
    key="self_attn.k_proj",
)
MLP = Sublayer(
    norm="post_attention_layernorm",
    reads=("mlp.gate_proj", "mlp.up_proj"),
    inner="mlp.up_proj",
    writes="mlp.down_proj",
)

FAMILIES = (
    Family(
        name="llama",
        architectures=(
            "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
        ),
        embed="model.embed_tokens",
        layers="model.layers",
        sublayers=(ATTENTION, MLP),
        final_norm="model.norm",
        head="lm_head",
    ),
)
