"""Small seeded models of the real transformers classes, one per family: the twins of the tests."""

from __future__ import annotations

import torch
import transformers
from torch import nn

VOCAB = 97


def _opt(**changes):
    config = transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=48, ffn_dim=80, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=48, dropout=0.0, **changes,
    )
    return transformers.OPTForCausalLM(config)


def _llama(**changes):
    fields = dict(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=88, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**fields, **changes}))


_SIZES = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=88, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64,
)


def _twin(kind: str, **fields):
    """The causal model of a transformers family, with this file's sizes unless ``fields`` say."""
    config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **fields})
    config._experts_implementation = "eager"  # grouped products know no float64
    return transformers.AutoModelForCausalLM.from_config(config)


def _falcon(**changes):
    fields = dict(num_kv_heads=4, multi_query=False, alibi=False, ffn_hidden_size=88)
    return _twin("Falcon", **{**fields, **changes})


TWINS = {
    "opt": _opt,
    "llama-gqa": _llama,
    "llama-mha-bias": lambda: _llama(num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "llama-tied-64": lambda: _llama(hidden_size=64, head_dim=24, tie_word_embeddings=True),
    "gpt2": lambda: _twin("GPT2", n_positions=64),
    "gpt-neox": lambda: _twin("GPTNeoX"),
    "gpt-neox-serial": lambda: _twin("GPTNeoX", use_parallel_residual=False),
    "bloom": lambda: _twin("Bloom"),
    "falcon-7b": lambda: _falcon(multi_query=True, bias=False),
    "falcon-rw": lambda: _falcon(parallel_attn=False, alibi=True, bias=True),
    "falcon-11b": lambda: _falcon(
        new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    "falcon-40b": lambda: _falcon(
        new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=2
    ),
    "mistral": lambda: _twin("Mistral", num_key_value_heads=2, sliding_window=8),
    "qwen2": lambda: _twin("Qwen2", num_key_value_heads=2),
    "qwen3": lambda: _twin("Qwen3", num_key_value_heads=2, head_dim=12),
    "gemma": lambda: _twin("Gemma", num_key_value_heads=1, head_dim=16),
    "gemma2": lambda: _twin("Gemma2", num_key_value_heads=2, head_dim=16, sliding_window=8),
    "gemma3": lambda: _twin("Gemma3Text", num_key_value_heads=2, head_dim=16, sliding_window=8,
                            layer_types=["sliding_attention", "full_attention"]),
    "phi": lambda: _twin("Phi"),
    "phi3": lambda: _twin("Phi3", num_key_value_heads=2, pad_token_id=0),
    "mixtral": lambda: _twin("Mixtral", num_key_value_heads=2, num_local_experts=4),
    "qwen2-moe": lambda: _twin(
        "Qwen2Moe", num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=40, shared_expert_intermediate_size=56,
    ),
    "qwen3-moe": lambda: _twin(
        "Qwen3Moe", num_key_value_heads=2, head_dim=12, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=40,
    ),
}


def tiny(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The named twin in eval mode, every parameter (norm gains and biases too) random."""
    torch.manual_seed(seed)
    model = TWINS[name]().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for path, p in model.named_parameters():
        is_gain = p.dim() == 1 and path.endswith("weight")
        centre = 1.0 if is_gain and "gemma" not in name else 0.0
        p.copy_(centre + 0.2 * torch.randn(p.shape, generator=generator))
    if dtype == torch.float64:
        exact_norms(model)
    return model.to(dtype)


class ExactRMSNorm(nn.Module):
    """A family's RMSNorm without its cast to float32: a float64 model is float64 throughout.

    ``offset`` is what the family adds to the gain: 1 for Gemma.
    """

    def __init__(self, norm: nn.Module, eps: float, offset: float) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = norm.weight, eps, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gain = self.weight + self.offset
        return gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def exact_norms(model: nn.Module) -> None:
    """Put ExactRMSNorm in place of every RMSNorm, in place."""
    for path, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind.endswith("RMSNorm") and kind != "ExactRMSNorm":
            parent, _, name = path.rpartition(".")
            eps = getattr(module, "variance_epsilon", None)
            eps = module.eps if eps is None else eps
            exact = ExactRMSNorm(module, eps, 1.0 if kind.startswith("Gemma") else 0.0)
            setattr(model.get_submodule(parent), name, exact)


def probe(batch: int = 2, tokens: int = 17, seed: int = 1) -> torch.Tensor:
    """Token ids int64 [batch, tokens] of the twins' vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, tokens), generator=generator)
