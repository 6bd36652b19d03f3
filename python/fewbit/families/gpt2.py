"""GPT-2: LayerNorm, GELU, learned positions, tied head, one fused qkv; Conv1D weights transposed.

``linearise`` turns its Conv1D modules into Linears before anything else happens.
"""

from . import Family, Sublayer

FAMILIES = (
    Family(
        name="gpt2",
        architectures=("GPT2LMHeadModel",),
        embed="transformer.wte",
        positions="transformer.wpe",
        layers="transformer.h",
        sublayers=(
            Sublayer(
                norm="ln_1",
                reads=("attn.c_attn",),
                inner="attn.c_attn",
                writes="attn.c_proj",
                heads=True,
                fused="qkv",
            ),
            Sublayer(
                norm="ln_2",
                reads=("mlp.c_fc",),
                inner="mlp.c_fc",
                writes="mlp.c_proj",
                elementwise=False,
            ),
        ),
        final_norm="transformer.ln_f",
        head="lm_head",
        norm="layer",
        rope=False,
        refuse={"add_cross_attention=True": "its cross attention is not described"},
    ),
)
