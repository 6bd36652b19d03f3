"""The lab exercises solved by hand, in plain torch, under the exercises' own names and signatures.

Transcribed from the published formulas, quirks included, and using nothing of the package: the
oracle of test_lab.py, and the cells that test_exercises.py replaces by an import.
"""

import copy

import torch
from torch import nn

# ---- the harness ----


def pseudo_quantize_tensor(w, n_bit=4, q_group_size=-1):
    shape = w.shape
    if q_group_size > 0:
        w = w.reshape(-1, q_group_size)
    hi, lo, top = w.amax(dim=1, keepdim=True), w.amin(dim=1, keepdim=True), 2**n_bit - 1
    s = (hi - lo).clamp(min=1e-5) / top
    z = (-torch.round(lo / s)).clamp_(0, top)
    q = torch.clamp(torch.round(w / s) + z, 0, top)
    return ((q - z) * s).reshape(shape)


def pseudo_quantize_model_weight(model, w_bit, q_group_size):
    for m in model.modules():
        if isinstance(m, nn.Linear):
            m.weight.data = pseudo_quantize_tensor(m.weight.data, w_bit, q_group_size)


def get_calib_feat(model, blocks):
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


# ---- section 1: salient weights ----


def pseudo_quantize_model_salient_weight_fp16(model, w_bit, q_group_size, input_feat):
    for n, m in model.named_modules():
        if isinstance(m, nn.Linear):
            importance = sum(input_feat[n]).float()
            kept = torch.topk(importance, int(len(importance) * 0.01))[1]
            columns = m.weight.data[:, kept].clone()
            m.weight.data = pseudo_quantize_tensor(m.weight.data, w_bit, q_group_size)
            m.weight.data[:, kept] = columns


def pseudo_quantize_model_random_weight_fp16(model, w_bit, q_group_size, input_feat):
    for n, m in model.named_modules():
        if isinstance(m, nn.Linear):
            importance = sum(input_feat[n]).float()
            kept = torch.randperm(len(importance))[: int(len(importance) * 0.01)]
            columns = m.weight.data[:, kept].clone()
            m.weight.data = pseudo_quantize_tensor(m.weight.data, w_bit, q_group_size)
            m.weight.data[:, kept] = columns


def pseudo_quantize_model_weight_scaleup(model, w_bit, q_group_size, input_feat, scale_factor):
    for n, m in model.named_modules():
        if isinstance(m, nn.Linear):
            importance = sum(input_feat[n]).float()
            mask = torch.topk(importance, int(len(importance) * 0.01))[1]
            m.weight.data[:, mask] *= scale_factor
            m.weight.data = pseudo_quantize_tensor(m.weight.data, w_bit, q_group_size)
            m.weight.data[:, mask] /= scale_factor


# ---- section 2: AWQ ----


def search_module_scale(block, fcs, x, bits, group):
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
            fc.weight.data = pseudo_quantize_tensor(fc.weight.data, bits, group)
            fc.weight.data /= s
        loss = (want - run()).float().pow(2).mean().item()
        if loss < best_loss:
            best, best_loss = s, loss
        block.load_state_dict(state)
    return best.view(-1)


def scale_ln_fcs(ln, fcs, scales):
    ln.weight /= scales
    ln.bias /= scales
    for fc in fcs:
        fc.weight.mul_(scales)


def scale_fc_fc(fc1, fc2, scales):
    fc1.weight.div_(scales.view(-1, 1))
    fc1.bias.div_(scales)
    fc2.weight.mul_(scales)


def auto_scale_block(module, name, w_bit, q_group_size, input_feat):
    a = module.self_attn
    qkv = [a.q_proj, a.k_proj, a.v_proj]

    def search(block, fcs, x):
        return search_module_scale(block, fcs, x, w_bit, q_group_size)

    x = torch.cat([v.unsqueeze(0) for v in input_feat[name + ".self_attn.out_proj"]], dim=0)
    scale_ln_fcs(module.self_attn_layer_norm, qkv, search(a, qkv, x.unsqueeze(0)))
    scale_fc_fc(a.v_proj, a.out_proj, search(a.out_proj, [a.out_proj], x))
    x = torch.cat([v.unsqueeze(0) for v in input_feat[name + ".fc1"]], dim=0)
    scale_ln_fcs(module.final_layer_norm, [module.fc1], search(module.fc1, [module.fc1], x))
    x = torch.cat([v.unsqueeze(0) for v in input_feat[name + ".fc2"]], dim=0)
    scale_fc_fc(module.fc1, module.fc2, search(module.fc2, [module.fc2], x))


def pseudo_quantize_model_weight_auto_scale(model, w_bit, q_group_size, input_feat):
    for n, m in model.named_modules():
        if type(m).__name__ == "OPTDecoderLayer":
            auto_scale_block(m, n, w_bit, q_group_size, input_feat)
    pseudo_quantize_model_weight(model, w_bit, q_group_size)


# ---- sections 3 and 4: SmoothQuant ----


def smooth_ln_fcs_by_scale(ln, fcs, scale):
    for fc in fcs:
        ln.weight.div_(scale)
        ln.bias.div_(scale)
        fc.weight.mul_(scale)


def smooth_lm_by_scale(model, scale):
    for m in model.modules():
        if type(m).__name__ == "OPTDecoderLayer":
            a = m.self_attn
            smooth_ln_fcs_by_scale(m.self_attn_layer_norm, [a.q_proj, a.k_proj, a.v_proj], scale)
            smooth_ln_fcs_by_scale(m.final_layer_norm, [m.fc1], scale)


def smooth_ln_fcs(ln, fcs, act_scales, alpha=0.5):
    w = torch.cat([fc.weight.abs().max(dim=0, keepdim=True)[0] for fc in fcs]).max(dim=0)[0]
    s = act_scales.to(w.dtype).pow(alpha) / w.clamp(min=1e-5).pow(1 - alpha)
    scale_ln_fcs(ln, fcs, s.clamp(min=1e-5))


def smooth_lm(model, scales, alpha=0.5):
    for n, m in model.named_modules():
        if type(m).__name__ == "OPTDecoderLayer":
            a = m.self_attn
            qkv = [a.q_proj, a.k_proj, a.v_proj]
            smooth_ln_fcs(m.self_attn_layer_norm, qkv, scales[n + ".self_attn.q_proj"], alpha)
            smooth_ln_fcs(m.final_layer_norm, [m.fc1], scales[n + ".fc1"], alpha)


# ---- section 5: rotation ----


def get_orthogonal_matrix(size, mode="random", dtype=torch.float32, device="cpu"):
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    return (q * r.diagonal().sign()).to(device=device, dtype=dtype)


def fuse_ln_linear(layernorm, linear_layers):
    for linear in linear_layers:
        linear.weight.data = linear.weight.data * layernorm.weight.data
    layernorm.weight.data = torch.ones_like(layernorm.weight.data)


def fuse_layer_norms_tinyllama(model):
    for layer in model.model.layers:
        a, mlp = layer.self_attn, layer.mlp
        fuse_ln_linear(layer.input_layernorm, [a.q_proj, a.k_proj, a.v_proj])
        fuse_ln_linear(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
    fuse_ln_linear(model.model.norm, [model.lm_head])


def rotate_model_weight(model, R1):  # noqa: N803
    for n, m in model.named_modules():
        if isinstance(m, nn.Embedding):
            m.weight.data = m.weight.data @ R1
        elif isinstance(m, nn.Linear):
            writes = n.endswith(("o_proj", "down_proj"))
            m.weight.data = R1.T @ m.weight.data if writes else m.weight.data @ R1
