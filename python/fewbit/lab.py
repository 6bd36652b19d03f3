"""The lab exercises' own names and signatures, a few lines each over the package.

``from fewbit.lab import *`` replaces the functions of the AWQ and SmoothQuant exercises. Default:
the corrected form. ``parity=True``: the exercise's arithmetic bit for bit, quirks included; each
quirk is told where it lives. Models are changed in place. Data the exercises download are
arguments here (``text``, ``texts``, ``samples``): nothing is fetched. Section 5 (rotation) is in
lab_rotate.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import lab_rotate, ops
from .calibrate import read_text
from .errors import (
    MissingCalibrationError,
    NonFiniteError,
    ShortTextError,
    UnknownFamilyError,
    UsageError,
)
from .families import Family, decoder_layers, describe
from .lab_rotate import *  # noqa: F403
from .scheme import check_int
from .transforms.edges import Edge, apply_scale, edges
from .transforms.scale import awq_scale
from .transforms.smooth import smooth_scale
from .undo import Snapshot

# A star import leaves a notebook its own LLMModel, evaluate, get_calib_dataset and get_calib_feat,
# which fetch their data; here data is an argument.
__all__ = [
    *lab_rotate.__all__,
    "W8A8Linear",
    "auto_scale_block",
    "get_act_scales",
    "get_model_size",
    "pseudo_quantize_model_random_weight_fp16",
    "pseudo_quantize_model_salient_weight_fp16",
    "pseudo_quantize_model_weight",
    "pseudo_quantize_model_weight_auto_scale",
    "pseudo_quantize_model_weight_scaleup",
    "pseudo_quantize_tensor",
    "quantize_activation_per_tensor_absmax",
    "quantize_activation_per_token_absmax",
    "quantize_opt",
    "quantize_weight_per_channel_absmax",
    "quantize_weight_per_tensor_absmax",
    "scale_fc_fc",
    "scale_ln_fcs",
    "smooth_lm",
    "smooth_lm_by_scale",
    "smooth_ln_fcs",
    "smooth_ln_fcs_by_scale",
]

Features = dict[str, list[Tensor]]


# ---- the harness -------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, tokenizer, text: str | None = None, windows: int = 40, window: int = 2048):
    """Perplexity on ``text`` (the exercise: WikiText-2 test, lines joined by two newlines).

    The first ``windows`` of ``window`` tokens, no overlap; each window's mean loss over window - 1
    predictions counts ``window`` times, so all windows weigh alike.
    """
    if text is None:
        raise MissingCalibrationError("evaluate needs text=, as the test split of WikiText-2")
    ids = tokenizer(text, return_tensors="pt").input_ids.reshape(-1)
    count = min(windows, len(ids) // window)
    if count == 0:
        raise ShortTextError(f"the text has {len(ids)} tokens, one window needs {window}")
    total = 0.0
    for row in ids[: count * window].reshape(count, 1, window):
        logits = model(row.to(next(model.parameters()).device)).logits[0, :-1].float()
        loss = nn.functional.cross_entropy(logits, row[0, 1:].to(logits.device))
        total += float(loss) * window
    return math.exp(total / (count * window))


def get_model_size(model: nn.Module, data_width: int = 16, group_size: int = -1) -> float:
    """Bits of all parameters at ``data_width``, embeddings too; with groups, 20 / group more."""
    width = data_width + (16 + 4) / group_size if group_size != -1 else data_width
    return sum(p.numel() for p in model.parameters()) * width


class LLMModel:
    """A float model by name, changed by the exercises and put back.

    ``model_name``: a directory, or a name that transformers finds; ``weights_path``: a safetensors
    file whose tensors replace those of the same names; ``text``: what ``model_evaluate`` reads.
    """

    def __init__(
        self, model_name: str, weights_path: str | None = None, *, text: str | None = None
    ) -> None:
        from .checkpoint import transformers

        hf, named = transformers(), {"dtype": torch.float32, "use_safetensors": True}
        self.model = hf.AutoModelForCausalLM.from_pretrained(model_name, **named).eval()
        self.model.requires_grad_(False)
        self.tokenizer = hf.AutoTokenizer.from_pretrained(model_name)
        if weights_path is not None:
            from safetensors.torch import load_file

            found = self.model.load_state_dict(load_file(weights_path), strict=False)
            if found.unexpected_keys:
                name = min(found.unexpected_keys)
                raise UsageError(f"{weights_path} holds {name!r}, which the model does not have")
        self.text = text
        self._loaded = Snapshot(self.model)

    @property
    def model_changed(self) -> bool:
        """A module or a value is another than after loading or ``model_reset``."""
        return self._loaded.differs()

    def model_reset(self) -> None:
        """The float weights again, bit for bit."""
        self._loaded.restore(self.model)
        self._loaded = Snapshot(self.model)

    def model_evaluate(self, data_width: int = 16, group_size: int = -1, **options) -> float:
        """Prints and returns the perplexity (``evaluate``), and prints the size in MiB if all
        parameters had that width."""
        value = evaluate(self.model, self.tokenizer, self.text, **options)
        print(f"model perplexity: {value:.2f}")
        print(f"model size: {get_model_size(self.model, data_width, group_size) / 2**23:.2f} MiB")
        return value


def get_calib_dataset(
    tokenizer=None, n_samples: int = 256, block_size: int = 512, texts: Iterable[str] = ()
) -> list[Tensor]:
    """Token blocks [1, block_size]: ``n_samples`` texts of at most a block each, concatenated."""
    ids, taken = [], 0
    for text in texts:
        line = tokenizer.encode(text.strip())
        if not 0 < len(line) <= block_size:
            continue
        ids += line
        taken += 1
        if taken == n_samples:
            break
    blocks = torch.tensor(ids[: len(ids) // block_size * block_size]).reshape(-1, 1, block_size)
    if not len(blocks):
        raise ShortTextError(f"{len(ids)} tokens do not fill one block of {block_size}")
    return list(blocks)


@torch.no_grad()
def get_calib_feat(
    model: nn.Module, tokenizer, samples: list[Tensor] | None = None
) -> Features:
    """By linear: one vector per block, the mean over tokens of |input| per channel (the slides say
    L1 norm, which would be the sum). ``samples``: token blocks, as of ``get_calib_dataset``."""
    if samples is None:
        raise MissingCalibrationError("get_calib_feat needs samples=, blocks of token ids")
    found: Features = {}
    _hooked(model, samples, lambda name, x: found.setdefault(name, []).append(
        x.reshape(-1, x.shape[-1]).abs().mean(0).cpu()
    ))
    return found


def _hooked(model: nn.Module, samples: list[Tensor], see) -> None:
    def hook(name):
        return lambda module, args: see(name, args[0].detach())

    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    hooks = [m.register_forward_pre_hook(hook(n)) for n, m in linears.items()]
    try:
        for ids in samples:
            model(ids.to(next(model.parameters()).device))
    finally:
        for h in hooks:
            h.remove()


# ---- exercises 1 and 2: AWQ ----------------------------------------------------------------------


def pseudo_quantize_tensor(
    w: Tensor, n_bit: int = 4, q_group_size: int = -1, parity: bool = False
) -> Tensor:
    """Round ``w`` [rows, columns] to its grid and back.

    Parity: the range is not extended to hold 0, so a group of one sign collapses (1.00 .. 1.15
    becomes 0.15 everywhere) and a constant group becomes nearly 0. The exercise's last assertion
    fails for its own default group, -1; here that is one group a row in both forms.
    """
    if not parity:
        return ops.pseudo_quantize(w, n_bit, q_group_size)
    check_int("n_bit", n_bit, 1, 16)
    shape = w.shape
    if q_group_size > 0:
        if shape[-1] % q_group_size:
            raise UsageError(f"{shape[-1]} columns are not a multiple of group {q_group_size}")
        w = w.reshape(-1, q_group_size)
    top = 2**n_bit - 1
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    scales = (high - low).clamp(min=1e-5) / top
    zeros = (-torch.round(low / scales)).clamp(0, top)
    return ((torch.clamp(torch.round(w / scales) + zeros, 0, top) - zeros) * scales).reshape(shape)


def _linears(model: nn.Module, parity: bool) -> Iterable[tuple[str, nn.Linear]]:
    """Every nn.Linear; by default not the head. The exercise quantises the head too, and with it
    the embedding where the two are tied."""
    heads = () if parity else ("lm_head", "embed_out")
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear) and not name.endswith(heads or "\0"):
            yield name, m


def pseudo_quantize_model_weight(
    model: nn.Module, w_bit: int, q_group_size: int, parity: bool = False
) -> None:
    """Every linear's weight on its grid. Parity: the (tied) head as well."""
    for _, m in _linears(model, parity):
        m.weight.data = pseudo_quantize_tensor(m.weight.data, w_bit, q_group_size, parity)


