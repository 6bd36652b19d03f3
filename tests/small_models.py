"""The shared small models for tables of perplexities, further outlier seeds, and resumable results.

Protocol of every table: the first 64 windows of 256 tokens of books_test.txt, no overlap, no BOS,
float32; calibration on the first 32 windows of 256 tokens of books_calibration.txt. Options are
chosen on "held-out": 64 windows of the calibration text that no method sees.

    python tests/small_models.py opt-tiny-outliers 1 DIR     # with other outliers, as a directory
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from conftest import SHARED
from fewbit.calibrate import Windows, cut, read_text, tokenize
from fewbit.evaluate import perplexity
from fewbit.families import decoder_layers, describe
from fewbit.transforms.edges import apply_scale, edges

WINDOW, CALIBRATION = 256, 32
TEXTS = ("test", "held-out")


@dataclass
class Bench:
    """A model with its calibration windows and the tokens that it is scored on."""

    model: nn.Module
    calibration: Windows
    tokens: Tensor

    def score(self, windows: int = 64) -> float:
        """Perplexity of the model as it is now."""
        return float(perplexity(self.model, self.tokens, WINDOW, limit=windows, batch=8))


def load(name: str, seed: int = 0, text: str = "test") -> Bench:
    """A model of ../shared/models; "-outliers" with a ``seed`` above 0 has other ones than those,
    "-mild" has three a norm (1 %) that are 2 to 6 times larger."""
    kind = name.rpartition("-")[2]
    made = kind == "mild" or (kind == "outliers" and seed > 0)
    path = SHARED / "models" / (name.removesuffix(f"-{kind}") if made else name)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.eval().requires_grad_(False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = tokenize(read_text(SHARED / "data/books_calibration.txt"), tokenizer)
    data = cut(ids, WINDOW, CALIBRATION, "books_calibration.txt")
    if made:
        mild = {"channels": 3, "gain": (2.0, 6.0)} if kind == "mild" else {}
        add_outliers(model, data, seed, **mild)
    if text == "test":
        tokens = tokenize(read_text(SHARED / "data/books_test.txt"), tokenizer)
    else:
        tokens = ids[WINDOW * CALIBRATION * 2 :]
    return Bench(model, data, tokens)


@torch.no_grad()
def add_outliers(
    model: nn.Module, data: Windows, seed: int, channels: int = 6, pool: int = 48,
    gain: tuple[float, float] = (20.0, 60.0),
) -> dict[str, list[int]]:
    """Activation outliers as large models have them, in place; the function stays as it is.

    Of each norm's ``pool`` outputs that carry most energy on ``data``, ``channels`` at random are
    multiplied by a random ``gain``, and the columns of the linears that read them divided by it.
    Returns the channels by norm.
    """
    family, chosen = describe(model), {}
    generator = torch.Generator().manual_seed(seed)
    energy: dict[str, Tensor] = {}

    def look(name: str):
        def hook(module, args, output):
            energy[name] = energy.get(name, 0) + output.square().flatten(0, -2).sum(0)

        return hook

    found = [
        (f"{family.layers}.{i}.{edge.source}", layer, edge)
        for i, layer in enumerate(decoder_layers(model, family))
        for edge in edges(layer, family, model.config) if edge.kind == "norm"
    ]
    hooks = [model.get_submodule(n).register_forward_hook(look(n)) for n, _, _ in found]
    for ids in data.batches:
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    for name, layer, edge in found:
        top = energy[name].topk(pool).indices
        picked = top[torch.randperm(pool, generator=generator)[:channels]]
        low, high = gain
        factor = low + (high - low) * torch.rand(channels, generator=generator)
        s = torch.ones_like(energy[name])
        s[picked] = 1 / factor.to(s)
        apply_scale(layer, edge, s, family)
        chosen[name] = sorted(picked.tolist())
    return chosen


class Results:
    """Numbers by key in a JSON file, so that a table that was stopped goes on where it was.

    A key names everything that its number depends on; delete the file after a change of the code.
    """

    def __init__(self, path: str | None) -> None:
        self.path = Path(path) if path else None
        exists = self.path is not None and self.path.exists()
        self.values: dict = json.loads(self.path.read_text()) if exists else {}

    def get(self, key: str, compute: Callable[[], object]) -> object:
        """The stored value of ``key``, or compute() stored."""
        if key not in self.values:
            self.put(key, compute())
        return self.values[key]

    def put(self, key: str, value: object) -> None:
        """Store a value, in the file too, beside what another process has written there."""
        if self.path is not None and self.path.exists():
            self.values = json.loads(self.path.read_text()) | self.values
        self.values[key] = value
        if self.path is not None:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.values, indent=1) + "\n")
            part.replace(self.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a name that load takes")
    parser.add_argument("seed", type=int)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    load(arguments.model, arguments.seed).model.save_pretrained(arguments.output)
    path = SHARED / "models" / arguments.model
    transformers.AutoTokenizer.from_pretrained(path).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
