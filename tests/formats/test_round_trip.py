"""Every writable format gives back the model: the same logits, in the bytes its layout says."""

import os

import pytest
import torch
from shared_models import quantized, tokens

from fewbit import integrations
from fewbit.checkpoint import load, save
from fewbit.conversion import convert
from fewbit.errors import UnsupportedError
from fewbit.families import linear_names
from fewbit.formats import WRITERS
from fewbit.linear import Int8Linear, MixedInt8Linear
from fewbit.scheme import Scheme
from fewbit.shards import Shards

transformers = pytest.importorskip("transformers")
MODELS = ["opt-tiny", "llama-tiny"]


def w8a8(activations="token", symmetric=True):
    return Scheme.parse("w8a8", activations=activations, symmetric_activations=symmetric)


# format, scheme, bits of a zero point on disk, bytes beside codes, scales and zero points.
SHAPE, ORDER = (lambda n, k: 16), (lambda n, k: 4 * k)
NOTHING, INPUT = (lambda n, k: 0), (lambda n, k: 4)
CASES = [
    ("compressed-tensors", Scheme.parse("w4a16g128sym"), 0, SHAPE),
    ("compressed-tensors", Scheme.parse("w4a16g128asym"), 4, SHAPE),
    ("compressed-tensors", Scheme.parse("w3a16g64asym"), 3, SHAPE),
    ("compressed-tensors", Scheme.parse("w8a16g-1sym"), 0, SHAPE),
    ("awq", Scheme.parse("w4a16g128asym"), 4, NOTHING),
    ("gptq", Scheme.parse("w4a16g128sym"), 4, ORDER),
    ("gptq", Scheme.parse("w8a16g128sym"), 8, ORDER),
    ("gptq_v2", Scheme.parse("w2a16g64asym"), 2, ORDER),
    ("int-quantized", w8a8(), 0, NOTHING),
    ("int-quantized", w8a8(symmetric=False), 0, NOTHING),
    ("int-quantized", w8a8("static"), 0, INPUT),
    ("int-quantized", w8a8("static", False), 0, INPUT),
    ("int-quantized", Scheme.parse("w8a16g-1sym"), 0, NOTHING),
    ("llm-int8", w8a8(), 0, NOTHING),
    ("smooth_quant", w8a8(), 0, NOTHING),
    ("fewbit", Scheme.parse("w5a16g100asym"), 5, SHAPE),
    ("fewbit", w8a8("tensor"), 0, SHAPE),
    ("fewbit", w8a8("static", False), 0, SHAPE),
]


def test_every_format_is_here():
    assert {case[0] for case in CASES} == WRITERS.keys()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format, scheme, zeros, beside", CASES)
def test_logits_and_sizes(shared, tmp_path, name, format, scheme, zeros, beside):
    threshold = 2.0 if format == "llm-int8" else None  # low enough that columns reach it
    model = quantized(shared / "models" / name, scheme, torch.float32, threshold)
    want = model(tokens()).logits
    save(model, tmp_path, format)
    loaded = load(tmp_path)
    assert torch.equal(loaded(tokens()).logits, want)

    shards, formula, stored = Shards(tmp_path), 0.0, 0
    for linear in linear_names(model):
        module, found = model.get_submodule(linear), loaded.get_submodule(linear)
        assert type(found) is type(module)
        n, k = module.out_features, module.in_features
        scales = 32 if format in ("llm-int8", "smooth_quant") else 16
        formula += n * k * scheme.bits / 8 + n * scheme.groups(k) * (scales + zeros) / 8
        formula += beside(n, k)
        names = (x for x in shards.entries if x.startswith(f"{linear}.") and x[-4:] != "bias")
        stored += sum(shards.entries[x].nbytes for x in names)
    assert abs(stored - formula) <= 0.01 * formula


@pytest.mark.parametrize("text", ["w4a16g128sym", "w8a16g64sym"])
def test_gguf_gives_the_same_logits_through_transformers(shared, tmp_path, text):
    pytest.importorskip("gguf")
    source = shared / "models" / "llama-tiny"
    model = quantized(source, text, torch.float32)
    save(model, tmp_path / "a", tokenizer=transformers.AutoTokenizer.from_pretrained(source))
    convert(tmp_path / "a", tmp_path / "b", "gguf")
    file = next((tmp_path / "b").glob("*.gguf"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    for name in linear_names(model):
        module, linear = model.get_submodule(name), loaded.get_submodule(name)
        assert torch.equal(linear.weight, module.weight), name
        model.set_submodule(name, linear)  # the sums of a float product, for both
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_the_modes_differ(shared):
    """The cases above compare different functions, not one under many names."""
    source = shared / "models" / "llama-tiny"
    modes = [w8a8(), w8a8(symmetric=False), w8a8("static"), w8a8("static", False), w8a8("tensor")]
    found = [quantized(source, mode, torch.float32)(tokens()).logits for mode in modes]
    found.append(quantized(source, w8a8(), torch.float32, 2.0)(tokens()).logits)
    for i, a in enumerate(found):
        assert not any(torch.equal(a, b) for b in found[:i])


def test_saving_refuses_what_a_format_would_lose(shared, tmp_path):
    source = shared / "models" / "llama-tiny"
    mixed = quantized(source, w8a8(), torch.float32, 6.0)
    with pytest.raises(UnsupportedError, match="turn float at a threshold"):
        save(mixed, tmp_path / "a", "int-quantized")
    with pytest.raises(UnsupportedError, match="symmetric 8-bit activations"):
        save(quantized(source, w8a8(symmetric=False)), tmp_path / "a", "smooth_quant")
    save(mixed, tmp_path / "a", "llm-int8")
    done = convert(tmp_path / "a", tmp_path / "b", "int-quantized")
    assert "outlier columns" in done.notes[0]
    assert isinstance(next(_packed(load(tmp_path / "a"))), MixedInt8Linear)
    assert isinstance(next(_packed(load(tmp_path / "b"))), Int8Linear)


@pytest.mark.parametrize(
    "scheme, threshold", [(w8a8("static", False), None), (w8a8("tensor"), None), (w8a8(), 2.0)]
)
def test_save_pretrained_of_a_live_model_loses_nothing(shared, tmp_path, scheme, threshold):
    model = quantized(shared / "models" / "llama-tiny", scheme, torch.float32, threshold)
    integrations.attach(model)
    want = model(tokens()).logits
    model.save_pretrained(tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert torch.equal(loaded(tokens()).logits, want)
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(load(tmp_path / "b")(tokens()).logits, want)


def _packed(model):
    return (model.get_submodule(name) for name in linear_names(model))


def test_files_follow_the_umask(shared, tmp_path):
    before = os.umask(0o027)
    try:
        save(quantized(shared / "models" / "opt-tiny", "w4a16g128sym"), tmp_path / "a")
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "a").iterdir()}
    assert set(modes.values()) == {0o640}, modes
