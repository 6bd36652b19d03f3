"""F17, F19 to F25: calibration, quantised input, folds, hostile files, offline, other libraries."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sweep import METHODS, quantize

import fewbit
from fewbit import _C, calibrate
from fewbit.certificate import Probe
from fewbit.errors import (
    CalibrationError,
    CheckpointError,
    TransformError,
    UnsupportedError,
    UsageError,
)
from fewbit.families import decoder_layers, describe
from fewbit.shards import INDEX, Shards
from fewbit.transforms.fold import FoldNorm
from tiny import probe, tiny

ROOT = Path(__file__).resolve().parent.parent.parent


def stats(model, data):
    family = describe(model)
    inputs = calibrate.capture(model, family, calibrate.windows(data))
    return calibrate.collect(decoder_layers(model)[0], family, inputs)[0]


def test_f17_padding_and_batching_do_not_change_statistics():
    """In float64 to 1e-12: the sums' own float32 is given up for the comparison."""
    model, ids = tiny("llama-gqa", torch.float64), probe(batch=3, tokens=12)
    layer, family = decoder_layers(model)[0], describe(model)

    def gram(data):
        """X^T X of the last linear's real inputs."""
        rows, masks = [], []
        handle = layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args: rows.append(args[0].flatten(0, 1))
        )
        for x in calibrate.capture(model, family, calibrate.windows(data)):
            masks.append(torch.ones(x.hidden.shape[:2]).bool() if x.mask is None else x.mask)
            calibrate.forward(layer, x)
        handle.remove()
        x = torch.cat([r[m.flatten()] for r, m in zip(rows, masks, strict=True)])
        return x.T @ x

    padded = torch.nn.functional.pad(ids, (0, 4), value=1)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 4))
    apart = gram(list(ids.split(1)))
    for form in ([ids], [{"input_ids": padded, "attention_mask": mask}]):
        torch.testing.assert_close(gram(form), apart, rtol=1e-12, atol=1e-12)
    for form in (list(ids.split(1)), [{"input_ids": padded, "attention_mask": mask}]):
        assert all(s.tokens == 36 for s in stats(tiny("llama-gqa"), form).values())


@pytest.mark.parametrize(
    "calibration, message",
    [
        (None, "this method needs calibration"),
        ([], "the calibration input is empty"),
        ([[]], "calibration sample 0 (holds no tokens|is not token ids)"),
        ("a few words\n", "too short"),
        ("missing.txt", "does not exist"),
    ],
)
def test_f17_empty_calibration_is_refused_before_the_work(tmp_path, calibration, message):
    import transformers
    from tokenizers import Tokenizer, models

    tiny("opt").save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({"a": 0, "few": 1, "words": 2, "?": 3}, unk_token="?"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "model")
    with pytest.raises(CalibrationError, match=message):
        fewbit.quantize_directory(
            tmp_path / "model", tmp_path / "out", "awq", "w4a16g8", calibration, progress=False
        )
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_f19_a_quantised_model_is_refused_with_what_was_found(tmp_path):
    tiny("llama-gqa").save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out", "rtn")
    with pytest.raises(UsageError, match="already quantised .quant_method 'compressed-tensors'"):
        quantize(tmp_path / "out", tmp_path / "again", "rtn")
    model = tiny("opt")
    fewbit.quantize_(model, "rtn", "w4a16g16", progress=False)
    with pytest.raises(UsageError, match="already quantised"):
        fewbit.quantize_(model, "rtn", "w4a16g16", progress=False)


def test_f19_a_mislabelled_model_is_refused_by_its_types(tmp_path):
    """Eight-bit weights under a config that does not mention them."""
    tiny("llama-gqa").save_pretrained(tmp_path / "model")
    shards = Shards(tmp_path / "model")
    tensors = {n: shards.read(n).clone() for n in shards.entries}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"{name} is stored as .* quantised already"):
        quantize(tmp_path / "model", tmp_path / "out", "rtn")


@pytest.mark.parametrize("method", METHODS)
def test_f19_no_method_changes_a_quantised_model(method):
    model = tiny("llama-gqa")
    fewbit.quantize_(model, "rtn", "w4a16g8", progress=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError, match="already quantised"):
        fewbit.quantize_(model, method, METHODS[method], probe(2, 8), progress=False)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_f19_a_model_is_rotated_once():
    model = tiny("llama-gqa")
    fewbit.quantize_(model, "quarot", "w4a16g16", progress=False)
    fewbit.restore_(model)
    from fewbit.rotation import apply_
    from fewbit.transforms.rotate import Rotate

    apply_(model, Rotate())
    with pytest.raises(UsageError, match="rotated already"):
        apply_(model, Rotate())


def test_f20_a_fold_that_changes_the_model_is_an_error(monkeypatch):
    """Gemma's norms multiply by 1 + w: folded as plain gains they give another model."""
    from dataclasses import replace

    model = tiny("gemma")
    family = replace(describe(model), unit_offset=False)
    transform = FoldNorm()
    with torch.no_grad(), pytest.raises(TransformError, match="computes something else after"):
        probing = Probe(model, family, [transform], None)
        transform.outside(model, family)
        probing.outside(model)


