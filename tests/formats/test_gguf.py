import numpy
import pytest
import torch
from shared_models import quantized
from strategies import dequantize, random_codes

from fewbit.checkpoint import save
from fewbit.errors import UnsupportedError
from fewbit.export_gguf import export
from fewbit.families import linear_names
from fewbit.formats.gguf import blocks, refuse
from fewbit.scheme import Scheme

gguf = pytest.importorskip("gguf", reason="the gguf package is in the dev extra")
KINDS = gguf.GGMLQuantizationType
LAYERS = "model.layers."


def there(codes, scheme, **options):
    """The weight as the gguf package dequantises our blocks."""
    kind, data = blocks(codes, scheme, **options)
    return kind, torch.from_numpy(gguf.dequantize(data.numpy(), KINDS[kind]))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_symmetric_grids_are_exact(bits, group_size):
    scheme = Scheme(bits, group_size, True)
    codes = random_codes(5, 192, scheme)
    kind, weight = there(codes, scheme)
    assert kind == ("Q4_0" if bits <= 4 else "Q8_0")
    assert torch.equal(weight.double(), dequantize(codes, scheme))


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_asymmetric_grids_up_to_seven_bits_are_exact_in_q8_0(bits):
    scheme = Scheme(bits, 32)
    codes = random_codes(5, 96, scheme)
    kind, weight = there(codes, scheme)
    assert kind == "Q8_0" and torch.equal(weight.double(), dequantize(codes, scheme))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_asymmetric_four_bits_round_the_minimum_only_when_allowed(bits):
    scheme = Scheme(bits, 32)
    codes = random_codes(5, 96, scheme)
    with pytest.raises(UnsupportedError, match="would round it here"):
        blocks(codes, scheme)
    kind, weight = there(codes, scheme, rounding=True)
    want = dequantize(codes, scheme)
    # m carries 2**-11 of |z s|; the package adds in float32.
    z, s = codes.zero_point.double(), codes.scale.double()
    bound = (z * s * 2.0**-11 + 2.0**-24 * (1 << bits) * 2 * s).repeat_interleave(32, 1)
    assert kind == "Q4_1" and bool(((weight - want).abs() <= bound).all())
    power = codes._replace(scale=torch.full_like(codes.scale, 0.25))
    assert torch.equal(there(power, scheme)[1].double(), dequantize(power, scheme))


def test_the_package_packs_the_same_bytes():
    # Its own quantiser on a weight that is on the grid, with the extreme code -8 in each block.
    scheme = Scheme(4, 32, True)
    codes = random_codes(6, 128, scheme)
    codes.q[:, ::32] = 0
    data = blocks(codes, scheme)[1].numpy()
    weight = dequantize(codes, scheme).float().numpy()
    assert numpy.array_equal(gguf.quantize(weight, KINDS.Q4_0), data)


def test_refusals():
    assert "multiples of 32" in refuse(Scheme(4, 48, True), 96)
    assert "multiples of 32" in refuse(Scheme(4, -1, True), 40)
    assert "weight only" in refuse(Scheme(8, -1, True, activation_bits=8), 64)
    assert "symmetric 8 bits" in refuse(Scheme(8, 32), 64)


@pytest.mark.parametrize("text, kind", [("w4a16g128sym", "Q4_0"), ("w8a16g64sym", "Q8_0")])
def test_a_file_holds_the_model(shared, tmp_path, text, kind):
    source = shared / "models" / "llama-tiny"
    import transformers

    model = quantized(source, text)
    save(model, tmp_path / "a", tokenizer=transformers.AutoTokenizer.from_pretrained(source))
    path = export(tmp_path / "a", tmp_path / "b")
    # float16 d, and 32 codes of 4 or 8 bits: 18 or 34 bytes a block; the rest is float.
    weights = sum(model.get_submodule(n).weight.numel() for n in linear_names(model))
    others = sum(t.nbytes for n, t in model.state_dict().items() if not n.startswith(LAYERS))
    formula = weights // 32 * {"Q4_0": 18, "Q8_0": 34}[kind] + others
    reader = gguf.GGUFReader(path)
    assert abs(sum(t.n_bytes for t in reader.tensors) - formula) <= 0.01 * formula
    tensors = {t.name: t for t in reader.tensors}
    assert len(tensors) == 4 * 9 + 3
    down = tensors["blk.2.ffn_down.weight"]
    assert down.tensor_type.name == kind
    module = model.get_submodule("model.layers.2.mlp.down_proj")
    found = torch.from_numpy(gguf.dequantize(down.data, down.tensor_type))
    assert torch.equal(found, module.weight)
    query = tensors["blk.0.attn_q.weight"]
    weight = model.get_submodule("model.layers.0.self_attn.q_proj").weight
    turned = weight.view(8, 2, 16, 256).transpose(1, 2).reshape(256, 256)
    found = torch.from_numpy(gguf.dequantize(query.data, query.tensor_type))
    assert torch.equal(found, turned)
    assert bytes(reader.fields["general.architecture"].parts[-1]).decode() == "llama"


def test_other_architectures_are_refused_and_leave_nothing(shared, tmp_path):
    save(quantized(shared / "models" / "opt-tiny", "w4a16g128sym"), tmp_path / "a")
    with pytest.raises(UnsupportedError, match="not .'OPTForCausalLM'"):
        export(tmp_path / "a", tmp_path / "b")
    save(quantized(shared / "models" / "llama-tiny", "w4a16g64asym"), tmp_path / "c")
    with pytest.raises(Exception, match="tokenizer.json|would round"):
        export(tmp_path / "c", tmp_path / "d")
    assert not list((tmp_path / "d").glob("*"))


@pytest.mark.slow
def test_llama_cpp_continues_a_text_as_we_do(shared, tmp_path):
    cpp = pytest.importorskip("xllamacpp", reason="llama.cpp's bindings are not installed")
    import transformers

    source = shared / "models" / "llama-tiny"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = quantized(source, "w4a16g128sym", torch.float32)
    save(model, tmp_path / "a", tokenizer=tokenizer)
    path = export(tmp_path / "a", tmp_path / "b")
    ids = tokenizer("It was the best of times and the", return_tensors="pt").input_ids
    ours = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    params = cpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup = str(path), 256, False
    answer = cpp.Server(params).handle_completions(
        {"prompt": ids[0].tolist(), "n_predict": 12, "temperature": 0}
    )
    assert answer["choices"][0]["text"] == tokenizer.decode(ours)
