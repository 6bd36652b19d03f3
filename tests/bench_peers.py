"""Other packages in the protocol of `fewbit bench accuracy`: perplexity, KL divergence, seconds.

    python tests/bench_peers.py [--models llama-tiny ..] [--schemes w4a16g128 ..] [--json FILE]

Weights only, decoder linears only, asymmetric groups where a package has them. A package that is
not installed is named and left out: pip install hqq torchao optimum-quanto auto-round bitsandbytes.
Beside them fewbit's rtn, awq, gptq and awq+qronos in the same run. Results are kept in the JSON
file after every cell; a cell that is there is not measured again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path

import torch

import fewbit
from conftest import SHARED
from fewbit import calibrate, checkpoint, evaluate
from fewbit.families import linear_names
from fewbit.scheme import Scheme

MODELS = ["llama-tiny", "llama-tiny-outliers", "opt-tiny", "opt-tiny-outliers"]
SCHEMES = ["w4a16g128", "w3a16g128", "w2a16g64"]


def linears(model):
    return [model.get_submodule(name) for name in linear_names(model)]


@torch.no_grad()
def hqq(model, tokenizer, data, scheme):
    from hqq.core.quantize import Quantizer

    for linear in linears(model):
        q, meta = Quantizer.quantize(
            linear.weight.data, nbits=scheme.bits, group_size=scheme.group_size, axis=1,
            device="cpu", compute_dtype=torch.float32,
        )
        linear.weight.copy_(Quantizer.dequantize(q, meta).reshape(linear.weight.shape))


def torchao(model, tokenizer, data, scheme):
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{scheme.bits}"), granularity=PerGroup(scheme.group_size)
    )
    inside = set(linears(model))
    quantize_(model, config, filter_fn=lambda module, name: module in inside)


def quanto(model, tokenizer, data, scheme):
    from optimum.quanto import freeze, qint2, qint4, quantize

    if scheme.bits not in (2, 4):
        raise NotImplementedError("2 and 4 bits only")
    include = list(linear_names(model))
    quantize(model, weights={2: qint2, 4: qint4}[scheme.bits], include=include)
    freeze(model)


@torch.no_grad()
def bitsandbytes(model, tokenizer, data, scheme):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    if scheme.bits != 4:
        raise NotImplementedError("4 bits only (NF4, blocks of 128, float scales)")
    for linear in linears(model):
        q, state = quantize_4bit(linear.weight.data, blocksize=128, quant_type="nf4")
        linear.weight.copy_(dequantize_4bit(q, state))


def auto_round(model, tokenizer, data, scheme):
    from auto_round import AutoRound

    rounder = AutoRound(
        model, tokenizer, bits=scheme.bits, group_size=scheme.group_size, sym=False,
        dataset=[{"input_ids": ids} for ids in data.batches], seqlen=data.batches[0].shape[1],
        nsamples=len(data.batches), batch_size=8, device_map="cpu", amp=False,
    )
    rounder.quantize()


PEERS = {
    "hqq": hqq, "torchao": torchao, "optimum.quanto": quanto, "bitsandbytes": bitsandbytes,
    "auto_round": auto_round,
}
OURS = ("rtn", "awq", "gptq", "awq+qronos")


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--json", type=Path, default=Path("peers.json"))
    arguments = parser.parse_args()
    peers = [name for name in arguments.peers if installed(name)]
    for name in set(arguments.peers) - set(peers):
        print(f"{name}: not installed")
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    for name in arguments.models:
        path = SHARED / "models" / name
        tokenizer = checkpoint.load_tokenizer(path)
        ids = {
            part: calibrate.tokenize(
                calibrate.read_text(SHARED / "data" / f"books_{part}.txt"), tokenizer
            )
            for part in ("test", "calibration")
        }
        test = calibrate.cut(ids["test"], 256, 64, "books_test.txt")
        data = calibrate.cut(ids["calibration"], 256, 32, "books_calibration.txt")
        reference = None
        for scheme in arguments.schemes:
            for label in (*OURS, *peers):
                key = f"{name} {scheme} {label}"
                if key in results:
                    continue
                model = checkpoint.load_float(path)
                if reference is None:
                    reference = evaluate.log_probabilities(model, test, batch=8)
                started = time.monotonic()
                try:
                    if label in PEERS:
                        PEERS[label](model, tokenizer, data, Scheme.parse(scheme))
                    else:
                        fewbit.quantize_(
                            model, label, scheme, data, progress=False, keep_float=False
                        )
                except NotImplementedError as reason:
                    results[key] = {"refused": str(reason)}
                else:
                    seconds = time.monotonic() - started
                    score = evaluate.compare(model, test, reference, batch=8)
                    results[key] = {
                        "perplexity": score.perplexity, "kl": score.kl, "seconds": seconds
                    }
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")
                print(key, results[key], flush=True)


if __name__ == "__main__":
    main()
