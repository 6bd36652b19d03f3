"""The lab functions: parity against a transcription of the published formulas, bit for bit."""

import copy
import inspect

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import exercises
from fewbit import lab
from fewbit.errors import CalibrationError, UnsupportedError, UsageError
from tiny import probe, tiny

CASES = {
    "weight": "weight", "salient": "salient_weight_fp16", "random": "random_weight_fp16",
    "scaleup": "weight_scaleup", "auto": "weight_auto_scale",
}  # fmt: skip

@pytest.fixture(scope="module")
def trained(request):
    from conftest import SHARED

    if not (SHARED / "models").is_dir():
        pytest.skip(f"shared models are not at {SHARED} (set FEWBIT_SHARED)")
    import transformers

    path = SHARED / "models/opt-tiny"
    model = transformers.OPTForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randint(4096, (1, 64), generator=generator) for _ in range(6)]
    return model, blocks, exercises.get_calib_feat(model, blocks)


def same(a, b):
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(x, y), name


def test_pseudo_quantize_tensor_on_1000_tensors():
    g = torch.Generator().manual_seed(0)
    for i in range(1000):
        bits, group = 2 + i % 7, (4, 16, -1)[i % 3]
        w = torch.randn(3, 32, generator=g) * 10.0 ** (i % 9 - 4) + (i % 5 == 0)
        got = lab.pseudo_quantize_tensor(w.clone(), bits, group, parity=True)
        assert torch.equal(got, exercises.pseudo_quantize_tensor(w.clone(), bits, group)), i


def test_quirk_of_one_sign_groups():
    w = torch.linspace(1.0, 1.15, 16)[None]
    assert float(lab.pseudo_quantize_tensor(w, 4, 16, parity=True).max()) < 0.16
    assert float((lab.pseudo_quantize_tensor(w, 4, 16) - w).abs().max()) < 1.15 / 15
    constant = torch.full((1, 16), 0.5)
    torch.testing.assert_close(lab.pseudo_quantize_tensor(constant, 4, 16), constant)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_parity_on_the_trained_model(trained, case):
    model, blocks, feat = trained
    mine = lab.get_calib_feat(model, None, blocks)
    assert all(torch.equal(a, b) for n in feat for a, b in zip(mine[n], feat[n], strict=True))
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    one = int(256 * 0.01)
    assert one == 2
    name = f"pseudo_quantize_model_{CASES[case]}"
    options = [3, 128] if case == "weight" else [3, 128, mine]
    options += [2.0] if case == "scaleup" else []
    for package, m, parity in ((lab, a, {"parity": True}), (exercises, b, {})):
        torch.manual_seed(7)
        getattr(package, name)(m, *options, **parity)
    if case == "weight":
        assert torch.equal(b.lm_head.weight, b.model.decoder.embed_tokens.weight)  # quirk 3
    same(a, b)


