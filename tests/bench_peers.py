"""Other packages in the protocol of `fewbit bench accuracy`: perplexity, KL, seconds, memory.

    python tests/bench_peers.py [--models llama-tiny ..] [--schemes w4a16g128 ..] [--json FILE]

Decoder linears only; asymmetric groups for weights alone, symmetric rows and tokens where
activations are quantised too, in so far as a package has them; otherwise each package's defaults,
on the same calibration windows. Packages pin different versions of their dependencies, so each may
need an environment of its own, with fewbit beside it:

    pip install hqq torchao optimum-quanto bitsandbytes | auto-round | llmcompressor | gptqmodel
        | neural-compressor-pt

One that is not installed is named and left out, one that cannot do a scheme says why. Beside them
fewbit's own methods. A cell that the JSON file holds is not measured again, so several environments
fill one file. scripts/accuracy_table.py makes the README's table of it. Seconds are also given as
processor time, for machines that are busy with something else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import fewbit
from conftest import SHARED
from fewbit import calibrate, checkpoint, evaluate
from fewbit.bench.accuracy import peak, reset_peak
from fewbit.families import linear_names
from fewbit.scheme import Scheme

MODELS = ["llama-tiny", "llama-tiny-outliers", "opt-tiny", "opt-tiny-outliers"]
SCHEMES = ["w4a16g128", "w3a16g128", "w2a16g64", "w8a8", "w4a8", "w4a4"]
WINDOW, WINDOWS, SAMPLES = 256, 64, 32


Later = Callable[[], torch.nn.Module]  # what is scored, where it is not the model that was given


class Cell(NamedTuple):
    """What a peer gets."""

    path: Path
    model: torch.nn.Module
    tokenizer: object
    data: calibrate.Windows
    scheme: Scheme

    @property
    def weight_only(self) -> bool:
        return self.scheme.activation_bits == 16

    def linears(self) -> dict[str, torch.nn.Linear]:
        return {name: self.model.get_submodule(name) for name in linear_names(self.model)}

    def need(self, possible: bool, what: str) -> None:
        if not possible:
            raise NotImplementedError(what)

    def run(self, model: torch.nn.Module) -> None:
        """The calibration windows through a model."""
        for ids in self.data.batches:
            model(input_ids=ids, use_cache=False)


@torch.no_grad()
def hqq(cell: Cell) -> None:
    from hqq.core.quantize import Quantizer

    cell.need(cell.weight_only, "weights only")
    scheme = cell.scheme
    for linear in cell.linears().values():
        q, meta = Quantizer.quantize(
            linear.weight.data, nbits=scheme.bits, group_size=scheme.group_size, axis=1,
            device="cpu", compute_dtype=torch.float32,
        )
        linear.weight.copy_(Quantizer.dequantize(q, meta).reshape(linear.weight.shape))


def _torchao_config(scheme: Scheme):
    from torchao import quantization as ao
    from torchao.quantization.granularity import PerAxis, PerGroup

    dtype = getattr(torch, f"int{scheme.bits}")
    if scheme.activation_bits == 16:
        group = PerGroup(scheme.group_size)
        return ao.IntxWeightOnlyConfig(dtype, group, mapping_type=ao.MappingType.ASYMMETRIC)
    if scheme.bits == 8:
        return ao.Int8DynamicActivationInt8WeightConfig()
    return ao.Int8DynamicActivationIntxWeightConfig(dtype, PerAxis(0))


@torch.no_grad()
def torchao(cell: Cell) -> None:
    from torchao.quantization import quantize_

    cell.need(cell.scheme.activation_bits >= 8, "8-bit activations at least")
    inside = set(cell.linears().values())
    quantize_(cell.model, _torchao_config(cell.scheme), lambda module, name: module in inside)


@torch.no_grad()
def torchao_smoothquant(cell: Cell) -> None:
    from torchao.prototype.smoothquant import SmoothQuantConfig, SmoothQuantObservedLinear
    from torchao.quantization import quantize_

    cell.need((cell.scheme.bits, cell.scheme.activation_bits) == (8, 8), "w8a8 only")
    inside, base = set(cell.linears().values()), _torchao_config(cell.scheme)
    quantize_(
        cell.model, SmoothQuantConfig(base, "prepare"), lambda module, name: module in inside
    )
    cell.run(cell.model)
    quantize_(
        cell.model, SmoothQuantConfig(base, "convert"),
        lambda module, name: isinstance(module, SmoothQuantObservedLinear),
    )


def quanto(cell: Cell) -> None:
    from optimum.quanto import Calibration, freeze, qint2, qint4, qint8, quantize

    scheme = cell.scheme
    weights = {2: qint2, 4: qint4, 8: qint8}.get(scheme.bits)
    cell.need(weights is not None, "2, 4 and 8 bits only")
    cell.need(scheme.activation_bits >= 8, "8-bit activations at least")
    activations = None if cell.weight_only else qint8
    quantize(cell.model, weights=weights, activations=activations, include=list(cell.linears()))
    if activations is not None:  # one static scale a tensor: it has no dynamic ones
        with torch.no_grad(), Calibration():
            cell.run(cell.model)
    freeze(cell.model)


@torch.no_grad()
def bitsandbytes(cell: Cell) -> None:
    import bitsandbytes as bnb

    scheme = cell.scheme
    if (scheme.bits, scheme.activation_bits) == (8, 8):
        for name, linear in cell.linears().items():
            bias = linear.bias is not None
            new = bnb.nn.Linear8bitLt(
                linear.in_features, linear.out_features, bias, has_fp16_weights=False, threshold=6.0
            )
            new.load_state_dict(linear.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(cell.model.get_submodule(parent), child, new.to("cpu"))
        cell.model(input_ids=cell.data.batches[0])  # quantises on the first call
        return
    cell.need(scheme.bits == 4 and cell.weight_only, "NF4 (blocks of 128) and LLM.int8() only")
    for linear in cell.linears().values():
        q, state = bnb.functional.quantize_4bit(linear.weight.data, blocksize=128, quant_type="nf4")
        linear.weight.copy_(bnb.functional.dequantize_4bit(q, state))


def auto_round(cell: Cell) -> None:
    from auto_round import AutoRound

    scheme, activations = cell.scheme, {}
    if not cell.weight_only:
        activations = dict(
            act_bits=scheme.activation_bits, act_group_size=-1, act_dynamic=True, act_sym=True,
            act_data_type="int",
        )
    AutoRound(
        cell.model, cell.tokenizer, bits=scheme.bits, group_size=scheme.group_size,
        sym=scheme.symmetric, dataset=[{"input_ids": ids} for ids in cell.data.batches],
        seqlen=WINDOW, nsamples=len(cell.data.batches), batch_size=8, device_map="cpu", amp=False,
        **activations,
    ).quantize()


def _llm_compressor(cell: Cell, modifiers) -> None:
    """``modifiers(config)`` of llm-compressor, run on the calibration windows."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot

    scheme = cell.scheme
    group = scheme.group_size
    weights = QuantizationArgs(
        num_bits=scheme.bits, symmetric=scheme.symmetric,
        strategy="channel" if group == -1 else "group", group_size=None if group == -1 else group,
    )
    inputs = None if cell.weight_only else QuantizationArgs(
        num_bits=scheme.activation_bits, symmetric=True, strategy="token", dynamic=True
    )
    groups = {"all": QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=inputs
    )}  # fmt: skip
    rows = [{"input_ids": ids[0], "attention_mask": ids[0] * 0 + 1} for ids in cell.data.batches]
    oneshot(
        model=cell.model, tokenizer=cell.tokenizer, dataset=torch.utils.data.DataLoader(rows),
        recipe=modifiers(dict(config_groups=groups, ignore=["lm_head"])),
        num_calibration_samples=len(rows), max_seq_length=WINDOW,
    )


