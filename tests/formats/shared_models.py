"""The small trained models, quantised by rounding."""

import torch

from fewbit.families import linear_names
from fewbit.linear import MixedInt8Linear, PackedLinear
from fewbit.ops import quantize
from fewbit.pipeline import replace_module
from fewbit.pseudo import activation_module
from fewbit.scheme import FLOAT_BITS, Codes, Scheme


def quantized(path, scheme, dtype="auto", threshold=None):
    """A model whose decoder linears are PackedLinear, or run the scheme's integer activations.

    Static scales are those of made-up inputs; ``threshold`` makes it LLM.int8().
    """
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    scheme = Scheme.parse(scheme)
    for name in list(linear_names(model)):
        linear = model.get_submodule(name)
        weight, grid = linear.weight.detach(), (scheme.bits, scheme.group_size, scheme.symmetric)
        codes = Codes(*quantize(weight, *grid, scheme.scale_dtype))
        if threshold is not None:
            packed = MixedInt8Linear(codes, scheme, linear.bias, threshold)
        elif scheme.activation_bits == FLOAT_BITS:
            packed = PackedLinear(codes, scheme, linear.bias)
        else:
            static = scheme.activations == "static"
            scale = torch.tensor([0.05]) if static else None
            shifted = static and not scheme.symmetric_activations
            zero_point = torch.tensor([-3]).int() if shifted else None
            packed = activation_module(codes, scheme, linear.bias, scale, zero_point)
        replace_module(model, name, packed)
    return model


def tokens():
    return torch.arange(2, 66).view(2, 32)
