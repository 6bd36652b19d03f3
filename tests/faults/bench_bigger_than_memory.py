"""A random Llama-shaped checkpoint, quantised under a memory limit: peak, plan and time.

    python tests/faults/bench_bigger_than_memory.py FOLDER --gigabytes 8 --memory 3GiB
    python tests/faults/bench_bigger_than_memory.py FOLDER --method gptq --calibration TEXT

Writes the checkpoint to FOLDER/model (and deletes it with --clean), runs ``fewbit quantize`` with
``--memory`` in a process whose data the kernel limits to the same number of bytes (RLIMIT_DATA:
memory that is neither code nor a mapped file), and prints measured against planned. What else is
given goes to ``fewbit quantize``; the model has the demo model's tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from fewbit.demo import MODEL_DIR

HIDDEN, INNER, VOCABULARY, HEADS = 4096, 11008, 32000, 32
LAYER = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN


def generate(folder: Path, gigabytes: float) -> int:
    """bfloat16 weights of ``gigabytes`` GiB in shards of one layer each; returns the layers."""
    layers = round((gigabytes * 2**30 / 2 - 2 * VOCABULARY * HIDDEN) / LAYER)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).bfloat16()

    where, total = {}, 0

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        name = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))
        total += sum(t.nbytes for t in tensors.values())

    shard(0, {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
        "lm_head.weight": random(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
    })  # fmt: skip
    sizes = {f"self_attn.{p}_proj": (HIDDEN, HIDDEN) for p in "qkvo"}
    sizes |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN)}
    sizes |= {"mlp.down_proj": (HIDDEN, INNER)}
    base = {path: random(*size) for path, size in sizes.items()}
    for i in range(layers):
        tensors = {f"model.layers.{i}.{p}.weight": w.roll(i + 1, 0) for p, w in base.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        shard(i + 1, tensors)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "vocab_size": VOCABULARY, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "dtype": "bfloat16", "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder)
    print(f"{layers} layers, {total / 2**30:.2f} GiB in {folder}", flush=True)
    return layers


def memory(pid: int) -> dict[str, int]:
    """Bytes by the names in /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    return {k: int(v) * 1024 for k, v in re.findall(r"(Vm\w+|Rss\w+):\s+(\d+) kB", text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--memory", default="3GiB")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--clean", action="store_true")
    options, more = parser.parse_known_args()
    model, out = options.folder / "model", options.folder / "out"
    if not model.exists():
        generate(model, options.gigabytes)
    limit = int(float(options.memory.removesuffix("GiB")) * 2**30)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [
        sys.executable, "-m", "fewbit", "quantize", str(model), "-o", str(out), "--method",
        options.method, "--memory", options.memory, *more,
    ]  # fmt: skip
    started = time.monotonic()
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=limited)
    peaks: list[int] = []
    lines: list[str] = []

    def read() -> None:
        for line in run.stderr:
            print(line, end="", flush=True)
            lines.append(line)
            if line.startswith("layer "):
                peaks.append(sizes.get("VmHWM", 0))
                with open(f"/proc/{run.pid}/clear_refs", "w") as file:
                    file.write("5")  # a fresh peak for the next layer

    thread = threading.Thread(target=read)
    sizes: dict[str, int] = {}
    thread.start()
    top = 0
    while run.poll() is None:
        try:
            sizes.update(memory(run.pid))
        except (OSError, ProcessLookupError):
            break
        top = max(top, sizes.get("VmHWM", 0))
        time.sleep(0.05)
    code = run.wait()
    thread.join()
    seconds = time.monotonic() - started
    text = "".join(lines)
    planned = re.search(r"plan\s+([\d,]+) MiB of memory.*?, ([\d,]+) (s|min)", text)
    print(f"exit code {code}, limit {limit / 2**20:,.0f} MiB")
    if planned:
        want, unit = float(planned[1].replace(",", "")), 60 if planned[3] == "min" else 1
        guess = float(planned[2].replace(",", "")) * unit
        print(f"peak {top / 2**20:,.0f} MiB, planned {want:,.0f} ({top / 2**20 / want - 1:+.1%})")
        print(f"time {seconds:,.0f} s, planned {guess:,.0f} ({seconds / guess - 1:+.1%})")
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"processor time {used.ru_utime + used.ru_stime:,.0f} s")
    flat = peaks[1:]
    if flat:
        low, high = min(flat) / 2**20, max(flat) / 2**20
        print(f"peak by layer {low:,.0f} to {high:,.0f} MiB ({high / low - 1:.1%})")
    if options.clean:
        shutil.rmtree(model)
        shutil.rmtree(out, ignore_errors=True)
    sys.exit(code or os.EX_OK)


if __name__ == "__main__":
    main()