def llm_compressor_gptq(cell: Cell) -> None:
    from llmcompressor.modifiers.gptq import GPTQModifier

    cell.need(cell.weight_only, "its recipes smooth or rotate first")
    _llm_compressor(cell, lambda config: [GPTQModifier(**config)])


def llm_compressor_awq(cell: Cell) -> None:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    cell.need(cell.weight_only, "weights only")
    _llm_compressor(cell, lambda config: [AWQModifier(), QuantizationModifier(**config)])


def llm_compressor_smoothquant(cell: Cell) -> None:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    cell.need(not cell.weight_only, "for quantised activations")
    _llm_compressor(
        cell, lambda config: [SmoothQuantModifier(smoothing_strength=0.5), GPTQModifier(**config)]
    )


def llm_compressor_rotated(cell: Cell) -> None:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier

    _llm_compressor(cell, lambda config: [
        SpinQuantModifier(rotations=["R1", "R2", "R4"]), GPTQModifier(**config)
    ])  # fmt: skip


def gptqmodel_gptq(cell: Cell, **options) -> Later:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    cell.need(cell.weight_only, "weights only")
    scheme = cell.scheme
    config = QuantizeConfig(
        bits=scheme.bits, group_size=scheme.group_size, sym=scheme.symmetric, **options
    )
    peer = GPTQModel.load(str(cell.path), config, device="cpu", dtype=torch.float32)
    rows = [{"input_ids": ids, "attention_mask": ids * 0 + 1} for ids in cell.data.batches]
    peer.quantize(rows, tokenizer=cell.tokenizer, batch_size=8, backend=BACKEND.GPTQ_TORCH)

    def stored() -> torch.nn.Module:  # no kernel of its own runs every width in float32
        with tempfile.TemporaryDirectory() as folder:
            peer.save(folder)
            return fewbit.load(folder)

    return stored


