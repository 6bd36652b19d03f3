"""OPT: LayerNorm with bias, biases everywhere, ReLU, learned positions, tied head."""

from . import Family, Sublayer

FAMILIES = (
    Family(
        name="opt",
        architectures=("OPTForCausalLM",),
        embed="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        layers="model.decoder.layers",
        sublayers=(
            Sublayer(
                norm="self_attn_layer_norm",
                reads=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                inner="self_attn.v_proj",
                writes="self_attn.out_proj",
                heads=True,
                query="self_attn.q_proj",
                key="self_attn.k_proj",
            ),
            Sublayer(norm="final_layer_norm", reads=("fc1",), inner="fc1", writes="fc2"),
        ),
        final_norm="model.decoder.final_layer_norm",
        head="lm_head",
        norm="layer",
        rope=False,
        refuse={
            "do_layer_norm_before=False": "its norms follow the residual sum (OPT-350m), so they "
            "have no linears behind them that could take a scale",
            "word_embed_proj_dim!=hidden_size": "projections stand between its residual stream and "
            "its embedding and head",
        },
    ),
)