def _salient_count(columns: int, parity: bool) -> int:
    """1 % of the columns: rounded and at least one; parity: cut off, so 0 below 100 columns."""
    return int(columns * 0.01) if parity else max(1, round(columns * 0.01))


def _keep_columns(model, w_bit, q_group_size, input_feat, parity, choose) -> None:
    for name, m in _linears(model, parity):
        kept = choose(sum(input_feat[name]).float()).to(m.weight.device)
        columns = m.weight.data[:, kept].clone()
        m.weight.data = pseudo_quantize_tensor(m.weight.data, w_bit, q_group_size, parity)
        m.weight.data[:, kept] = columns


def pseudo_quantize_model_salient_weight_fp16(
    model: nn.Module, w_bit: int, q_group_size: int, input_feat: Features, parity: bool = False
) -> None:
    """Quantise, then restore the 1 % of columns with the largest summed activation."""
    _keep_columns(model, w_bit, q_group_size, input_feat, parity,
                  lambda v: v.topk(_salient_count(len(v), parity)).indices)


def pseudo_quantize_model_random_weight_fp16(
    model: nn.Module, w_bit: int, q_group_size: int, input_feat: Features, parity: bool = False
) -> None:
    """Quantise, then restore 1 % of the columns at random (torch's global generator)."""
    _keep_columns(model, w_bit, q_group_size, input_feat, parity,
                  lambda v: torch.randperm(len(v))[: _salient_count(len(v), parity)])


