"""Keys and values on their grid: in attention, and in the cache that generate() fills."""

import pytest
import torch

from fewbit.errors import UnsupportedError, UsageError
from fewbit.families import decoder_layers
from fewbit.kv import OnlineKV, attach_kv, head_dim, kv_codes, kv_values
from fewbit.kv_cache import QuantizedCache
from fewbit.pipeline import quantize_
from fewbit.recipes import Recipe
from fewbit.scheme import Scheme
from fewbit.transforms.activations import QuantizeActivations
from tiny import probe, tiny


def attached(name, **settings):
    model = tiny(name)
    for layer in decoder_layers(model):
        attach_kv(layer.self_attn, head_dim(model.config), **settings)
    return model


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_half_a_step(bits, symmetric):
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0)) + 0.5
    codes = kv_codes(x, bits, symmetric)
    # Half a step, and what rounding the scale to float16 moves the ends of the range.
    step = codes.scale.to(torch.float32)
    slack = step * 2**bits * torch.finfo(torch.float16).eps
    assert bool(((kv_values(codes, x.dtype) - x).abs() <= step / 2 + slack).all())
    assert int(codes.q.max()) < 2**bits


def test_rows_of_zeros_and_of_one_value():
    x = torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0], [-3.0, -3.0, -3.0]])
    back = kv_values(kv_codes(x, 4), x.dtype)
    assert torch.equal(back[0], x[0])
    torch.testing.assert_close(back, x, rtol=2**-10, atol=0)


@pytest.mark.parametrize("name", ["opt", "llama-gqa"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_rotation_alone_changes_nothing(name, implementation):
    model = tiny(name, torch.float64)
    model.config._attn_implementation = implementation
    before = model(probe()).logits
    for layer in decoder_layers(model):
        attach_kv(layer.self_attn, head_dim(model.config), rotate=True)
    # eager attention takes its softmax in float32
    bound = 1e-9 if implementation == "sdpa" else 2**-20
    assert float((model(probe()).logits - before).abs().max() / before.abs().max()) < bound


@pytest.mark.parametrize("name", ["opt", "llama-gqa"])
@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_cache_equals_attention(name, bits):
    """Logits through the packed cache, token by token, are those of the model without a cache."""
    model = attached(name, rotate=True, bits=bits)
    ids = probe(1, 12)
    whole = model(ids, use_cache=False).logits
    cache = QuantizedCache(model)
    steps = [model(ids[:, :7], past_key_values=cache).logits]
    steps += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(7, 12)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    plain = tiny(name)(ids).logits
    assert float((whole - plain).abs().max()) > 1e-3  # it did quantise


@torch.no_grad()
def test_cache_on_an_ordinary_model():
    """Without OnlineKV the cache turns keys back itself: same numbers, nothing to attach."""
    plain, model = tiny("llama-gqa"), attached("llama-gqa", rotate=True, bits=4)
    ids = probe(2, 9)
    cache = QuantizedCache(plain, bits=4, rotate=True)
    got = plain(ids, past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    # 2 layers, 2 kv heads, 2 x 9 tokens, 2 sides: 12 channels in 6 bytes, scale 2, zero point 1
    assert cache.nbytes() == 2 * 2 * 18 * 2 * (6 + 3)


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generate(beams):
    model = tiny("llama-gqa")
    ids = probe(2, 5)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=beams,
                         past_key_values=QuantizedCache(model, bits=8), pad_token_id=0)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=beams, pad_token_id=0)
    assert out.shape[0] == 2 and torch.equal(out[:, :6], plain[:, :6])


def test_refuses_bits():
    with pytest.raises(UsageError, match="16 .float. or in 2..8, got 9"):
        OnlineKV(8, bits=9)


@pytest.mark.parametrize("twin", ["falcon-7b", "falcon-rw", "bloom"])
@torch.no_grad()
def test_attention_of_its_own_is_refused_or_left_alone(twin):
    """Keys and values cannot be reached there; quantised activations need not touch them."""
    model, ids, last = tiny(twin), probe(), (QuantizeActivations(),)
    before = model(ids).logits
    with pytest.raises(UnsupportedError, match=f"for {type(model).__name__}: its attention"):
        quantize_(model, Recipe("kv", Scheme.parse("w8a8kv4"), last), progress=False)
    assert torch.equal(model(ids).logits, before)
    quantize_(model, Recipe("w8a8", Scheme.parse("w8a8"), last), progress=False)
    assert float((model(ids).logits - before).norm() / before.norm()) < 0.1