@torch.no_grad()
def test_smoothing_parity_and_correction():
    model = tiny("opt").half()
    layer, act = model.model.decoder.layers[0], torch.rand(48) * 9
    qkv = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    ln = layer.self_attn_layer_norm
    w = torch.cat([f.weight.abs().max(dim=0, keepdim=True)[0] for f in qkv]).max(dim=0)[0]
    w = w.clamp(min=1e-5)
    s = (act.half().pow(0.5) / w.pow(0.5)).clamp(min=1e-5)
    want = ln.weight / s, qkv[1].weight * s
    lab.smooth_ln_fcs(ln, qkv, act, 0.5, parity=True)
    assert torch.equal(ln.weight, want[0]) and torch.equal(qkv[1].weight, want[1])
    for parity, times in ((True, 3), (False, 1)):  # quirk 6
        before = ln.bias.clone()
        lab.smooth_ln_fcs_by_scale(ln, qkv, 2.0, parity)
        torch.testing.assert_close(ln.bias, before / 2**times, rtol=2**-10, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("scale", [10.0, 1000.0])
def test_float16_range_is_the_exercise_s_own(scale):
    """Quirk 8: by-scale in float16 loses gains, exactly as plain half arithmetic does."""
    model = tiny("opt").half()
    plain = copy.deepcopy(model)
    lab.smooth_lm_by_scale(model, scale, parity=True)
    exercises.smooth_lm_by_scale(plain, scale)
    same(model, plain)


@torch.no_grad()
@pytest.mark.parametrize("twin", ["opt", "llama-gqa", "gemma", "falcon-7b"])
def test_smooth_lm_keeps_the_function(twin):
    model = tiny(twin, torch.float64)
    before = model(probe()).logits
    scales = lab.get_act_scales(model, _Tokens(), texts=["a", "b"])
    lab.smooth_lm(model, scales, 0.7)
    lab.smooth_lm_by_scale(model, 4.0)
    after = model(probe()).logits
    assert float((after - before).abs().max() / before.abs().max()) < 1e-9


class _Tokens:
    def __call__(self, text, return_tensors=None, **kwargs):
        return type("Encoding", (), {"input_ids": probe(1, 12, seed=len(text))})

    def encode(self, text):
        return [3, 4, 5]


@torch.no_grad()
def test_w8a8_linear_and_quantize_opt():
    model = tiny("opt")
    before = model(probe()).logits
    x = torch.randn(3, 48)
    held = x.clone()
    layer = copy.deepcopy(model.model.decoder.layers[0].fc1)
    made = lab.W8A8Linear.from_float(layer, "per_channel", "per_token")
    s_w = layer.weight.abs().max(dim=-1, keepdim=True)[0].clamp(min=1e-5) / 127
    s_x = x.abs().max(dim=-1, keepdim=True)[0].clamp(min=1e-5) / 127
    w = torch.round(layer.weight / s_w) * s_w
    want = nn.functional.linear(torch.round(x / s_x) * s_x, w, layer.bias)
    assert torch.equal(made(x), want) and torch.equal(x, held)
    lab.quantize_opt(model)
    after = model(probe()).logits
    assert 0 < float((after - before).norm() / before.norm()) < 0.1
    assert model.model.decoder.layers[1].self_attn.q_proj.quantize_output


def test_sizes():
    """methods.md's table: parameters x (bits + 20/128) / 8 / 2^20."""
    model = nn.Linear(1000, 1000, bias=False)
    assert lab.get_model_size(model, 32) == 32e6
    assert lab.get_model_size(model, 3, 128) == pytest.approx(1e6 * (3 + 20 / 128))


@torch.no_grad()
def test_evaluate_weighs_windows_alike():
    model = tiny("opt")
    got = lab.evaluate(model, _Tokens(), "text", windows=1, window=12)
    ids = probe(1, 12, seed=4)
    loss = nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    assert got == pytest.approx(float(loss.exp()), rel=1e-5)
    with pytest.raises(CalibrationError, match="needs text="):
        lab.evaluate(model, None)


# The labs' harness and exercises: names and parameters, in the exercises' order.
NAMES = {
    "evaluate": "model tokenizer", "get_model_size": "model data_width group_size",
    "LLMModel": "model_name weights_path",
    "get_calib_dataset": "tokenizer n_samples block_size", "get_calib_feat": "model tokenizer",
    "pseudo_quantize_tensor": "w n_bit q_group_size",
    "pseudo_quantize_model_weight": "model w_bit q_group_size",
    "pseudo_quantize_model_salient_weight_fp16": "model w_bit q_group_size input_feat",
    "pseudo_quantize_model_random_weight_fp16": "model w_bit q_group_size input_feat",
    "pseudo_quantize_model_weight_scaleup": "model w_bit q_group_size input_feat scale_factor",
    "scale_ln_fcs": "ln fcs scales", "scale_fc_fc": "fc1 fc2 scales",
    "auto_scale_block": "module name w_bit q_group_size input_feat",
    "pseudo_quantize_model_weight_auto_scale": "model w_bit q_group_size input_feat",
    "W8A8Linear": "", "quantize_weight_per_channel_absmax": "w n_bits",
    "quantize_weight_per_tensor_absmax": "w n_bits",
    "quantize_activation_per_token_absmax": "t n_bits",
    "quantize_activation_per_tensor_absmax": "t n_bits",
    "quantize_opt": "model quantize_bits", "smooth_lm_by_scale": "model scale",
    "smooth_ln_fcs_by_scale": "ln fcs scale", "smooth_ln_fcs": "ln fcs act_scales alpha",
    "get_act_scales": "model tokenizer dataset_path num_samples seq_len",
    "smooth_lm": "model scales alpha", "get_orthogonal_matrix": "size mode dtype device",
    "fuse_ln_linear": "layernorm linear_layers", "fuse_layer_norms_tinyllama": "model",
    "fuse_layer_norms_opt": "model",
    "rotate_model_weight": "model R1", "quantize_tinyllama": "model",
    "plot_2d_layer_comparison": "output1 output2 title1 title2 layer_range seq_slice",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_exercise_is_here_under_its_name_and_parameters(name):
    parameters = inspect.signature(getattr(lab, name)).parameters.values()
    own = NAMES[name].split()
    assert [p.name for p in parameters][: len(own)] == own
    if own:  # everything beyond the exercise's own has a default
        assert all(p.default is not p.empty for p in list(parameters)[len(own) :])


@torch.no_grad()
def test_the_model_by_name_is_changed_and_reset(tmp_path, capsys, shared):
    path = shared / "models/opt-tiny"
    text = (shared / "data/books_test.txt").read_text()[:20000]
    llm = lab.LLMModel(str(path), text=text)
    assert not llm.model_changed
    before = llm.model_evaluate(32, windows=2, window=64)
    size = sum(p.numel() for p in llm.model.parameters()) * 32 / 8 / 2**20
    assert f"model size: {size:.2f} MiB" in capsys.readouterr().out
    for change in (lambda: lab.pseudo_quantize_model_weight(llm.model, 2, 64),
                   lambda: lab.quantize_opt(llm.model)):
        change()
        assert llm.model_changed
        llm.model_reset()
        assert not llm.model_changed
        assert llm.model_evaluate(windows=2, window=64) == before
    norm = "model.decoder.final_layer_norm.weight"
    save_file({norm: torch.full((256,), 2.0)}, tmp_path / "w.safetensors")
    other = lab.LLMModel(str(path), str(tmp_path / "w.safetensors"))
    assert float(other.model.get_parameter(norm).min()) == 2 and not other.model_changed
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="holds 'x', which the model does not have"):
        lab.LLMModel(str(path), str(tmp_path / "w.safetensors"))


def test_exercises_about_opt_refuse_other_models():
    for run in (lambda m: lab.quantize_opt(m),
                lambda m: lab.pseudo_quantize_model_weight_auto_scale(m, 3, 16, {})):
        with pytest.raises(UnsupportedError, match="the model is LlamaForCausalLM"):
            run(tiny("llama-gqa"))
    with pytest.raises(CalibrationError, match="needs samples="):
        lab.get_calib_feat(tiny("opt"), None)


@torch.no_grad()
@pytest.mark.parametrize("twin", ["opt", "llama-gqa"])
def test_rotation_keeps_the_function_and_parity_does_not_on_opt(twin):
    model = tiny(twin, torch.float64)
    before = model(probe()).logits
    r1 = lab.get_orthogonal_matrix(48, "random", torch.float64)
    torch.testing.assert_close(r1 @ r1.T, torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-12)
    wrong = copy.deepcopy(model)
    lab.rotate_model_weight(model, r1)
    assert float((model(probe()).logits - before).abs().max() / before.abs().max()) < 1e-9
    lab.rotate_model_weight(wrong, r1, parity=True)
    assert float((wrong(probe()).logits - before).abs().max()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("twin", ["opt", "llama-gqa"])
def test_section_5_whole_on_both_kinds_of_model(twin):
    """Norms fused, then rotated, each without a change; then W8A8 and the picture."""
    model = tiny(twin, torch.float64)
    fuse = lab.fuse_layer_norms_opt if twin == "opt" else lab.fuse_layer_norms_tinyllama
    quantize = lab.quantize_opt if twin == "opt" else lab.quantize_tinyllama
    before = model(probe(), output_hidden_states=True)
    fuse(model)
    fused = model(probe()).logits
    assert float((fused - before.logits).abs().max() / before.logits.abs().max()) < 1e-9
    lab.rotate_model_weight(model, lab.get_orthogonal_matrix(48, "hadamard", torch.float64))
    after = model(probe(), output_hidden_states=True)
    change = (after.logits - before.logits).abs().max() / before.logits.abs().max()
    assert float(change) < 1e-9
    figure = lab.plot_2d_layer_comparison(
        before.hidden_states, after.hidden_states, "as it is", "rotated", [0, 1], (2, None)
    )
    assert [axis.get_title() for axis in figure.axes] == [
        "as it is, layer 0", "rotated, layer 0", "as it is, layer 1", "rotated, layer 1"]
    quantize(model.float())
    error = (model(probe()).logits - before.logits).norm() / before.logits.norm()
    assert 0 < float(error) < 0.1
