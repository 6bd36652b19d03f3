"""fewbit.load of what other tools wrote: desc_act, bitsandbytes, old names; and live models."""

import json

import pytest
import torch
from shared_models import quantized, tokens

from fewbit import formats
from fewbit.checkpoint import load, save
from fewbit.conversion import verdicts
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.families import linear_names
from fewbit.formats.bitsandbytes import LLM_INT8
from fewbit.modules import OrderedLinear
from fewbit.scheme import Scheme
from fewbit.shards import Shards, Writer

transformers = pytest.importorskip("transformers")


def rewrite(source, target, tensors, section, drop=()):
    """Copy a directory with some tensors added or dropped and another quantization_config."""
    shards = Shards(source)
    with Writer(target) as writer:
        for name in shards.by_file():
            if name not in drop and name not in tensors:
                writer.add({name: shards.read(name)})
        writer.add(tensors)
        writer.finish({**shards.config, "quantization_config": section})


def test_desc_act_runs(shared, tmp_path):
    scheme = Scheme(4, 64, True)
    model = quantized(shared / "models" / "llama-tiny", scheme, torch.float32)
    save(model, tmp_path / "a", "gptq")
    a = Shards(tmp_path / "a")
    # Give one Linear a g_idx out of order; its true weight follows from the definition.
    name = "model.layers.1.mlp.down_proj"
    order = torch.randperm(768, generator=torch.Generator().manual_seed(0))
    g_idx = torch.empty(768, dtype=torch.int32)
    g_idx[order] = (torch.arange(768) // 64).to(torch.int32)
    section = a.config["quantization_config"] | {"desc_act": True}
    rewrite(tmp_path / "a", tmp_path / "b", {f"{name}.g_idx": g_idx}, section)
    loaded = load(tmp_path / "b")
    module = loaded.get_submodule(name)
    assert isinstance(module, OrderedLinear)
    codes = model.get_submodule(name).codes()
    group = g_idx.long()
    want = (codes.q.float() - 8) * codes.scale.float()[:, group]
    assert torch.equal(module.weight, want)
    x = torch.randn(5, 768)
    # Sums of 768 products, in whatever order: gamma_K sum |x||w|, Higham (3.5).
    bound = 768 * 2.0**-24 / (1 - 768 * 2.0**-24) * (x.abs() @ want.abs().T)
    assert bool(((module(x) - x @ want.T).abs() <= 2 * bound).all())
    with pytest.raises(UnsupportedError, match="activation order"):
        save(loaded, tmp_path / "c", "gptq")
    save(loaded, tmp_path / "d", "fewbit")
    assert torch.equal(load(tmp_path / "d")(tokens()).logits, loaded(tokens()).logits)


@pytest.mark.parametrize("kind", ["llm-int8", "nf4"])
def test_bitsandbytes_directories_load(shared, tmp_path, kind):
    source = shared / "models" / "opt-tiny"
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors, drop, want = {}, set(), {}
    for name in linear_names(model):
        weight = model.get_submodule(name).weight.detach()
        if kind == "llm-int8":
            scb = weight.abs().amax(1)
            stored = {"weight": (weight * (127 / scb[:, None])).round().to(torch.int8), "SCB": scb}
            want[name] = stored["weight"] * (scb / 127)[:, None]
        else:
            table, absmax = torch.linspace(-1, 1, 16), weight.reshape(-1, 64).abs().amax(1)
            codes = ((weight.reshape(-1, 64) / absmax[:, None] + 1) * 7.5).round().int().flatten()
            state = {"blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
            stored = {
                "weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
                "weight.absmax": absmax,
                "weight.quant_map": table,
                "weight.quant_state.bitsandbytes__nf4": torch.tensor(
                    list(json.dumps(state).encode()), dtype=torch.uint8
                ),
            }
            want[name] = (table[codes].view(-1, 64) * absmax[:, None]).view_as(weight)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in stored.items()}
        drop.add(f"{name}.weight")
    section = formats.get("llm-int8").config({"a": LLM_INT8}, ["lm_head"])
    if kind == "nf4":
        section |= {"load_in_8bit": False, "load_in_4bit": True}
    rewrite(source, tmp_path, tensors, section, drop)
    loaded = load(tmp_path)
    for name, weight in want.items():
        found = loaded.get_submodule(name).weight
        assert torch.equal(found, weight.to(found.dtype)), name
    assert loaded(tokens()).logits.isfinite().all()


def test_live_models_save_pretrained_what_they_run(shared, tmp_path):
    import fewbit

    source = shared / "models" / "llama-tiny"
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    before = model(tokens()).logits
    fewbit.quantize_(model, "rtn", scheme="w3a16g64", progress=False)
    want = model(tokens()).logits
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(load(tmp_path / "a")(tokens()).logits, want)
    fewbit.restore_(model)
    model.save_pretrained(tmp_path / "b")
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(again(tokens()).logits, before)


def test_old_names_are_ignored_and_missing_ones_are_not(shared, tmp_path):
    save(quantized(shared / "models" / "llama-tiny", "w4a16g128sym"), tmp_path / "a")
    section = Shards(tmp_path / "a").config["quantization_config"]
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    rewrite(tmp_path / "a", tmp_path / "b", old, section)
    load(tmp_path / "b")
    rewrite(tmp_path / "a", tmp_path / "c", {"model.extra.weight": torch.ones(1)}, section)
    with pytest.raises(CheckpointError, match="'model.extra.weight'"):
        load(tmp_path / "c")
    rewrite(tmp_path / "a", tmp_path / "d", {}, section, {"model.norm.weight"})
    with pytest.raises(CheckpointError, match="lacks 'model.norm.weight'"):
        load(tmp_path / "d")
    assert {v.engine for v in verdicts(tmp_path / "a") if v.loads} >= {"vLLM", "TGI"}
