import json
import os
import subprocess
import sys

import pytest
import torch
from directories import LAYERS, SHAPES, read_codes, write_model
from strategies import random_codes, same

from fewbit import formats
from fewbit.conversion import convert
from fewbit.engines import Facts, validate
from fewbit.errors import OutputError, UnsupportedError
from fewbit.scheme import Scheme
from fewbit.shards import INDEX, Shards, Writer

SYM4, ASYM4 = Scheme(4, 32, True), Scheme(4, 32, False)
SYM8 = Scheme(8, -1, True, "float16", activation_bits=8)
FOUR = ["compressed-tensors", "awq", "gptq", "gptq_v2", "fewbit"]
EIGHT = ["int-quantized", "llm-int8", "smooth_quant", "fewbit"]
PAIRS = [(a, b, s) for a in FOUR for b in FOUR for s in (SYM4, ASYM4)]
PAIRS += [(a, b, SYM8) for a in EIGHT for b in EIGHT]


@pytest.mark.parametrize("source, target, scheme", PAIRS, ids=str)
def test_every_pair_is_lossless(tmp_path, source, target, scheme):
    codes = write_model(tmp_path / "a", source, scheme)
    report = convert(tmp_path / "a", tmp_path / "b", target, max_shard_size=20_000)
    found, plan = read_codes(tmp_path / "b")
    assert plan.format.name == target and report.modules == len(LAYERS)
    for name in LAYERS:  # LLM.int8() and smooth_quant hold float32 scales
        want = codes[name]._replace(scale=codes[name].scale.to(found[name].scale.dtype))
        assert same(found[name], want), name
    assert (tmp_path / "b" / "merges.txt").read_bytes() == b"a b\n"
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["tie_word_embeddings"] is True
    a, b = Shards(tmp_path / "a"), Shards(tmp_path / "b")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(a.read(name), b.read(name))
    # What is symmetric in effect is written so, and the tensors of a Linear share a shard.
    assert plan.scheme_of(LAYERS[0]).symmetric is (scheme.symmetric and target != "awq")
    homes = {e.file for n, e in b.entries.items() if n.startswith(LAYERS[0])}
    assert len(homes) == 1 and len({e.file for e in b.entries.values()}) > 1


