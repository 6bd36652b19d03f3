"""GPT-NeoX and Pythia: LayerNorm, partial rotary, qkv fused head by head, parallel residual."""

from . import Family, Sublayer

FAMILIES = (
    Family(
        name="gpt_neox",
        architectures=("GPTNeoXForCausalLM",),
        embed="gpt_neox.embed_in",
        layers="gpt_neox.layers",
        sublayers=(
            Sublayer(
                norm="input_layernorm",
                reads=("attention.query_key_value",),
                inner="attention.query_key_value",
                writes="attention.dense",
                heads=True,
                fused="heads",
            ),
            Sublayer(
                norm="post_attention_layernorm",
                reads=("mlp.dense_h_to_4h",),
                inner="mlp.dense_h_to_4h",
                writes="mlp.dense_4h_to_h",
                elementwise=False,
            ),
        ),
        final_norm="gpt_neox.final_layer_norm",
        head="lm_head",
        norm="layer",
    ),
)
