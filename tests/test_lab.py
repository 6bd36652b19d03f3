"""The lab functions: parity against a transcription of the published formulas, bit for bit."""

import copy

import pytest
import torch
from torch import nn

from fewbit import lab
from fewbit.errors import CalibrationError
from tiny import probe, tiny

# ---- the transcription: plain torch, nothing of the package ----


def t_quantize(w, n_bit, group):
    shape = w.shape
    if group > 0:
        w = w.reshape(-1, group)
    hi, lo, top = w.amax(dim=1, keepdim=True), w.amin(dim=1, keepdim=True), 2**n_bit - 1
    s = (hi - lo).clamp(min=1e-5) / top
    z = (-torch.round(lo / s)).clamp_(0, top)
    q = torch.clamp(torch.round(w / s) + z, 0, top)
    return ((q - z) * s).reshape(shape)


def t_features(model, blocks):
    found, hooks = {}, []
    for n, m in model.named_modules():
        if isinstance(m, nn.Linear):
            def hook(module, x, y, n=n):
                x = x[0].detach()
                found.setdefault(n, []).append(x.view(-1, x.shape[-1]).abs().mean(dim=0))

            hooks.append(m.register_forward_hook(hook))
    for b in blocks:
        model(b)
    for h in hooks:
        h.remove()
    return found


def t_search(block, fcs, x, bits, group):
    def run():
        y = block(x)
        return y[0] if isinstance(y, tuple) else y

    want, s_x = run(), x.view(-1, x.shape[-1]).abs().mean(0)
    state = copy.deepcopy(block.state_dict())
    best, best_loss = None, float("inf")
    for i in range(20):
        s = s_x.clamp(min=1e-4).pow(i / 20)
        s = s / (s.max() * s.min()).sqrt().view(1, -1)
        for fc in fcs:
            fc.weight.mul_(s)
            fc.weight.data = t_quantize(fc.weight.data, bits, group)
            fc.weight.data /= s
        loss = (want - run()).float().pow(2).mean().item()
        if loss < best_loss:
            best, best_loss = s, loss
        block.load_state_dict(state)
    return best.view(-1)


def t_auto_scale(model, bits, group, feat):
    for n, m in model.named_modules():
        if type(m).__name__ != "OPTDecoderLayer":
            continue
        a = m.self_attn
        qkv = [a.q_proj, a.k_proj, a.v_proj]
        x = torch.cat([v.unsqueeze(0) for v in feat[n + ".self_attn.out_proj"]], dim=0)
        s = t_search(a, qkv, x.unsqueeze(0), bits, group)
        m.self_attn_layer_norm.weight /= s
        m.self_attn_layer_norm.bias /= s
        for fc in qkv:
            fc.weight.mul_(s)
        s = t_search(a.out_proj, [a.out_proj], x, bits, group)
        a.v_proj.weight.div_(s.view(-1, 1))
        a.v_proj.bias.div_(s)
        a.out_proj.weight.mul_(s)
        x = torch.cat([v.unsqueeze(0) for v in feat[n + ".fc1"]], dim=0)
        s = t_search(m.fc1, [m.fc1], x, bits, group)
        m.final_layer_norm.weight /= s
        m.final_layer_norm.bias /= s
        m.fc1.weight.mul_(s)
        x = torch.cat([v.unsqueeze(0) for v in feat[n + ".fc2"]], dim=0)
        s = t_search(m.fc2, [m.fc2], x, bits, group)
        m.fc1.weight.div_(s.view(-1, 1))
        m.fc1.bias.div_(s)
        m.fc2.weight.mul_(s)
    for m in model.modules():
        if isinstance(m, nn.Linear):
            m.weight.data = t_quantize(m.weight.data, bits, group)


def t_keep(model, bits, group, feat, pick):
    for n, m in model.named_modules():
        if isinstance(m, nn.Linear):
            kept = pick(sum(feat[n]).float())
            columns = m.weight.data[:, kept].clone()
            m.weight.data = t_quantize(m.weight.data, bits, group)
            m.weight.data[:, kept] = columns


def t_scaleup(model, bits, group, feat, factor):
    for n, m in model.named_modules():
        if isinstance(m, nn.Linear):
            imp = sum(feat[n]).float()
            mask = torch.topk(imp, int(len(imp) * 0.01))[1]
            m.weight.data[:, mask] *= factor
            m.weight.data = t_quantize(m.weight.data, bits, group)
            m.weight.data[:, mask] /= factor


# ---- the tests ----


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
    return model, blocks, t_features(model, blocks)


def same(a, b):
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(x, y), name


def test_pseudo_quantize_tensor_on_1000_tensors():
    g = torch.Generator().manual_seed(0)
    for i in range(1000):
        bits, group = 2 + i % 7, (4, 16, -1)[i % 3]
        w = torch.randn(3, 32, generator=g) * 10.0 ** (i % 9 - 4) + (i % 5 == 0)
        got = lab.pseudo_quantize_tensor(w.clone(), bits, group, parity=True)
        assert torch.equal(got, t_quantize(w.clone(), bits, group)), i


def test_quirk_of_one_sign_groups():
    w = torch.linspace(1.0, 1.15, 16)[None]
    assert float(lab.pseudo_quantize_tensor(w, 4, 16, parity=True).max()) < 0.16
    assert float((lab.pseudo_quantize_tensor(w, 4, 16) - w).abs().max()) < 1.15 / 15
    constant = torch.full((1, 16), 0.5)
    torch.testing.assert_close(lab.pseudo_quantize_tensor(constant, 4, 16), constant)


@torch.no_grad()
@pytest.mark.parametrize("case", ["weight", "salient", "random", "scaleup", "auto"])
def test_parity_on_the_trained_model(trained, case):
    model, blocks, feat = trained
    mine = lab.get_calib_feat(model, None, blocks)
    assert all(torch.equal(a, b) for n in feat for a, b in zip(mine[n], feat[n], strict=True))
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    one = int(256 * 0.01)
    assert one == 2
    if case == "weight":
        lab.pseudo_quantize_model_weight(a, 3, 128, parity=True)
        for m in b.modules():
            if isinstance(m, nn.Linear):
                m.weight.data = t_quantize(m.weight.data, 3, 128)
        assert torch.equal(b.lm_head.weight, b.model.decoder.embed_tokens.weight)  # quirk 3
    elif case == "salient":
        lab.pseudo_quantize_model_salient_weight_fp16(a, 3, 128, mine, parity=True)
        t_keep(b, 3, 128, feat, lambda v: torch.topk(v, int(len(v) * 0.01))[1])
    elif case == "random":
        torch.manual_seed(7)
        lab.pseudo_quantize_model_random_weight_fp16(a, 3, 128, mine, parity=True)
        torch.manual_seed(7)
        t_keep(b, 3, 128, feat, lambda v: torch.randperm(len(v))[: int(len(v) * 0.01)])
    elif case == "scaleup":
        lab.pseudo_quantize_model_weight_scaleup(a, 3, 128, mine, 2.0, parity=True)
        t_scaleup(b, 3, 128, feat, 2.0)
    else:
        lab.pseudo_quantize_model_weight_auto_scale(a, 3, 128, mine, parity=True)
        t_auto_scale(b, 3, 128, feat)
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
    for layer in plain.model.decoder.layers:
        a = layer.self_attn
        for ln, fcs in ((layer.self_attn_layer_norm, [a.q_proj, a.k_proj, a.v_proj]),
                        (layer.final_layer_norm, [layer.fc1])):
            for fc in fcs:
                ln.weight.div_(scale)
                ln.bias.div_(scale)
                fc.weight.mul_(scale)
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
