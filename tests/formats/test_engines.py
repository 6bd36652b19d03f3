"""The engines that run on a CPU load our directories, and find the weights that were saved.

Each runs in a process of its own, without fewbit, as its users run it: transformers with
compressed-tensors in every test run; with bitsandbytes, and GPTQModel, where they are installed.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared_models import quantized

from fewbit.checkpoint import save
from fewbit.families import linear_names

transformers = pytest.importorskip("transformers")
SCRIPT = Path(__file__).with_name("engine_weights.py")
ENGINES = {
    "transformers": [
        ("compressed-tensors", "w4a16g128sym"),
        ("compressed-tensors", "w4a16g128asym"),
        ("int-quantized", "w8a8"),
    ],
    "bitsandbytes": [("llm-int8", "w8a8")],
    "gptqmodel": [
        ("gptq", "w4a16g128sym"),
        ("gptq", "w8a16g128sym"),
        ("gptq_v2", "w4a16g128asym"),
        ("gptq_v2", "w2a16g64asym"),
        ("awq", "w4a16g128asym"),
    ],
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["llama-tiny", "opt-tiny"])
def test_weights_are_those_that_were_saved(shared, tmp_path, name, engine):
    package = "compressed_tensors" if engine == "transformers" else engine
    if not find_spec(package):
        pytest.skip(f"{package} is not installed")
    source, want = shared / "models" / name, {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    for format, scheme in ENGINES[engine]:
        threshold = 6.0 if format == "llm-int8" else None
        model = quantized(source, scheme, torch.float16, threshold)
        folder = tmp_path / f"{format}-{scheme}"
        save(model, folder, format, tokenizer, max_shard_size=2_000_000)
        want[folder] = {n: model.get_submodule(n).weight for n in linear_names(model)}
    (tmp_path / "found").mkdir()
    done = subprocess.run(
        [sys.executable, SCRIPT, engine, tmp_path / "found", *want],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, weights in want.items():
        found = load_file(tmp_path / "found" / f"{folder.name}.safetensors")
        for linear, weight in weights.items():
            # Where the engine multiplies in float16, one rounding is its own.
            assert torch.equal(found[linear].half(), weight.half()), (folder.name, linear)