def pseudo_quantize_model_weight_scaleup(
    model: nn.Module, w_bit: int, q_group_size: int, input_feat: Features, scale_factor: float,
    parity: bool = False,
) -> None:
    """The salient 1 % of columns times ``scale_factor``, quantise, divide again."""
    for name, m in _linears(model, parity):
        v = sum(input_feat[name]).float()
        salient = v.topk(_salient_count(len(v), parity)).indices.to(m.weight.device)
        m.weight.data[:, salient] *= scale_factor
        m.weight.data = pseudo_quantize_tensor(m.weight.data, w_bit, q_group_size, parity)
        m.weight.data[:, salient] /= scale_factor


def _list(fcs) -> list[nn.Linear]:
    return list(fcs) if isinstance(fcs, (list, tuple)) else [fcs]


@torch.no_grad()
def scale_ln_fcs(ln: nn.Module, fcs, scales: Tensor) -> None:
    """Norm's gain and bias / scales, linears' columns * scales."""
    ln.weight.div_(scales.to(ln.weight.device))
    if getattr(ln, "bias", None) is not None:
        ln.bias.div_(scales.to(ln.weight.device))
    for fc in _list(fcs):
        fc.weight.mul_(scales.to(fc.weight.device))


@torch.no_grad()
def scale_fc_fc(fc1: nn.Linear, fc2: nn.Linear, scales: Tensor) -> None:
    """The last len(scales) output rows of fc1 (and bias) / scales, fc2's columns * scales."""
    scales = scales.to(fc1.weight.device)
    fc1.weight[-len(scales) :].div_(scales.view(-1, 1))
    if fc1.bias is not None:
        fc1.bias[-len(scales) :].div_(scales)
    fc2.weight.mul_(scales.to(fc2.weight.device))