def test_f20_an_unknown_architecture_is_refused():
    with pytest.raises(UnsupportedError, match="no family describes Sequential"):
        fewbit.quantize_(torch.nn.Sequential(torch.nn.Linear(4, 4)), "rtn", progress=False)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "C:\\x.safetensors", "a/b.safetensors", "x\0", ".."]
)
def test_f21_names_in_an_index_never_become_paths(tmp_path, name):
    tiny("opt").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError):
        quantize(tmp_path / "model", tmp_path / "out", "rtn")
    assert not (tmp_path / "out").exists()


def test_f22_no_pickle_and_no_remote_code(tmp_path):
    for path in (ROOT / "python").rglob("*.py"):
        for forbidden in ("torch.load(", "import pickle", "trust_remote_code=True"):
            assert forbidden not in path.read_text(), (path, forbidden)
    model = tiny("opt")
    model.save_pretrained(tmp_path / "model")
    os.rename(tmp_path / "model" / "model.safetensors", tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights"):
        quantize(tmp_path / "model", tmp_path / "out", "rtn")


@pytest.mark.parametrize(
    "change",
    [
        {"num_bits": 0}, {"num_bits": 10**9}, {"group_size": -7}, {"group_size": 10**9},
        {"num_bits": "four"}, {"num_bits": 8},
    ],
)
def test_f23_hostile_configs_are_a_sentence(tmp_path, change):
    tiny("llama-gqa").save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out", "rtn")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises((CheckpointError, UnsupportedError)):
        fewbit.load(tmp_path / "out")


OFFLINE = """
import socket, sys
def refuse(*a, **k): raise SystemExit("a connection was tried")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from pathlib import Path
from sweep import quantize
import fewbit
quantize(Path(sys.argv[1]), Path(sys.argv[2]), "awq")
fewbit.load(sys.argv[2])
"""


def test_f24_nothing_is_looked_up_on_the_network(tmp_path):
    tiny("llama-gqa").save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", OFFLINE, str(tmp_path / "model"), str(tmp_path / "out")]
    alone = ["unshare", "-rn"]  # without routes, where the system lets us
    if shutil.which("unshare") and subprocess.run([*alone, "true"]).returncode == 0:
        command = [*alone, *command]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_f25_the_binding_uses_the_stable_abi_only():
    """What a later torch may change is not used: one binary serves torch 2.10 and up."""
    for path in (ROOT / "cpp" / "bindings").iterdir():
        for name in re.findall(r'#include\s+[<"]((?:torch|ATen|c10)/[^>"]+)', path.read_text()):
            assert name.startswith(("torch/csrc/stable/", "torch/headeronly/")), (path, name)
    assert "torch>=2.10" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_f25_the_binary_asks_torch_for_c_functions_only():
    """No name of a C++ function of torch is open in it: their meaning changes between versions."""
    names = subprocess.run(["nm", "-D", "-u", _C.__file__], capture_output=True, text=True)
    wanted = [line.split()[-1].split("@")[0] for line in names.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in wanted)
    assert not [name for name in wanted if re.match(r"_ZN?K?(2at|3c10|5torch|6caffe2)", name)]


OTHER = """
import torch
from fewbit import ops
w, x, g = torch.randn(48, 64), torch.randn(7, 64), torch.zeros(64, 64)
codes = ops.quantize(w, 4, 16)
y = ops.w4a16_linear(x, *ops.pack(*codes, 4, 16), None, 48, 4, 16)
ops.gram(x, g)
assert torch.allclose(y, x @ ops.dequantize(*codes, 16).T, atol=1e-4)
assert torch.allclose(g, x.T @ x, atol=1e-4)
"""


@pytest.mark.slow
def test_f25_the_same_binary_runs_with_other_releases_of_torch():
    """FEWBIT_OTHER_TORCH: interpreters of this Python version, each with a torch of its own."""
    others = os.environ.get("FEWBIT_OTHER_TORCH", "").split()
    if not others:
        pytest.skip("FEWBIT_OTHER_TORCH names no interpreter with another torch")
    for python in others:
        ask = [python, "-c", "import torch; print(torch.__version__)"]
        version = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
        assert version != torch.__version__
        done = subprocess.run([python, "-c", OTHER], capture_output=True, text=True)
        if tuple(map(int, version.split(".")[:2])) >= (2, 10):
            assert done.returncode == 0, (version, done.stderr)
        else:
            last = done.stderr.splitlines()[-1]
            assert done.returncode == 1 and "[FB600]" in last, done.stderr
            assert f"with torch {version}, which must be 2.10 or newer" in last


BROKEN = """
import sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "fewbit._C":
            raise ImportError("undefined symbol: aoti_torch_something_new")
sys.meta_path.insert(0, Finder())
import fewbit
"""


def test_f25_a_torch_that_does_not_fit_is_one_sentence():
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "the native module does not load with torch" in last
    assert "must be 2.10 or newer" in last and "[FB600]" in last