def gptqmodel_gptaq(cell: Cell) -> Later:
    from gptqmodel.quantization.config import GPTAQConfig

    return gptqmodel_gptq(cell, gptaq=GPTAQConfig())


def _neural_compressor(cell: Cell, name: str, **arguments) -> Later:
    from neural_compressor.torch import quantization

    cell.need(cell.weight_only, "without its extension for one vendor's CPUs, weights only")
    make, scheme = getattr(quantization, name), cell.scheme
    config = make(
        bits=scheme.bits, use_sym=scheme.symmetric, group_size=scheme.group_size, **arguments
    )
    config.set_local("lm_head", make(dtype="fp32"))
    model = quantization.prepare(cell.model, config, example_inputs=cell.data.batches[0])
    cell.run(model)
    model = quantization.convert(model)
    return lambda: model


def neural_compressor_gptq(cell: Cell) -> Later:
    return _neural_compressor(cell, "GPTQConfig")


def neural_compressor_awq(cell: Cell) -> Later:
    return _neural_compressor(cell, "AWQConfig")


PEERS = {  # label: (package, what it does)
    "torchao": ("torchao", torchao),
    "torchao smoothquant": ("torchao", torchao_smoothquant),
    "optimum-quanto": ("optimum.quanto", quanto),
    "bitsandbytes": ("bitsandbytes", bitsandbytes),
    "hqq": ("hqq", hqq),
    "auto-round": ("auto_round", auto_round),
    "llm-compressor gptq": ("llmcompressor", llm_compressor_gptq),
    "llm-compressor awq": ("llmcompressor", llm_compressor_awq),
    "llm-compressor smoothquant+gptq": ("llmcompressor", llm_compressor_smoothquant),
    "llm-compressor quarot+gptq": ("llmcompressor", llm_compressor_rotated),
    "gptqmodel gptq": ("gptqmodel", gptqmodel_gptq),
    "gptqmodel gptaq": ("gptqmodel", gptqmodel_gptaq),
    "neural-compressor gptq": ("neural_compressor", neural_compressor_gptq),
    "neural-compressor awq": ("neural_compressor", neural_compressor_awq),
}
OURS = {  # by whether activations are quantised: label: the arguments of quantize_
    False: ("rtn", "awq", "gptq", "qronos", "quarot+qronos"),
    True: ("rtn", "smoothquant", "smoothquant+gptq", "quarot+gptq", "quarot+qronos"),
}


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def measure(path: Path, scheme: str, label: str, bench: Bench) -> dict:
    model, parsed = checkpoint.load_float(path), Scheme.parse(scheme)
    cell = Cell(path, model, bench.tokenizer, bench.data, parsed)
    before, started, busy = reset_peak(), time.monotonic(), time.process_time()
    if label in PEERS:
        try:
            later = PEERS[label][1](cell)
        except NotImplementedError as reason:
            return {"refused": str(reason)}
        except Exception as error:  # of a package that is not ours: the table goes on
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    else:
        later = None
        fewbit.quantize_(
            model, label.removeprefix("fewbit "), scheme, bench.data, progress=False,
            keep_float=False,
        )
    seconds, busy = time.monotonic() - started, time.process_time() - busy
    memory = peak() - before
    score = evaluate.compare(
        later() if later else model, bench.test, bench.reference, batch=8
    )
    return {
        "perplexity": score.perplexity, "kl": score.kl, "seconds": seconds,
        "cpu_seconds": busy, "extra_peak_bytes": memory,
    }


class Bench:
    """One model's texts and the float model's predictions."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = checkpoint.load_tokenizer(path)
        test, calibration = (
            calibrate.tokenize(calibrate.read_text(SHARED / "data" / name), self.tokenizer)
            for name in ("books_test.txt", "books_calibration.txt")
        )
        self.test = calibrate.cut(test, WINDOW, WINDOWS, "books_test.txt")
        self.data = calibrate.cut(calibration, WINDOW, SAMPLES, "books_calibration.txt")
        self.reference = evaluate.log_probabilities(checkpoint.load_float(path), self.test, batch=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--json", type=Path, default=Path("peers.json"))
    arguments = parser.parse_args()
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    peers = [name for name in arguments.peers if installed(PEERS[name][0])]
    for name in arguments.peers:
        if name not in peers:
            print(f"{name}: not installed")
    for model in arguments.models:
        path, bench = SHARED / "models" / model, None
        for scheme in arguments.schemes:
            ours = OURS[Scheme.parse(scheme).activation_bits < 16]
            for label in (*(f"fewbit {name}" for name in ours), *peers):
                key = f"{model} {scheme} {label}"
                if key in results:
                    continue
                bench = bench or Bench(path)
                results[key] = measure(path, scheme, label, bench)
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")
                print(key, results[key], flush=True)


if __name__ == "__main__":
    main()
