"""Decoded tokens per second of a Llama-type model of random weights: python tests/bench_decode.py

Hidden 2048, 16 layers, ffn 5632, 8 of 16 heads for keys, vocabulary 32000: 0.82 G weights in linear
layers, the head included. Prefill of 128 tokens, then greedy decoding, in float32, bfloat16, W4A16
and W4A8 (group 128).
Bars: W4A16 decode >= 6 x float32 and >= 2 x bfloat16, prefill >= float32. The packed model's logits
are checked against the float model with the same quantised weights first.
"""

import argparse
import json
import os
import time

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench import close
from fewbit import _C
from fewbit.linear import Int8Linear, PackedLinear
from fewbit.ops import quantize
from fewbit.scheme import Codes, Scheme

SHAPE = dict(
    hidden_size=2048, num_hidden_layers=16, intermediate_size=5632, num_attention_heads=16,
    num_key_value_heads=8, vocab_size=32000, max_position_embeddings=2048,
)  # fmt: skip
TINY = SHAPE | dict(hidden_size=256, num_hidden_layers=2, intermediate_size=512, vocab_size=512)


def build(shape, dtype):
    torch.manual_seed(0)
    config = LlamaConfig(**shape, tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    rotary = type(model.model.rotary_emb)(config=config)  # its buffer is computed, not loaded
    model = model.to(dtype).to_empty(device="cpu").eval()
    model.model.rotary_emb = rotary
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data.fill_(1.0)
        else:
            p.data.normal_(0.0, 0.02)
    return model


def pack(model, scheme, integer=False):
    """Every linear, the head included, by round-to-nearest."""
    scheme = Scheme.parse(scheme)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                if integer:
                    w = child.weight.detach()
                    codes = Codes(*quantize(w, 4, 128, scheme.symmetric, scheme.scale_dtype))
                    setattr(parent, name, Int8Linear(codes, scheme, child.bias))
                else:
                    setattr(parent, name, PackedLinear.from_linear(child, scheme))
    return model


@torch.inference_mode()
def speed(model, prompt, tokens, repeats):
    """Best of `repeats`: tokens per second of prefill and of decoding."""
    best = [0.0, 0.0]
    for _ in range(repeats):
        start = time.perf_counter()
        out = model(prompt, use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        token = out.logits[:, -1:].argmax(-1)
        for _ in range(tokens):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        end = time.perf_counter()
        best = [max(best[0], prompt.shape[1] / (middle - start)),
                max(best[1], tokens / (end - middle))]  # fmt: skip
    return {"prefill": best[0], "decode": best[1]}


@torch.inference_mode()
def check():
    ids = torch.arange(9)[None]
    model, packed = build(TINY, torch.float32), pack(build(TINY, torch.float32), "w4a16g128")
    for name, m in model.named_modules():
        if type(m) is nn.Linear:
            m.weight.copy_(packed.get_submodule(name).weight)
    close(packed(ids).logits, model(ids).logits, 1e-4)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    check()
    prompt = torch.randint(0, SHAPE["vocab_size"], (1, a.prompt))
    found = {}

    def measure(label, model):
        found[label] = speed(model, prompt, a.tokens, a.repeats)
        rate = found[label]
        print(f"{label:12} prefill {rate['prefill']:7.1f}  decode {rate['decode']:6.2f} tok/s",
              flush=True)  # fmt: skip

    print(f"# {_C.isa()}, {a.threads} threads, load {os.getloadavg()[0]:.1f}", flush=True)
    model = build(SHAPE, torch.float32)
    measure("fp32", model)
    measure("W4A16 fp32", pack(model, "w4a16g128"))
    del model
    measure("W4A8 fp32", pack(build(SHAPE, torch.float32), "w4a8g128asym", integer=True))
    model = build(SHAPE, torch.bfloat16)
    measure("bf16", model)
    measure("W4A16 bf16", pack(model, "w4a16g128"))
    best = max(found["W4A16 fp32"]["decode"], found["W4A16 bf16"]["decode"])
    ratios = {
        "decode / fp32 (bar 6)": found["W4A16 fp32"]["decode"] / found["fp32"]["decode"],
        "decode / bf16 (bar 2)": best / found["bf16"]["decode"],
        "prefill / fp32 (bar 1)": found["W4A16 fp32"]["prefill"] / found["fp32"]["prefill"],
    }
    for name, ratio in ratios.items():
        print(f"{name:24} {ratio:.2f}")
    if a.json:
        with open(a.json, "w") as f:
            json.dump({"isa": _C.isa(), "threads": a.threads, "tok/s": found, "ratios": ratios}, f)


if __name__ == "__main__":
    main()
