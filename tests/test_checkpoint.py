"""save and load: the same logits bit for bit, in a new process too, and nothing half-written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import fewbit
from fewbit.errors import CheckpointError, NotQuantizedError, UnsupportedError, UsageError
from fewbit.scheme import Scheme
from tiny import probe, tiny

HERE = Path(__file__).parent


def quantized(name, scheme="w4a16g8"):
    model = tiny(name)
    fewbit.quantize_(model, "rtn", scheme, progress=False)
    return model


@pytest.mark.parametrize("scheme", ["w4a16g8", "w8a16g8sym", "w3a16g-1"])
@pytest.mark.parametrize("name", ["opt", "llama-gqa", "llama-mha-bias", "llama-tied-64"])
def test_round_trip_bit_for_bit(tmp_path, name, scheme):
    model = quantized(name, scheme)
    fewbit.save(model, tmp_path / "out")
    back = fewbit.load(tmp_path / "out")
    assert torch.equal(model(probe()).logits, back(probe()).logits)
    assert back.config.tie_word_embeddings == model.config.tie_word_embeddings


def test_sharded_and_in_a_new_process(tmp_path):
    model = quantized("llama-gqa")
    files = fewbit.save(model, tmp_path / "out", max_shard_size=20_000)
    assert "model.safetensors.index.json" in files and len(files) > 4
    torch.save(model(probe()).logits, tmp_path / "logits.pt")
    script = (
        "import sys, torch, fewbit\n"
        "from tiny import probe\n"
        "logits = fewbit.load(sys.argv[1])(probe()).logits\n"
        "assert torch.equal(logits, torch.load(sys.argv[2])), 'logits differ'\n"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "out"), str(tmp_path / "logits.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=HERE, timeout=120)
    assert done.returncode == 0, done.stderr


def test_refuses_with_nothing_written(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="nothing is quantised"):
        fewbit.save(tiny("opt"), out)
    with pytest.raises(UnsupportedError, match="format 'zip' is not known"):
        fewbit.save(quantized("opt"), out, format="zip")
    with pytest.raises(UnsupportedError, match="k_proj does not fit .* multiple of group_size 32"):
        fewbit.save(quantized("opt", "w4a16g32"), out)
    assert not out.exists()


def test_load_says_what_is_wrong(tmp_path):
    model = quantized("opt")
    fewbit.save(model, tmp_path / "a")
    with pytest.raises(CheckpointError, match="is not a model directory"):
        fewbit.load(tmp_path / "missing")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    plain = dict(config)
    del plain["quantization_config"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(plain))
    with pytest.raises(NotQuantizedError, match="is not quantised"):
        fewbit.load(tmp_path / "a")
    config["hidden_size"] = 56
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        fewbit.load(tmp_path / "a")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["opt-tiny", "llama-tiny"])
def test_shared_model_read_back_by_compressed_tensors(shared, tmp_path, name):
    """An independent reader dequantises our files to the weights that we multiply with."""
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from safetensors.torch import load_file

    from fewbit import checkpoint
    from fewbit.families import linear_names

    model = checkpoint.load_float(shared / "models" / name)
    fewbit.quantize_(model, "rtn", Scheme.parse("w4a16g128", scale_dtype="float32"), progress=False)
    fewbit.save(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    theirs = quantization.QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    for linear in linear_names(model):
        state = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.startswith(linear + ".")}
        state.pop("bias", None)
        weight = base.PackedQuantizationCompressor.decompress(state, theirs)["weight"]
        assert torch.equal(weight, model.get_submodule(linear).weight), linear


@pytest.mark.parametrize("twin", ["gpt2", "mixtral", "qwen2-moe", "qwen3-moe"])
def test_linearised_models_come_back(twin, tmp_path):
    """Conv1D and fused experts are saved as the Linears that were quantised, and read as such."""
    model = quantized(twin)
    fewbit.save(model, tmp_path / "out")
    back = fewbit.load(tmp_path / "out")
    assert torch.equal(model(probe()).logits, back(probe()).logits)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(model(probe()).logits, again(probe()).logits)
    if twin == "gpt2":
        model.save_pretrained(tmp_path / "hf")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
        assert torch.equal(model(probe()).logits, again(probe()).logits)
    else:
        with pytest.raises(UnsupportedError, match="use fewbit.save"):
            model.save_pretrained(tmp_path / "hf")
