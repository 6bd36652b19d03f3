"""The errors that no other test raises: each call fails in its own place, in its own words."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbit
from fewbit import formats, hadamard, kv, lab, online, orthogonal, shards
from fewbit.checkpoint import empty_model, load_float, load_tokenizer
from fewbit.cli import main
from fewbit.errors import FewbitError
from fewbit.formats import bitsandbytes, compressed_tensors, gguf, own
from fewbit.kv_cache import QuantizedCache
from fewbit.linear import Int8Linear
from fewbit.linearise import unfuse
from fewbit.ops import quantize
from fewbit.pseudo import PseudoInt8Linear, static_scale
from fewbit.scheme import Codes, Scheme
from fewbit.solvers.clip import Clip
from fewbit.solvers.gptq import GPTQ
from fewbit.solvers.obq import OBQ
from fewbit.stats import Stats
from fewbit.transforms.fold import fold_into
from fewbit.transforms.rotate import Rotate
from fewbit.transforms.scale import SearchScale
from fewbit.transforms.spinquant import SpinQuant
from test_errors import quantized
from tiny import tiny


def codes(rows=4, columns=16):
    return Codes(*quantize(torch.randn(rows, columns), 8, -1, True))


def w8a8(**changes):
    return Scheme.parse("w8a8", **changes)


def stats(columns, gram=True):
    one = torch.ones(columns)
    return Stats(8, one, one, torch.eye(columns) if gram else None)


def edit(folder, change):
    """A quantised checkpoint whose tensors went through ``change``."""
    path = quantized(folder) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    fewbit.load(path.parent)


def named(config, model="opt"):
    made = tiny(model)
    for key, value in config.items():
        setattr(made.config, key, value)
    return made


def state(text):
    value = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return bitsandbytes._state({"weight.quant_state.bitsandbytes__nf4": value}, "a")


def hide(*packages):
    for package in packages:
        sys.modules[package] = None


PACK = compressed_tensors.PackQuantized()
CASES = {
    # arguments
    "order of a Hadamard matrix must be in 1..65536": lambda d: hadamard.hadamard_matrix(0),
    "slot must be one of": lambda d: online.attach(torch.nn.Linear(2, 2), "nowhere", None),
    'per must be "token" or "tensor"': lambda d: online.ActivationQuant(8, per="row"),
    "kv bits must be 16 (float)": lambda d: kv.OnlineKV(8, bits=1),
    "a rotation must be one of": lambda d: orthogonal.rotation(8, "spin"),
    "group_size must be -1": lambda d: fewbit.reference.resolve_group(0, 8),
    "depth must be in 0..1, got 1": lambda d: Clip(depth=1),
    "points must be in 1..1000, got 0": lambda d: SearchScale(0),
    'r3 must be "hadamard"': lambda d: Rotate(r3="random"),
    "range_steps must be in 0..100000, got -1": lambda d: SpinQuant(range_steps=-1),
    "has a symmetric grid only": lambda d: Int8Linear(
        codes(), w8a8(activations="tensor", symmetric_activations=False)
    ),
    "x_scale belongs to activations=": lambda d: PseudoInt8Linear(
        codes(), w8a8(), None, torch.ones(1)
    ),
    "max_shard_size must be at least 1": lambda d: shards.Writer(d, max_shard_size=0),
    "OBQ is for up to 512 inputs": lambda d: OBQ().solve(torch.ones(1, 600), Scheme(), stats(600)),
    "10 columns are not a multiple of group 4": lambda d: lab.pseudo_quantize_tensor(
        torch.zeros(2, 10), 4, 4, parity=True
    ),
    "method 'rtn': ": lambda d: fewbit.recipes.build("rtn", beta=3),
    "there is no error 'FB1'": lambda d: fewbit.errors.explain("FB1"),
    # calibration
    "GPTQ needs the Gram matrix": lambda d: GPTQ().solve(torch.ones(1, 8), Scheme(), None),
    "OBQ needs the Gram matrix": lambda d: OBQ().solve(torch.ones(1, 8), Scheme(), None),
    "needs Stats.cross": lambda d: GPTQ(target="gptaq").solve(torch.ones(1, 8), Scheme(), stats(8)),
    "the Hessian is zero or not finite": lambda d: OBQ().solve(
        torch.ones(1, 8), Scheme(), Stats(8, torch.ones(8), torch.ones(8), torch.zeros(8, 8))
    ),
    "need calibration: pass calibration=": lambda d: static_scale(None, 8),
    "spinquant learns from calibration": lambda d: SpinQuant().prepare(
        tiny("llama-gqa"), fewbit.families.describe(tiny("llama-gqa")), Scheme(), []
    ),
    "cannot be read: ": lambda d: fewbit.quantize_(
        tiny("opt"), "awq", calibration=d, progress=False
    ),
    "get_act_scales needs texts= or dataset_path=": lambda d: lab.get_act_scales(tiny("opt"), None),
    # directories
    "is not a model directory: it has no config.json": lambda d: empty_model(d),
    "has no tokenizer that loads": lambda d: load_tokenizer(quantized(d)),
    "is already quantised (quant_method 'fewbit')": lambda d: load_float(quantized(d)),
    "has unknown dtype": lambda d: edit(d, lambda t: t.update(extra=torch.zeros(1).cfloat())),
    "which the model does not have": lambda d: edit(d, lambda t: t.update(extra=torch.zeros(1))),
    "the model needs [97, 48]": lambda d: edit(
        d, lambda t: t.update({"lm_head.weight": torch.zeros(90, 48)})
    ),
    "only transformers models are saved": lambda d: fewbit.save(torch.nn.Linear(2, 2), d),
    # formats
    "must be two integers": lambda d: fewbit.stored._stored_columns(
        shards.Shards(_one(d, "weight_shape", torch.zeros(2))), "weight_shape", 4
    ),
    "says 5 x 8, but 4 rows are stored": lambda d: fewbit.stored._stored_columns(
        shards.Shards(_one(d, "weight_shape", torch.tensor([5, 8]))), "weight_shape", 4
    ),
    "codes need 1 words": lambda d: PACK._unpack(torch.zeros(1, 3, dtype=torch.int32), 4, 8),
    "its quant_state is not JSON": lambda d: state("{"),
    "its quant_state must be an object": lambda d: state("[1]"),
    "keeps a weight's shape in its quant_state": lambda d: bitsandbytes.Bnb4().size({}, Scheme()),
    "order is not a permutation": lambda d: own.Own().extras(
        {"order": torch.tensor([0, 0])}, Scheme()
    ),
    "needs scale and zero_point [4, 1]": lambda d: formats.get("fewbit").pack(
        codes()._replace(scale=torch.ones(4, 2)), w8a8()
    ),
    "codes must be uint8": lambda d: formats.get("fewbit").pack(
        codes()._replace(q=torch.zeros(4, 16, dtype=torch.int32)), w8a8()
    ),
    "GGUF needs inputs and group_size in multiples": lambda d: gguf.blocks(
        codes(), Scheme(8, symmetric=True)
    ),
    # models
    "is not described": lambda d: fewbit.families.describe(
        named({"num_ln_in_parallel_attn": 3}, "falcon-11b")
    ),
    "have an unknown layout": lambda d: unfuse(torch.nn.Linear(2, 2), "experts"),
    "a norm with zero gain and nonzero bias": lambda d: fold_into(
        _norm(torch.zeros(4), torch.ones(4)), [torch.nn.Linear(4, 4, bias=False)], False, False
    ),
    "QuantizedCache has no sliding window": lambda d: QuantizedCache(
        named({"sliding_window": 8}, "llama-gqa")
    ),
    "cannot carry a quantised KV": lambda d: kv._register("no-such-attention"),
}  # fmt: skip


def _norm(gain, bias):
    norm = torch.nn.LayerNorm(len(gain))
    norm.weight.data, norm.bias.data = gain, bias
    return norm


def _one(folder, name, tensor):
    (folder / "config.json").write_text("{}")
    save_file({name: tensor}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("message", CASES)
def test_raised(message, tmp_path):
    with pytest.raises(FewbitError) as caught:
        CASES[message](tmp_path)
    assert message in str(caught.value), caught.value


MISSING = {
    "transformers": [
        lambda d: load_float(d),
        lambda d: kv._register.__wrapped__("eager"),
    ],
    "matplotlib": [lambda d: fewbit.demo.run.plot({})],
    "gguf": [lambda d: fewbit.export_gguf.export(d, d)],
}


@pytest.mark.parametrize("package", MISSING)
def test_missing_packages_name_their_install_line(package, tmp_path, monkeypatch):
    import fewbit.demo.run
    import fewbit.export_gguf

    # As if it were not installed, whatever earlier tests have imported of it.
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    for call in MISSING[package]:
        with pytest.raises(fewbit.errors.MissingExtraError, match="pip install"):
            call(tmp_path)


@pytest.mark.parametrize(("arguments", "message"), [
    (["quantize", "MODEL", "-o", "FILE", "--method", "rtn"], "exists and is not a directory"),
    (["inspect", "DEMO"], "is not quantised"),
    (["quantize", "MODEL", "-o", "NEW", "--method", "rtn"], "holds no float tensors"),
    (["convert", "DEMO", "NEW", "--to", "awq"], "is not quantised"),
])
def test_command_line(arguments, message, tmp_path, capsys):
    from fewbit.demo import MODEL_DIR

    (tmp_path / "file").write_text("")
    model = _one(tmp_path, "a", torch.zeros(2, dtype=torch.int32))
    places = {"MODEL": model, "FILE": tmp_path / "file", "DEMO": MODEL_DIR, "NEW": tmp_path / "n"}
    assert main([str(places.get(a, a)) for a in arguments]) in (2, 4)
    assert message in capsys.readouterr().err
