"""from_pretrained, generate, pipeline and save_pretrained on directories of every kind."""

import json
import subprocess
import sys

import pytest
import torch
from shared_models import quantized, tokens

transformers = pytest.importorskip("transformers")

from fewbit import integrations  # noqa: E402
from fewbit.checkpoint import save  # noqa: E402
from fewbit.conversion import convert  # noqa: E402
from fewbit.errors import CheckpointError  # noqa: E402
from fewbit.linear import PackedLinear  # noqa: E402
from fewbit.shards import Shards  # noqa: E402

integrations.install()
CASES = [
    ("compressed-tensors", "w4a16g128sym"),
    ("compressed-tensors", "w3a16g64asym"),
    ("awq", "w4a16g128asym"),
    ("gptq", "w4a16g128sym"),
    ("gptq_v2", "w2a16g64asym"),
    ("fewbit", "w5a16g100asym"),
]


@pytest.mark.parametrize("name", ["llama-tiny", "opt-tiny"])
@pytest.mark.parametrize("format, scheme", CASES)
def test_logits_are_those_of_the_model_that_was_saved(shared, tmp_path, name, format, scheme):
    model = quantized(shared / "models" / name, scheme)
    want = model(tokens()).logits
    save(model, tmp_path / "a", format, max_shard_size=2_000_000)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert sum(isinstance(m, PackedLinear) for m in loaded.modules()) >= 24
    assert torch.equal(loaded(tokens()).logits, want)
    # And what the loaded model saves is the same again.
    loaded.save_pretrained(tmp_path / "b")
    a, b = Shards(tmp_path / "a"), Shards(tmp_path / "b")
    assert a.entries.keys() == b.entries.keys()
    assert all(torch.equal(a.read(n), b.read(n)) for n in a.by_file())
    section = [json.loads((tmp_path / d / "config.json").read_text()) for d in "ab"]
    assert section[0]["quantization_config"] == section[1]["quantization_config"]


SCRIPT = """
import sys
import fewbit
assert "transformers" not in sys.modules
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
path = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
ids = tokenizer("It was the best of", return_tensors="pt")
print(model.generate(**ids, max_new_tokens=8, do_sample=False)[0].tolist())
generate = pipeline("text-generation", model=path)
print(generate("It was", max_new_tokens=4, do_sample=False)[0]["generated_text"])
assert "gptqmodel" not in sys.modules and "compressed_tensors" not in sys.modules
"""


@pytest.mark.parametrize("format", ["compressed-tensors", "awq", "gptq", "fewbit"])
def test_a_fresh_process_needs_only_import_fewbit(shared, tmp_path, format):
    source = shared / "models" / "llama-tiny"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    save(quantized(source, "w4a16g128sym"), tmp_path, format, tokenizer)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads(done.stdout.splitlines()[0])) > 8


def test_a_base_model_finds_its_linears(shared, tmp_path):
    save(quantized(shared / "models" / "llama-tiny", "w4a16g128sym"), tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    full = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    want = full.model(tokens()).last_hidden_state
    assert torch.equal(base(tokens()).last_hidden_state, want)


def test_damage_is_a_checkpoint_error(shared, tmp_path):
    save(quantized(shared / "models" / "llama-tiny", "w4a16g128sym"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value, why in [
        ("intermediate_size", 1024, "the model has"),
        ("quantization_config", {"quant_method": "fewbit", "version": 1, "groups": []}, "scheme"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match=why):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_converted_directories_load_too(shared, tmp_path):
    model = quantized(shared / "models" / "opt-tiny", "w4a16g128sym")
    want = model(tokens()).logits
    save(model, tmp_path / "0", "gptq")
    for i, format in enumerate(["awq", "compressed-tensors", "gptq_v2", "fewbit", "gptq"]):
        convert(tmp_path / str(i), tmp_path / str(i + 1), format)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(i + 1))
        assert torch.equal(loaded(tokens()).logits, want), format


def test_unregister_gives_transformers_its_loaders_back():
    from transformers.quantizers import auto

    from fewbit.integrations import hf

    assert auto.AUTO_QUANTIZER_MAPPING["awq"] is hf.FewbitQuantizer
    hf.unregister()
    try:
        assert auto.AUTO_QUANTIZER_MAPPING["awq"] is not hf.FewbitQuantizer
        assert "fewbit" not in auto.AUTO_QUANTIZER_MAPPING
    finally:
        hf.register()
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is hf.FewbitQuantizer