@torch.no_grad()
def _search_module_scale(block, linears2scale, x, w_bit, q_group_size, parity=False) -> Tensor:
    """The scale of 20 ratios with the least mean squared error of ``block``'s output.

    s over sqrt(max s min s), as in the first lab and in AWQ's code. A slide of the second prints
    max s + min s there, which changes all of s by one factor, and so only how weights round.
    """
    def run():
        out = block(x)
        return out[0] if isinstance(out, tuple) else out

    want, level = run(), x.reshape(-1, x.shape[-1]).abs().mean(0)
    weights = [fc.weight.data for fc in linears2scale]
    best, best_error = None, math.inf
    for i in range(20):
        s = awq_scale(level, i / 20)
        for fc, w in zip(linears2scale, weights, strict=True):
            fc.weight.data = pseudo_quantize_tensor(w * s, w_bit, q_group_size, parity) / s
        error = float((want - run()).float().pow(2).mean())
        if error < best_error:
            best, best_error = s, error
        for fc, w in zip(linears2scale, weights, strict=True):
            fc.weight.data = w
    if best is None:
        raise NonFiniteError("every candidate's error is NaN: weights or inputs are not finite")
    return best


@torch.no_grad()
def auto_scale_block(
    module: nn.Module, name: str, w_bit: int, q_group_size: int, input_feat: Features,
    parity: bool = False,
) -> None:
    """Search and apply the scales of one OPT decoder layer, called ``name`` in ``input_feat``.

    Parity: q, k, v are searched on the inputs of out_proj, as tokens of one sequence through the
    whole attention. Default: on their own inputs, against their own outputs.
    """
    attn, device = module.self_attn, module.fc1.weight.device
    qkv = [attn.q_proj, attn.k_proj, attn.v_proj]

    def inputs(path):
        return torch.stack(input_feat[f"{name}.{path}"]).to(device, module.fc1.weight.dtype)

    def search(block, linears, x):
        return _search_module_scale(block, linears, x, w_bit, q_group_size, parity)

    if parity:
        s = search(attn, qkv, inputs("self_attn.out_proj")[None])
    else:
        together = nn.ModuleList(qkv)
        together.forward = lambda x: torch.cat([fc(x) for fc in qkv], -1)
        s = search(together, qkv, inputs("self_attn.q_proj"))
    scale_ln_fcs(module.self_attn_layer_norm, qkv, s)
    s = search(attn.out_proj, [attn.out_proj], inputs("self_attn.out_proj"))
    scale_fc_fc(attn.v_proj, attn.out_proj, s)
    s = search(module.fc1, [module.fc1], inputs("fc1"))
    scale_ln_fcs(module.final_layer_norm, module.fc1, s)
    s = search(module.fc2, [module.fc2], inputs("fc2"))
    scale_fc_fc(module.fc1, module.fc2, s)


def _opt(model: nn.Module) -> Family:
    """The model's family, or UnknownFamilyError: these exercises name OPT's own modules."""
    family = describe(model)
    if family.name != "opt":
        raise UnknownFamilyError(
            f"this exercise is about OPT's modules, and the model is {type(model).__name__}: use "
            "fewbit.quantize_ for any family"
        )
    return family


def pseudo_quantize_model_weight_auto_scale(
    model: nn.Module, w_bit: int, q_group_size: int, input_feat: Features, parity: bool = False
) -> None:
    """AWQ: scale every OPT decoder layer, then quantise all linears."""
    family = _opt(model)
    for i, layer in enumerate(decoder_layers(model, family)):
        auto_scale_block(layer, f"{family.layers}.{i}", w_bit, q_group_size, input_feat, parity)
    pseudo_quantize_model_weight(model, w_bit, q_group_size, parity)


