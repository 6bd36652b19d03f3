"""Bloom: LayerNorm (one more behind the embedding), ALiBi, qkv fused head by head, GELU."""

from . import Family, Sublayer

FAMILIES = (
    Family(
        name="bloom",
        architectures=("BloomForCausalLM",),
        embed="transformer.word_embeddings",
        layers="transformer.h",
        sublayers=(
            Sublayer(
                norm="input_layernorm",
                reads=("self_attention.query_key_value",),
                inner="self_attention.query_key_value",
                writes="self_attention.dense",
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
        final_norm="transformer.ln_f",
        head="lm_head",
        norm="layer",
        rope=False,
        unrotatable="a LayerNorm with gains stands between the embedding and the residual stream, "
        "and gains do not commute with a rotation",
        refuse={
            "apply_residual_connection_post_layernorm=True": "its residual stream starts behind "
            "the norms, so a scale cannot leave them"
        },
    ),
)
