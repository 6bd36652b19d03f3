"""Small quantised model directories, built without a model class."""

import torch
from strategies import random_codes

from fewbit import formats
from fewbit.scheme import Scheme
from fewbit.shards import Shards, Writer
from fewbit.stored import find

LAYERS = [
    f"model.layers.{i}.{part}"
    for i in range(3)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
]
SHAPES = {name: (64, 128 if name.endswith("down_proj") else 64) for name in LAYERS}


def write_model(path, format="compressed-tensors", scheme=None, max_shard_size=10**9, low=1):
    """A directory in that format; returns the codes by module."""
    scheme = scheme or Scheme(4, 32, False)
    target = formats.get(format)
    codes = {name: random_codes(*SHAPES[name], scheme, i, low=low) for i, name in enumerate(LAYERS)}
    with Writer(path, max_shard_size) as writer:
        writer.add({"model.embed_tokens.weight": torch.randn(100, 64).half()})
        for name, value in codes.items():
            packed = target.pack(value, scheme)
            writer.add({f"{name}.{suffix}": tensor for suffix, tensor in packed.items()})
        writer.add({"model.norm.weight": torch.ones(64).half()})
        section = target.config(dict.fromkeys(LAYERS, scheme), ["lm_head"])
        config = {"model_type": "llama", "tie_word_embeddings": True}
        writer.finish({**config, "quantization_config": section}, {"merges.txt": b"a b\n"})
    return codes


def read_codes(path):
    """Codes by module, and the plan."""
    shards = Shards(path)
    plan = formats.parse(shards.config["quantization_config"])
    return {name: m.codes(shards)[0] for name, m in find(shards, plan).items()}, plan