@pytest.mark.parametrize(
    "scheme, target, why",
    [
        (Scheme(3, 32), "awq", "layers.0.mlp.down_proj does not fit into awq: AWQ stores 4-bit"),
        (Scheme(5, 32), "gptq", "2, 3, 4 or 8-bit"),
        (ASYM4, "int-quantized", "8-bit symmetric"),
        (ASYM4, "awq-gemv", "not known"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, scheme, target, why):
    write_model(tmp_path / "a", "compressed-tensors", scheme)
    with pytest.raises(UnsupportedError, match=why):
        convert(tmp_path / "a", tmp_path / "b", target)
    assert not (tmp_path / "b").exists()


def test_a_refusal_in_the_middle_leaves_nothing_behind(tmp_path):
    write_model(tmp_path / "a", "awq", ASYM4, low=0)
    with pytest.raises(UnsupportedError, match="down_proj: GPTQ v1 cannot hold a zero point of 0"):
        convert(tmp_path / "a", tmp_path / "b", "gptq", max_shard_size=5_000)
    assert not (tmp_path / "b").exists()


def test_never_onto_the_source(tmp_path):
    write_model(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for target in (tmp_path / "a", tmp_path / "link", tmp_path / "a" / ".." / "a"):
        with pytest.raises(OutputError, match="is the source directory"):
            convert(tmp_path / "a", target, "awq")
    (tmp_path / "hard").mkdir()
    os.link(tmp_path / "a" / "model.safetensors", tmp_path / "hard" / "model.safetensors")
    with pytest.raises(OutputError, match="is the same file as"):
        convert(tmp_path / "a", tmp_path / "hard", "awq")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}


def test_a_second_save_leaves_no_stale_shards(tmp_path):
    write_model(tmp_path / "a", max_shard_size=5_000)
    assert (tmp_path / "a" / INDEX).exists()
    write_model(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
    ]
    read_codes(tmp_path / "a")


def test_shards_stay_below_the_limit_and_the_index_adds_up(tmp_path):
    with Writer(tmp_path, 1000) as writer:
        for i in range(10):
            writer.add({f"t{i}": torch.full((100,), i, dtype=torch.int32)})
        files = writer.finish({})
    assert files[:2] == ["model-00001-of-00005.safetensors", "model-00002-of-00005.safetensors"]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4000
    shards = Shards(tmp_path)
    assert all(int(shards.read(f"t{i}")[0]) == i for i in range(10))


def facts(format, scheme, shape=(256, 256), skipped=(), **other):
    schemes = {"model.layers.0.self_attn.q_proj": scheme, **other}
    return Facts(format, schemes, dict.fromkeys(schemes, shape), skipped)


# formats.md, reader tables of 2.1, 3.5, 4.2, 4.3, 5, 6.1 and 8.
G128 = Scheme(4, 128, True)
VERDICTS = [
    (facts("awq", Scheme(4, 128)), {"vLLM", "TGI", "LMDeploy TurboMind", "LMDeploy PyTorch"}),
    (facts("awq", Scheme(4, 64)), {"vLLM", "TGI", "LMDeploy PyTorch"}),
    (
        facts("awq", G128, skipped=("model.layers.0.mlp.up_proj",)),
        {"vLLM", "LMDeploy TurboMind", "LMDeploy PyTorch"},
    ),
    (facts("gptq", G128), {"vLLM", "TGI", "LMDeploy TurboMind"}),
    (facts("gptq_v2", G128), {"vLLM"}),
    (facts("gptq", Scheme(4, 128)), {"TGI"}),
    (facts("gptq", Scheme(3, 128, True)), set()),
    (facts("gptq", Scheme(4, 16, True)), {"TGI"}),
    (facts("compressed-tensors", G128), {"vLLM", "TGI", "LMDeploy TurboMind"}),
    (facts("compressed-tensors", Scheme(4, 32)), {"vLLM", "LMDeploy TurboMind"}),
    (facts("compressed-tensors", Scheme(3, 128, True)), {"vLLM"}),
    (facts("compressed-tensors", Scheme(8, 128)), set()),
    (
        facts(
            "compressed-tensors", G128, **{"model.layers.0.self_attn.k_proj": Scheme(8, 128, True)}
        ),
        {"TGI"},
    ),
    (facts("int-quantized", SYM8), {"vLLM", "TGI"}),
    (facts("smooth_quant", SYM8), {"LMDeploy PyTorch"}),
    (facts("llm-int8", SYM8), set()),
    (facts("gguf", G128), {"llama.cpp"}),
    (facts("fewbit", Scheme(4, 100)), set()),
]


@pytest.mark.parametrize("case, engines", VERDICTS, ids=str)
def test_verdicts_follow_the_engines_rules(case, engines):
    found = validate(case)
    assert {v.engine for v in found if v.loads} == engines | {"transformers"}
    for verdict in found:
        assert str(verdict).startswith(f"{verdict.engine}: " + ("loads" if verdict.loads else "re"))
        assert verdict.loads or verdict.reason


@pytest.mark.parametrize(
    "case, note",
    [
        (facts("compressed-tensors", G128, (256, 256)), ""),
        (facts("compressed-tensors", G128, (192, 256)), "1 layers off the 128 x 64 grid"),
        (facts("int-quantized", SYM8, (48, 48)), ""),
        (facts("int-quantized", SYM8, (40, 48)), "1 layers off the 16 x 16 grid"),
    ],
    ids=str,
)
def test_vllm_says_which_shapes_run_slower(case, note):
    verdict = next(v for v in validate(case) if v.engine == "vLLM")
    assert verdict.loads and (note in verdict.reason if note else not verdict.reason)


BIG = """
import resource, sys
from pathlib import Path
import fewbit
from fewbit.conversion import convert

def data():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmData")).split()[1])

source, target, to, room = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_DATA, (data() + int(room),) * 2)
print(convert(source, target, to, max_shard_size=16 << 20).nbytes)
"""


def test_one_shard_at_a_time(tmp_path):
    """256 MiB of tensors pass through a process that may not allocate half of that."""
    scheme, target = Scheme(8, -1, True, "float16", activation_bits=8), formats.get("int-quantized")
    codes = random_codes(2048, 2048, scheme)
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(64)]
    with Writer(tmp_path / "a", 16 << 20) as writer:
        for name in names:
            packed = target.pack(codes, scheme)
            writer.add({f"{name}.{suffix}": tensor for suffix, tensor in packed.items()})
        section = target.config(dict.fromkeys(names, scheme), [])
        writer.finish({"model_type": "llama", "quantization_config": section})
    command = [sys.executable, "-c", BIG, tmp_path / "a", tmp_path / "b", "smooth_quant"]
    command.append(str(112 << 20))  # stacks of threads, 8 MiB each, count as well
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 256 << 20
    found, _ = read_codes(tmp_path / "b")
    assert len(found) == 64 and torch.equal(found[names[-1]].q, codes.q)


def test_static_scales_are_kept_or_refused(tmp_path):
    scheme = Scheme(
        8, -1, True, activation_bits=8, activations="static", symmetric_activations=False
    )
    target = formats.get("int-quantized")
    extras = {"input_scale": torch.tensor([0.5]), "input_zero_point": torch.tensor([3]).char()}
    with Writer(tmp_path / "a") as writer:
        for i, name in enumerate(LAYERS):
            packed = target.pack(random_codes(*SHAPES[name], scheme, i), scheme, **extras)
            writer.add({f"{name}.{suffix}": tensor for suffix, tensor in packed.items()})
        section = target.config(dict.fromkeys(LAYERS, scheme), [])
        writer.finish({"quantization_config": section})
    convert(tmp_path / "a", tmp_path / "b", "fewbit")
    convert(tmp_path / "b", tmp_path / "c", "int-quantized")
    a, c = Shards(tmp_path / "a"), Shards(tmp_path / "c")
    assert all(torch.equal(a.read(n), c.read(n)) for n in a.entries) and len(a.entries) > 40
    with pytest.raises(UnsupportedError, match="scaled per token"):
        convert(tmp_path / "a", tmp_path / "d", "llm-int8")