# ---- exercises 3 and 4: SmoothQuant --------------------------------------------------------------


def _absmax(t: Tensor, n_bits: int, level: Tensor) -> Tensor:
    check_int("n_bits", n_bits, 2, 16)
    s = level.clamp(min=1e-5) / (2 ** (n_bits - 1) - 1)
    return (t / s).round() * s


@torch.no_grad()
def quantize_weight_per_channel_absmax(w: Tensor, n_bits: int = 8) -> Tensor:
    """Symmetric, one scale per output row."""
    return _absmax(w, n_bits, w.abs().amax(-1, keepdim=True))


@torch.no_grad()
def quantize_weight_per_tensor_absmax(w: Tensor, n_bits: int = 8) -> Tensor:
    """Symmetric, one scale."""
    return _absmax(w, n_bits, w.abs().amax())


@torch.no_grad()
def quantize_activation_per_token_absmax(t: Tensor, n_bits: int = 8) -> Tensor:
    """Symmetric, one scale per token. The exercise overwrites ``t``, which q, k and v share."""
    return _absmax(t, n_bits, t.abs().amax(-1, keepdim=True))


@torch.no_grad()
def quantize_activation_per_tensor_absmax(t: Tensor, n_bits: int = 8) -> Tensor:
    """Symmetric, one scale. The exercise overwrites ``t``, which q, k and v share."""
    return _absmax(t, n_bits, t.abs().amax())


_WEIGHT = {"per_channel": quantize_weight_per_channel_absmax,
           "per_tensor": quantize_weight_per_tensor_absmax}
_ACTIVATION = {"per_token": quantize_activation_per_token_absmax,
               "per_tensor": quantize_activation_per_tensor_absmax}


class W8A8Linear(nn.Module):
    """Pseudo-quantised linear; ``quantize_output`` for q, k, v, whose outputs meet in a product.

    Arithmetic in the type of the weight, as in the exercise. Int8Linear runs in integers.
    """

    def __init__(self, linear: nn.Linear, weight_quant="per_tensor", act_quant="per_tensor",
                 quantize_output=False, n_bits: int = 8) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.n_bits, self.act_quant, self.quantize_output = n_bits, act_quant, quantize_output
        self.register_buffer("weight", _WEIGHT[weight_quant](linear.weight.detach(), n_bits))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @classmethod
    def from_float(cls, module: nn.Linear, weight_quant="per_tensor", act_quant="per_tensor",
                   quantize_output=False, n_bits: int = 8) -> W8A8Linear:
        return cls(module, weight_quant, act_quant, quantize_output, n_bits)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        act = _ACTIVATION[self.act_quant]
        y = nn.functional.linear(act(x, self.n_bits), self.weight, self.bias)
        return act(y, self.n_bits) if self.quantize_output else y


def quantize_opt(model: nn.Module, quantize_bits: int = 8, weight_quant="per_tensor",
                 act_quant="per_tensor", quantize_bmm_input=True) -> nn.Module:
    """W8A8Linear in place of every decoder linear of an OPT model."""
    for layer in decoder_layers(model, _opt(model)):
        for parent, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj", "out_proj")),
                              (layer, ("fc1", "fc2"))):
            for name in names:
                output = quantize_bmm_input and name in ("q_proj", "k_proj", "v_proj")
                setattr(parent, name, W8A8Linear(
                    getattr(parent, name), weight_quant, act_quant, output, quantize_bits))
    return model


@torch.no_grad()
def smooth_ln_fcs_by_scale(ln: nn.Module, fcs, scale: float, parity: bool = False) -> None:
    """Norm / scale, linears * scale, for one number.

    Parity: the norm is divided once per linear, as the slide prints it (q, k, v: three times),
    which changes the function.
    """
    for _ in _list(fcs) if parity else (0,):
        ln.weight.div_(scale)
        if getattr(ln, "bias", None) is not None:
            ln.bias.div_(scale)
    for fc in _list(fcs):
        fc.weight.mul_(scale)


