"""quarot and spinquant through the pipeline: patched, restored, saved as ordinary weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fewbit import recipes
from fewbit.calibrate import Windows
from fewbit.checkpoint import load, save
from fewbit.errors import CalibrationError, CheckpointError, UnsupportedError, UsageError
from fewbit.families import describe
from fewbit.hadamard import plan
from fewbit.integrations import hf
from fewbit.linear import PackedLinear
from fewbit.linearise import linearise
from fewbit.online import ActivationQuant, OnlineHadamard, attach, clipped_grid, online_paths
from fewbit.orthogonal import Rotation
from fewbit.pipeline import quantize_
from fewbit.rotation import apply_
from fewbit.runtime import settings
from fewbit.scheme import Scheme
from fewbit.transforms import ranges
from fewbit.transforms.rotate import Rotate
from fewbit.transforms.spinquant import SpinQuant
from fewbit.transforms.stiefel import Stiefel
from fewbit.undo import restore_
from tiny import probe, tiny

HERE = Path(__file__).parent


def apply(model, transform):
    apply_(model, transform)
    return model


WINDOWS = Windows([probe(1, 16, seed=s) for s in range(4)])


@pytest.mark.parametrize("keeps_mean", [True, False])
@pytest.mark.parametrize("twin", ["opt", "llama-gqa"])
@torch.no_grad()
def test_restore_gives_the_original_back(twin, keeps_mean):
    model = tiny(twin)
    names = {name for name, _ in model.named_parameters()}
    before, config = model(probe()).logits, dict(vars(model.config))
    quantize_(model, "quarot", "w4a4kv4", keeps_mean=keeps_mean, progress=False)
    assert not torch.equal(model(probe()).logits, before)
    restore_(model)
    assert torch.equal(model(probe()).logits, before)
    assert {name for name, _ in model.named_parameters()} == names
    assert vars(model.config) == config
    quantize_(model, "quarot", "w4a4", progress=False)  # and a second time


@torch.no_grad()
def test_eight_bits_are_close_and_order_is_kept():
    """w8a8 after rotation stays near the float model; the packed linears carry R4 and the grid."""
    model = tiny("llama-gqa")
    before = model(probe()).logits
    quantize_(model, "quarot", "w8a8kv8", progress=False)
    # Each of the 2 layers rounds inputs, weights, keys and values to 8 bits: 2^-8 of the range,
    # about 2^-6 of the typical size; 14 linears in a row of independent errors.
    error = (model(probe()).logits - before).norm() / before.norm()
    assert 0 < float(error) < 2**-6 * 14**0.5
    down = model.model.layers[0].mlp.down_proj
    assert isinstance(down, PackedLinear) and isinstance(down.online_quant, ActivationQuant)
    assert len(online_paths(model)) == 2 * (7 + 1)  # every linear, and attention


def test_weight_only_needs_nothing_online():
    model = tiny("opt")
    quantize_(model, "quarot", "w4a16g16", progress=False)
    assert online_paths(model) == []
    assert all(m._forward_pre_hooks == {} for m in model.modules())


def test_statistics_describe_the_rotated_model():
    """A solver behind a rotation gets the Gram matrix of what the rotated, online-transformed
    weight really meets."""
    seen = []

    class Look(recipes.RTN):
        needs_stats = True

        def solve(self, weight, scheme, stats):
            seen.append((tuple(weight.shape), stats.gram))
            return super().solve(weight, scheme, stats)

    recipe = recipes.Recipe("look", Scheme(), (Rotate(r4="random-hadamard"),), Look())
    quantize_(tiny("llama-gqa"), recipe, calibration=WINDOWS, progress=False)
    grams = {}
    for shape, gram in seen:
        grams.setdefault(shape, gram)  # the first layer's: everything before it is float
    twin, inputs = apply(tiny("llama-gqa"), Rotate(r4="random-hadamard")), []
    down = twin.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda m, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for ids in WINDOWS.batches:
            twin(ids)
    want = sum(x.T @ x for x in inputs)
    # Sums of 64 products, computed twice in float32.
    assert float((want - grams[48, 88]).norm()) <= 128 * 2**-23 * float(want.norm())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_activation_grid(bits, symmetric):
    x = torch.randn(5, 40) + 0.3
    quant = ActivationQuant(bits, symmetric)
    torch.testing.assert_close(quant(x), clipped_grid(x, bits, symmetric, 1.0), rtol=1e-6, atol=0)
    clipped = ActivationQuant(bits, symmetric, clip=0.5)(x)
    assert float(clipped.max()) < float(x.max())
    for i in range(5):  # tokens do not meet
        assert torch.equal(quant(x[i]), quant(x)[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("per", ["token", "tensor"])
@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "w8a8", "w3a4g32"])
def test_quantised_activations_are_multiplied_in_integers(scheme, per, clip, dtype):
    """Against the exact float64 product of what the codes stand for: one rounding a group and one
    of the result, whatever the width; in float, hundreds of roundings are more than that."""
    scheme = Scheme.parse(scheme)
    linear = torch.nn.Linear(700, 24).requires_grad_(False)
    packed = PackedLinear.from_linear(linear, Scheme.parse(scheme, activation_bits=16))
    x = torch.randn(9, 700).to(dtype)
    x[3] = 0
    quant = ActivationQuant(scheme.activation_bits, clip=clip, per=per)
    q, s = quant.codes(x)
    assert q.dtype == torch.int8 and q.shape == x.shape and s.shape == (9,)
    top = 2 ** (scheme.activation_bits - 1)
    assert -top <= int(q.min()) and int(q.max()) < top
    torch.testing.assert_close((q * s[:, None]).to(dtype), quant(x), rtol=2e-7, atol=0)
    attach(packed, "online_quant", quant)
    exact = (q.double() * s[:, None].double()) @ packed.weight.double().T + linear.bias.double()
    error = (packed(x).double() - exact).abs().max() / exact.abs().max()
    groups = scheme.groups(700)
    unit = torch.finfo(torch.float32).eps * (groups + 2) + torch.finfo(dtype).eps / 2
    assert float(error) <= unit
    with torch.enable_grad():  # straight through, in float
        y = packed(x.float().requires_grad_())
    error = (y.detach().double() - exact).abs().max() / exact.abs().max()
    assert y.requires_grad and float(error) < 1e-2


@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "w8a4", "w4a4 per tensor", "w4a4 of 12"])
def test_a_transform_before_the_grid_runs_with_it_or_apart(scheme, clip):
    """One operator makes the codes where the grid is per token and 4-bit codes fill words."""
    text, _, how = scheme.partition(" ")
    scheme, n = Scheme.parse(text), 12 if how == "of 12" else 48
    packed = PackedLinear.from_linear(
        torch.nn.Linear(n, 24).requires_grad_(False), Scheme.parse(scheme, activation_bits=16)
    )
    signs = torch.randint(0, 2, (n,)) * 2 - 1
    transform = OnlineHadamard(Rotation(n, plan(n), signs))
    per = "tensor" if how == "per tensor" else "token"
    quant = ActivationQuant(scheme.activation_bits, clip=clip, per=per)
    attach(packed, "online_hadamard", transform)
    attach(packed, "online_quant", quant)
    x = torch.randn(2, 5, n)
    x[0, 1] = 0
    fused = packed.takes(x) == ("online_hadamard", "online_quant")
    assert fused == (text != "w8a4" and not how)
    q, s = quant.codes(transform(x).reshape(10, n))
    exact = (q.double() * s[:, None].double()) @ packed.weight.double().T + packed.bias.double()
    error = (packed(x).reshape(10, 24).double() - exact).abs().max() / exact.abs().max()
    assert packed(x).shape == (2, 5, 24) and float(error) <= 4 * torch.finfo(torch.float32).eps
    assert packed(x.bfloat16()).dtype == torch.bfloat16
    x[1, 2, 3] = float("inf")  # not hidden by codes
    seen = ~packed(x).isfinite().all(2)
    assert bool(seen[1, 2]) and int(seen.sum()) == (1 if per == "token" else 10)


def test_a_value_that_is_not_finite_is_not_hidden_by_codes():
    packed = PackedLinear.from_linear(torch.nn.Linear(64, 8), "w4a16g32")
    for clip in (1.0, 0.9):
        attach(packed, "online_quant", ActivationQuant(4, clip=clip))
        for bad in (float("nan"), float("inf")):
            x = torch.randn(3, 64)
            x[1, 5] = bad
            assert packed(x).isfinite().all(1).tolist() == [True, False, True]
            assert packed.online_quant(x).isfinite().all(1).tolist() == [True, False, True]


def test_activation_grid_passes_gradients():
    x = torch.randn(3, 8, requires_grad=True)
    ActivationQuant(4)(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8))


@pytest.mark.parametrize("optimizer", ["cayley-adam", "cayley-sgd"])
def test_stiefel_descends_and_stays_orthogonal(optimizer):
    """Find R with R = target: the loss falls and R^T R stays I to float32 rounding."""
    generator = torch.Generator().manual_seed(1)
    target = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    target[0] *= torch.det(target).sign()
    r = Stiefel(torch.eye(8), optimizer)
    losses = []
    for _ in range(150):
        loss = (r.value - target).square().sum()
        loss.backward()
        losses.append(float(loss.detach()))
        r.step(0.05)
    assert losses[-1] < 0.05 * losses[0]
    error = (r.value.detach().T @ r.value.detach() - torch.eye(8)).abs().max()
    assert float(error) <= 150 * 8 * torch.finfo(torch.float32).eps
    exact = r.result()
    assert float((exact.T @ exact - torch.eye(8)).abs().max()) < 1e-14


@pytest.mark.parametrize("keeps_mean", [True, False])
@pytest.mark.parametrize("twin", ["opt", "llama-gqa", "gpt2", "falcon-40b", "qwen2-moe"])
def test_learned_rotations_keep_the_function(twin, keeps_mean):
    model = tiny(twin, torch.float64)
    family = describe(model)
    linearise(model, family)
    before = model(probe()).logits
    spin = SpinQuant(steps=3, batch=2, range_steps=4, keeps_mean=keeps_mean, weights=True)
    spin.prepare(model, family, Scheme.parse("w4a4"), WINDOWS.batches)
    assert len(spin.losses) == 3 and isinstance(spin.r1, torch.Tensor) and len(spin.r2) == 2
    apply(model, spin)
    assert float((model(probe()).logits - before).abs().max() / before.abs().max()) < 1e-9


def test_ranges_fall_on_tokens_not_seen():
    """Fitting to half of a sample with outliers makes the other half easier too."""
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(16, 16, generator=generator)
    x = torch.randn(600, 16, generator=generator).pow(3) @ mix
    r = Stiefel(torch.eye(16), "cayley-adam")
    losses = ranges.learn(r, lambda t, m: t @ m, x[:300], 60, 0.02, generator)
    assert losses[-1] < 0.9 * losses[0]
    both = (torch.eye(16), r.value.detach())
    top = [float((x[300:] @ m).abs().amax(1).square().mean()) for m in both]
    assert top[1] < 0.95 * top[0]


def test_learning_is_deterministic_and_helps():
    """The loss of a step is noise of the rounding by a tenth: thirds of 60 steps, of two seeds."""
    first, last = 0.0, 0.0
    for seed in (0, 1):
        results = []
        for threads in (1, 2)[: 2 - seed]:
            torch.set_num_threads(threads)
            model = tiny("llama-gqa")
            spin = SpinQuant(steps=60, lr=0.02, batch=4, range_steps=4, weights=True, seed=seed)
            spin.prepare(model, describe(model), Scheme.parse("w4a4"), WINDOWS.batches)
            results.append(spin)
        assert torch.equal(results[0].r1, results[-1].r1)
        first += sum(results[0].losses[:20])
        last += sum(results[0].losses[-20:])
    assert last < 0.98 * first


def test_two_processes_learn_the_same_rotation():
    """The order of a set of strings differs between processes, and so may sums taken in it."""
    script = (
        "import hashlib\n"
        "from test_recipe_rotations import *\n"
        "spin, model = SpinQuant(steps=3, batch=2, range_steps=4), tiny('llama-gqa')\n"
        "spin.prepare(model, describe(model), Scheme.parse('w4a4'), WINDOWS.batches)\n"
        "learned = b''.join(r.numpy().tobytes() for r in (spin.r1, *spin.r2))\n"
        "print(hashlib.sha256(learned).hexdigest())\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=HERE, env=os.environ | {"PYTHONHASHSEED": n, "OMP_NUM_THREADS": n},
        )
        for n in ("1", "2")
    ]
    found = [run.communicate(timeout=120) for run in runs]
    assert all(run.returncode == 0 for run in runs), found
    assert len({digest for digest, _ in found}) == 1, found


def test_refusals():
    model = tiny("llama-gqa")
    with pytest.raises(CalibrationError, match="calibration"):
        quantize_(model, "spinquant", "w4a4", progress=False)
    with pytest.raises(UsageError, match="KV cache"):
        quantize_(model, "rtn", "w4a16kv4", progress=False)
    with pytest.raises(UsageError, match="optimizer must be one of"):
        SpinQuant(optimizer="adam")
    with pytest.raises(UsageError, match="loss must be one of"):
        SpinQuant(loss="mse")
    with pytest.raises(UsageError, match="clip must be above 0 and at most 1, got 0"):
        ActivationQuant(4, clip=0)
    with pytest.raises(UsageError, match="activation bits must be in 2..8, got 9"):
        ActivationQuant(9)


@pytest.mark.parametrize("method, scheme", [
    ("quarot", "w4a4"), ("quarot", "w4a8kv8"), ("quarot", "w4a16kv4g16"), ("spinquant", "w4a4kv4"),
])
@pytest.mark.parametrize("twin", ["opt", "llama-gqa"])
def test_what_runs_beside_the_weights_is_saved_and_put_back(tmp_path, twin, method, scheme):
    model = tiny(twin)
    options = {} if method == "quarot" else {"steps": 1, "range_steps": 2}
    quantize_(model, method, scheme, WINDOWS, progress=False, **options)
    with pytest.raises(UnsupportedError, match="more at run time"):
        save(model, tmp_path / "out")
    save(model, tmp_path / "out", "fewbit")
    again = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(probe()).logits, model(probe()).logits)
    assert settings(again) == settings(model)
    save(again, tmp_path / "twice", "fewbit")
    first, second = (tmp_path / folder for folder in ("out", "twice"))
    assert json.loads((first / "config.json").read_text()) == json.loads(
        (second / "config.json").read_text())
    weights = "model.safetensors"
    assert (first / weights).read_bytes() == (second / weights).read_bytes()


@pytest.mark.parametrize("twin, method, scheme", [
    ("opt", "quarot", "w4a4"), ("llama-gqa", "quarot", "w4a4kv4"), ("llama-gqa", "rtn", "w4a4"),
])
def test_transformers_puts_it_back_too(tmp_path, twin, method, scheme):
    """from_pretrained and save_pretrained, of a live model and of one that came from a directory;
    without fewbit the directory is refused."""
    model, ids = tiny(twin), probe()
    quantize_(model, method, scheme, WINDOWS, progress=False)
    save(model, tmp_path / "saved", "fewbit")
    model.save_pretrained(tmp_path / "live")
    for folder in ("saved", "live"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)
        assert settings(again) == settings(model)
    again.save_pretrained(tmp_path / "twice")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "twice")(ids).logits, model(ids).logits)
        base = transformers.AutoModel.from_pretrained(tmp_path / "saved")
        want = model.base_model(ids).last_hidden_state
        assert torch.equal(base(ids).last_hidden_state, want)
    restore_(model)
    assert not hasattr(model.config, "fewbit_online")
    if method == "quarot":
        hf.unregister()
        try:
            with pytest.raises((KeyError, ImportError, ValueError), match="needs fewbit"):
                transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        finally:
            hf.register()


def test_replaced_norms_and_damaged_signs_are_refused(tmp_path):
    model = tiny("opt")
    quantize_(model, "quarot", "w4a4", WINDOWS, progress=False, keeps_mean=False)
    with pytest.raises(UnsupportedError, match="is an RMSNorm where"):
        model.save_pretrained(tmp_path / "a")
    model = tiny("opt")
    quantize_(model, "quarot", "w4a4", WINDOWS, progress=False)
    save(model, tmp_path / "b", "fewbit")
    tensors = load_file(tmp_path / "b/model.safetensors")
    signs = next(name for name in tensors if name.endswith("signs"))
    for damaged, why in ((tensors[signs][1:], "the model needs torch.int8"), (None, "is missing")):
        tensors[signs] = damaged
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, tmp_path / "b/model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=why):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")


def test_a_damaged_section_is_refused(tmp_path):
    model = tiny("llama-gqa")
    quantize_(model, "quarot", "w4a4kv4", progress=False)
    save(model, tmp_path / "out", "fewbit")
    config = json.loads((tmp_path / "out/config.json").read_text())
    path = "model.layers.1.mlp.down_proj"
    for slots in ({"online_hadamard": {"width": 12, "signs": False}}, {"online_quant": {"bits": 1}},
                  {"other": {}}, {"online_quant": {"colour": 1}}, 3):
        config["fewbit_online"][path] = slots
        (tmp_path / "out/config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="fewbit_online of config.json does not fit"):
            load(tmp_path / "out")
