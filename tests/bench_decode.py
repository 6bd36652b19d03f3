"""Decoded tokens per second of a Llama-type model of random weights: python tests/bench_decode.py

Hidden 2048, 16 layers, ffn 5632, 8 of 16 heads for keys, vocabulary 32000: 0.82 G weights in linear
layers, the head included. Prefill of 128 tokens, then greedy decoding, in float32, bfloat16, W4A16
and W4A8 (group 128).
llama.cpp (packages xllamacpp and gguf, left out where they are missing) runs the same shapes in its
Q4_0, blocks at random.
Bars: W4A16 decode >= 6 x float32 and >= 2 x bfloat16, prefill >= float32. The packed model's logits
are checked against the float model with the same quantised weights first.
"""

import argparse
import json
import os
import tempfile
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


def write_gguf(path, shape):
    """A file of Q4_0 blocks at random: 16 bytes of codes behind a float16 scale each."""
    import gguf
    import numpy as np

    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    hidden, ffn, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("llama")
    control = ["<unk>", "<s>", "</s>"]
    letters = [f"<0x{i:02X}>" for i in range(256)]
    words = [f"w{i}" for i in range(vocab - len(control) - len(letters))]
    writer.add_token_list(control + letters + words)
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([2, 3, 3] + [6] * len(letters) + [1] * len(words))

    def add(name, rows, columns):
        blocks = random.integers(0, 256, (rows, columns // 32, 18), dtype=np.uint8)
        blocks[:, :, :2] = np.frombuffer(np.float16(0.005).tobytes(), np.uint8)
        data = blocks.reshape(rows, -1)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    add("token_embd.weight", vocab, hidden)
    add("output.weight", vocab, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    narrow = hidden // heads * kv_heads
    for i in range(shape["num_hidden_layers"]):
        for name, rows, columns in (
            ("attn_q", hidden, hidden), ("attn_k", narrow, hidden), ("attn_v", narrow, hidden),
            ("attn_output", hidden, hidden), ("ffn_gate", ffn, hidden), ("ffn_up", ffn, hidden),
            ("ffn_down", hidden, ffn),
        ):  # fmt: skip
            add(f"blk.{i}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(shape, prompt, tokens, repeats, threads):
    """llama.cpp's own timings; None where its packages are missing."""
    try:
        import gguf  # noqa: F401
        import xllamacpp
    except ImportError as error:
        print(f"llama.cpp left out: {error} (pip install xllamacpp gguf)")
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "random.gguf")
        write_gguf(path, shape)
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx = 512
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup = False
        server = xllamacpp.Server(params)
        request = {"prompt": prompt[0].tolist(), "max_tokens": tokens, "ignore_eos": True,
                   "cache_prompt": False, "temperature": 0.0}  # fmt: skip
        found = [server.handle_completions(request)["timings"] for _ in range(repeats)]
        return {"prefill": max(t["prompt_per_second"] for t in found),
                "decode": max(t["predicted_per_second"] for t in found)}  # fmt: skip


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
        report(label, speed(model, prompt, a.tokens, a.repeats))

    def report(label, rate):
        found[label] = rate
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
    del model
    peer = llama_cpp(SHAPE, prompt, a.tokens, a.repeats, a.threads)
    if peer:
        report("llama.cpp", peer)
    best = max(found["W4A16 fp32"]["decode"], found["W4A16 bf16"]["decode"])
    ratios = {
        "decode / fp32 (bar 6)": found["W4A16 fp32"]["decode"] / found["fp32"]["decode"],
        "decode / bf16 (bar 2)": best / found["bf16"]["decode"],
        "prefill / fp32 (bar 1)": found["W4A16 fp32"]["prefill"] / found["fp32"]["prefill"],
    }
    if peer:
        ratios |= {
            "decode / llama.cpp (goal 1)": best / peer["decode"],
            "W4A8 prefill / llama.cpp (goal 1)": found["W4A8 fp32"]["prefill"] / peer["prefill"],
        }
    for name, ratio in ratios.items():
        print(f"{name:34} {ratio:.2f}")
    if a.json:
        with open(a.json, "w") as f:
            json.dump({"isa": _C.isa(), "threads": a.threads, "tok/s": found, "ratios": ratios}, f)


if __name__ == "__main__":
    main()
