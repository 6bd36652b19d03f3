"""The small trained models, quantised by rounding."""

import torch

from fewbit.families import linear_names
from fewbit.linear import PackedLinear
from fewbit.pipeline import replace_module
from fewbit.scheme import Scheme


def quantized(path, scheme, dtype="auto"):
    """A model whose decoder linears are PackedLinear."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    scheme = Scheme.parse(scheme)
    for name in list(linear_names(model)):
        packed = PackedLinear.from_linear(model.get_submodule(name), scheme)
        replace_module(model, name, packed)
    return model


def tokens():
    return torch.arange(2, 66).view(2, 32)