def _norm_edges(model: nn.Module) -> Iterable[tuple[str, nn.Module, Edge]]:
    family = describe(model)
    for i, layer in enumerate(decoder_layers(model, family)):
        for edge in edges(layer, family, model.config):
            if edge.kind == "norm":
                yield f"{family.layers}.{i}", layer, edge


def smooth_lm_by_scale(model: nn.Module, scale: float, parity: bool = False) -> None:
    """Every norm edge by one number. In float16 a scale of 1000 pushes weights to the type's
    ceiling and gains to its floor: part of what the exercise shows is that, not quantisation."""
    for _, layer, edge in _norm_edges(model):
        if parity:
            fcs = [layer.get_submodule(p) for p in edge.readers]
            smooth_ln_fcs_by_scale(layer.get_submodule(edge.source), fcs, scale, parity=True)
        else:
            width = layer.get_submodule(edge.readers[0]).in_features
            s = torch.full((width,), float(scale), device=next(layer.parameters()).device)
            apply_scale(layer, edge, s, describe(model))


@torch.no_grad()
def smooth_ln_fcs(ln: nn.Module, fcs, act_scales: Tensor, alpha: float = 0.5,
                  parity: bool = False) -> None:
    """s = max|x|^alpha / max|w|^(1 - alpha), over all ``fcs``; parity: floors of 1e-5 everywhere,
    so that a dead channel's gain is divided by 1e-5. Default: such a channel keeps s = 1."""
    w = torch.stack([fc.weight.abs().amax(0) for fc in _list(fcs)]).amax(0)
    act_scales = act_scales.to(w.device, w.dtype)
    if parity:
        w = w.clamp(min=1e-5)
        s = (act_scales.pow(alpha) / w.pow(1 - alpha)).clamp(min=1e-5)
    else:
        s = smooth_scale(act_scales, w, alpha).to(w.dtype)
    scale_ln_fcs(ln, fcs, s)


@torch.no_grad()
def get_act_scales(
    model: nn.Module, tokenizer, dataset_path=None, num_samples: int = 512, seq_len: int = 512,
    texts: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """By linear: max |input| per channel over ``num_samples`` texts of at most ``seq_len`` tokens.

    ``texts``, or ``dataset_path`` of a text file with one text per line.
    """
    if texts is None:
        if dataset_path is None:
            raise MissingCalibrationError("get_act_scales needs texts= or dataset_path=")
        texts = [line for line in read_text(dataset_path).splitlines() if line.strip()]
    samples = [
        tokenizer(t, return_tensors="pt", max_length=seq_len, truncation=True).input_ids
        for t, _ in zip(texts, range(num_samples), strict=False)
    ]
    found: dict[str, Tensor] = {}

    def see(name, x):
        level = x.reshape(-1, x.shape[-1]).abs().amax(0).float().cpu()
        found[name] = torch.maximum(found[name], level) if name in found else level

    _hooked(model, samples, see)
    return found


def smooth_lm(model: nn.Module, scales: dict[str, Tensor], alpha: float = 0.5,
              parity: bool = False) -> None:
    """SmoothQuant on every norm edge, of any family."""
    for name, layer, edge in _norm_edges(model):
        level = scales[f"{name}.{edge.readers[0]}"]
        fcs = [layer.get_submodule(p) for p in edge.readers]
        if parity:
            smooth_ln_fcs(layer.get_submodule(edge.source), fcs, level, alpha, parity=True)
            continue
        w = torch.stack([fc.weight.detach().abs().amax(0).float() for fc in fcs]).amax(0)
        apply_scale(layer, edge, smooth_scale(level.to(w.device), w, alpha), describe(model))
