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


TWINS = {
    "opt": _opt,
    "llama-gqa": _llama,
    "llama-mha-bias": lambda: _llama(num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "llama-tied-64": lambda: _llama(hidden_size=64, head_dim=24, tie_word_embeddings=True),
}


def tiny(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The named twin in eval mode, every parameter (norm gains and biases too) random."""
    torch.manual_seed(seed)
    model = TWINS[name]().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for path, p in model.named_parameters():
        centre = 1.0 if "norm" in path and path.endswith("weight") else 0.0
        p.copy_(centre + 0.2 * torch.randn(p.shape, generator=generator))
    if dtype == torch.float64:
        exact_norms(model)
    return model.to(dtype)


class ExactRMSNorm(nn.Module):
    """Llama's norm without its cast to float32, so that a float64 model is float64 throughout."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def exact_norms(model: nn.Module) -> None:
    """Put ExactRMSNorm in place of every RMSNorm, in place."""
    for path, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, ExactRMSNorm(module))


def probe(batch: int = 2, tokens: int = 17, seed: int = 1) -> torch.Tensor:
    """Token ids int64 [batch, tokens] of the twins' vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, tokens), generator=generator)
