"""Falcon: LayerNorm, fused qkv, GELU; 7B shares one norm, 40B has two, RW is not parallel."""

from dataclasses import replace

from . import Family, Sublayer

_ATTENTION = Sublayer(
    norm="input_layernorm",
    reads=("self_attention.query_key_value",),
    inner="self_attention.query_key_value",
    writes="self_attention.dense",
    heads=True,
    fused="heads",
)
_MLP = Sublayer(
    norm="input_layernorm",
    reads=("mlp.dense_h_to_4h",),
    inner="mlp.dense_h_to_4h",
    writes="mlp.dense_4h_to_h",
    elementwise=False,
)
_SERIAL = replace(_MLP, norm="post_attention_layernorm")
_ONE_NORM = Family(
    name="falcon",
    architectures=("FalconForCausalLM",),
    embed="transformer.word_embeddings",
    layers="transformer.h",
    sublayers=(_ATTENTION, _MLP),
    final_norm="transformer.ln_f",
    head="lm_head",
    norm="layer",
    when={"new_decoder_architecture": False, "parallel_attn": True},
)

FAMILIES = (
    _ONE_NORM,
    replace(
        _ONE_NORM,
        name="falcon-rw",
        sublayers=(_ATTENTION, _SERIAL),
        when={"new_decoder_architecture": False, "parallel_attn": False},
    ),
    replace(
        _ONE_NORM,
        name="falcon-11b",
        when={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ),
    replace(
        _ONE_NORM,
        name="falcon-40b",
        sublayers=(replace(_ATTENTION, norm="ln_attn"), replace(_MLP, norm="ln_mlp")),
        when={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
    ),
)
