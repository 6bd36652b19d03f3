"""Mixtral, Qwen2-MoE, Qwen3-MoE: Llama's attention, then a router and experts behind one norm.

The experts' weights come fused in three-dimensional parameters; ``linearise`` unfuses them. The
router reads the norm as the experts do, so a scale that leaves the norm must reach it too.
"""

from dataclasses import replace

from . import Family, Sublayer
from .llama import ATTENTION

_NORM = "post_attention_layernorm"
_EXPERTS = Sublayer(
    norm=_NORM,
    reads=("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
    inner="mlp.experts.*.up_proj",
    writes="mlp.experts.*.down_proj",
    also=("mlp.gate",),
)
_SHARED = Sublayer(
    norm=_NORM,
    reads=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    inner="mlp.shared_expert.up_proj",
    writes="mlp.shared_expert.down_proj",
    also=("mlp.shared_expert_gate",),
)
_MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    embed="model.embed_tokens",
    layers="model.layers",
    sublayers=(ATTENTION, _EXPERTS),
    final_norm="model.norm",
    head="lm_head",
    experts="mlp.experts",
    expert_count="num_local_experts",
)
_SPARSE_ONLY = {
    "decoder_sparse_step!=1": "some of its layers have experts and some have none",
    "mlp_only_layers!=[]": "some of its layers have experts and some have none",
}

FAMILIES = (
    _MIXTRAL,
    replace(
        _MIXTRAL,
        name="qwen3_moe",
        architectures=("Qwen3MoeForCausalLM",),
        expert_count="num_experts",
        refuse=_SPARSE_ONLY,
    ),
    replace(
        _MIXTRAL,
        name="qwen2_moe",
        architectures=("Qwen2MoeForCausalLM",),
        sublayers=(ATTENTION, _SHARED, _EXPERTS),
        expert_count="num_experts",
        refuse=_SPARSE_ONLY,
    ),
)
