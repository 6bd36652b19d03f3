"""Damaged and hostile model directories by the hundred thousand.

    python tests/formats/fuzz_checkpoints.py --cases 1000000 --seed 1

Starts from a small valid directory of every format and damages config.json, the index, safetensors
headers and the data behind them. Each case must end as codes or as a FewbitError, within a second;
the process must stay below 512 MiB. A failure prints the case's number, which ``--only`` repeats.
"""

import argparse
import copy
import json
import random
import struct
import tempfile
import time
import warnings
from pathlib import Path

import torch
from strategies import random_codes

from fewbit import formats
from fewbit.errors import FewbitError
from fewbit.formats.bitsandbytes import Bnb4
from fewbit.memory import peak
from fewbit.scheme import Scheme
from fewbit.shards import INDEX, Shards, Writer
from fewbit.stored import find

NASTY = [
    None, True, False, 0, 1, -1, 3, 7, 64, 2**31, 2**63, -(2**63), 2**200, 0.5, 1e308, -0.0,
    "", "x", "a" * 5000, "../../etc/passwd", "\0", "re:(a+)+$", "re:(", "Linear", "int", "float",
    [], {}, [[]], [0], [-1, 4], [2**62, 2**62], {"": {}}, [None] * 50, "int8", "F32", "BOOL",
    [0, 2**63], "model.safetensors", "weight_map", "gptq", "awq", "static", "static-not",
]  # fmt: skip
SCHEMES = {
    "compressed-tensors": [Scheme(4, 32), Scheme(3, 32, True)],
    "int-quantized": [Scheme(8, -1, True, activation_bits=8)],
    "awq": [Scheme(4, 32)],
    "gptq": [Scheme(4, 32, True), Scheme(3, 32)],
    "gptq_v2": [Scheme(2, -1)],
    "llm-int8": [Scheme(8, -1, True, activation_bits=8)],
    "smooth_quant": [Scheme(8, -1, True, activation_bits=8)],
    "fewbit": [Scheme(5, 40)],
}


def seeds():
    """File contents of valid directories, {name: bytes}."""
    found = []
    for name, schemes in SCHEMES.items():
        for scheme in schemes:
            with tempfile.TemporaryDirectory() as folder:
                with Writer(folder, 3000) as writer:
                    for i, module in enumerate(("a.q_proj", "b.q_proj")):
                        codes = random_codes(32, 64, scheme, i, low=1)
                        kept = {"kept": torch.tensor([3, 40]), "kept_weight": torch.ones(32, 2)}
                        extras = kept if name == "fewbit" and i else {}
                        packed = formats.get(name).pack(codes, scheme, **extras)
                        writer.add({f"{module}.{s}": t for s, t in packed.items()})
                    section = formats.get(name).config({"a.q_proj": scheme}, ["lm_head"])
                    writer.finish({"model_type": "llama", "quantization_config": section})
                found.append({p.name: p.read_bytes() for p in Path(folder).iterdir()})
    state = json.dumps({"blocksize": 64, "dtype": "float32", "shape": [32, 64]}).encode()
    with tempfile.TemporaryDirectory() as folder:
        with Writer(folder) as writer:
            writer.add(
                {
                    "a.weight": torch.zeros(1024, 1, dtype=torch.uint8),
                    "a.weight.absmax": torch.ones(32),
                    "a.weight.quant_map": torch.zeros(16),
                    "a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state)).byte(),
                }
            )
            section = {"quant_method": "bitsandbytes", "load_in_4bit": True}
            writer.finish({"quantization_config": section})
        found.append({p.name: p.read_bytes() for p in Path(folder).iterdir()})
    return found


def damage_tree(rng, tree):
    """Replace, remove, add or move one value somewhere in a JSON tree, in place."""
    spots, stack = [], [tree]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            spots.append((node, key))
            if isinstance(node[key], (dict, list)):
                stack.append(node[key])
    if not spots:
        return
    node, key = rng.choice(spots)
    kind = rng.randrange(5)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice([x for x in NASTY if isinstance(x, str)])] = node.pop(key)
    elif kind == 2:
        other, place = rng.choice(spots)
        node[key] = json.loads(json.dumps(other[place])) if place in other else None
    elif kind == 3 and isinstance(node[key], int) and not isinstance(node[key], bool):
        node[key] += rng.choice([-1, 1, 8, 32, -32])
    else:
        node[key] = copy.deepcopy(rng.choice(NASTY))


def damage_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.randint(1, 64)]
        elif kind == 2:
            data[at:at] = rng.choice([b"[" * 3000, b'{"a":' * 2000, b"\xff", b"0" * 500, b'"'])
        else:
            data[at:] = data[at:] + data[:at][: rng.randint(0, 99)]
    return bytes(data)


def damage_header(rng, data):
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(rng.randint(1, 3)):
        damage_tree(rng, header)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = damage_bytes(rng, text)
    size = rng.choice([0, 1, 2**62, len(text) + 1]) if rng.random() < 0.05 else len(text)
    if rng.random() < 0.3:
        body = damage_bytes(rng, body)
    return struct.pack("<Q", size) + text + body


def damaged(rng, files):
    files = dict(files)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(sorted(files))
        if rng.random() < 0.1:
            files[name] = damage_bytes(rng, files[name])
        elif name.endswith(".json"):
            try:
                tree = json.loads(files[name])
                focus = tree.get("quantization_config") if rng.random() < 0.8 else tree
                damage_tree(rng, focus if isinstance(focus, (dict, list)) else tree)
                files[name] = json.dumps(tree).encode()
            except (ValueError, AttributeError, TypeError, RecursionError):
                files[name] = damage_bytes(rng, files[name])
        else:
            try:
                files[name] = damage_header(rng, files[name])
            except (
                ValueError,
                struct.error,
                AttributeError,
                TypeError,
                IndexError,
                RecursionError,
            ):
                files[name] = damage_bytes(rng, files[name])
    if rng.random() < 0.05:
        files.pop(rng.choice(sorted(files)))
    if rng.random() < 0.05:
        files[INDEX] = json.dumps({"weight_map": {"a.q_proj.qweight": rng.choice(NASTY)}}).encode()
    return files


def read(folder):
    """What a loader does: list, check, read every quantised Linear."""
    shards = Shards(folder)
    plan = formats.parse(shards.config.get("quantization_config"))
    for module in find(shards, plan).values():
        module.is_symmetric(shards)
        if isinstance(plan.format, Bnb4):
            plan.format.weight(module.tensors(shards), 32, 64, module.name)
        else:
            module.codes(shards)


def run(cases, seed=0, only=None):
    """Returns how many cases were still readable; raises on the first that is not handled."""
    corpus, good = seeds(), 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for case in range(cases) if only is None else [only]:
            rng = random.Random(f"{seed}-{case}")
            files = damaged(rng, rng.choice(corpus))
            for path in folder.iterdir():
                path.unlink()
            for name, data in files.items():
                (folder / name).write_bytes(data)
            begin = time.process_time()  # other processes may hold the machine
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    read(folder)
                good += 1
            except FewbitError as error:
                assert str(error)
            except BaseException as error:
                error.add_note(f"case {case} of seed {seed}")
                raise
            took = time.process_time() - begin
            assert took < 1, f"case {case} of seed {seed} took {took:.1f} s"
    return good


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    good = run(args.cases, args.seed, args.only)
    seconds = time.perf_counter() - begin
    print(f"{args.cases} cases, {good} readable, {seconds:.0f} s, peak {peak() / 2**20:.0f} MiB")
    assert peak() < 512 * 2**20


if __name__ == "__main__":
    main()
