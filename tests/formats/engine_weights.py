"""Run by test_engines.py, without fewbit: ENGINE TARGET DIR... -> TARGET, the weights as loaded."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def by_transformers(path):
    import transformers

    options = {}
    if "asym" in path.name:  # what compressed-tensors alone needs for zero points
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    logits = model(torch.arange(2, 34).view(1, 32)).logits  # weights unfold at the first call
    assert bool(logits.isfinite().all())
    return {n: m.weight for n, m in model.named_modules() if type(m) is torch.nn.Linear}


def by_bitsandbytes(path):
    import bitsandbytes
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            found[name] = module.weight.CB * (module.weight.SCB / 127)[:, None]
    return found


def by_gptqmodel(path):
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    awq = "awq" in path.name
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(str(path), device="cpu", backend=backend, dtype=torch.float16).model
    found = {}
    for name, module in model.named_modules():
        if not hasattr(module, "qweight"):
            continue
        if awq:
            parts = module.qweight, module.qzeros, module.scales
            found[name] = dequantize_gemm(*parts, bits=4, group_size=128).T
        else:
            found[name] = module.dequantize_weight().T
    return found


if __name__ == "__main__":
    engine, target, *paths = sys.argv[1:]
    for path in map(Path, paths):
        weights = globals()[f"by_{engine}"](path)
        weights = {name: w.detach().float().contiguous() for name, w in weights.items()}
        save_file(weights, f"{target}/{path.name}.safetensors")
