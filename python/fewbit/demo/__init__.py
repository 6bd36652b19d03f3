"""A small model to try things on: an embedded one without a network, a real one by name.

The embedded model is a tiny Llama in `model/`, made by `scripts/train_demo_model.py`; its outlier
channels were put in on purpose, by a rescaling that leaves its function as it is. The text it was
trained on comes from `fewbit.demo.text`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..calibrate import Windows

MODEL_DIR = Path(__file__).parent / "model"
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # never pickled weights or code


@dataclass(frozen=True)
class Demo:
    """What every notebook begins with; ``test`` is text that ``calibration`` never saw."""

    model: nn.Module  # float32, in evaluation mode
    tokenizer: Any
    calibration: Windows  # of token ids [1, window]
    test: Tensor  # token ids [n]
    window: int

    def perplexity(self, model: nn.Module | None = None, windows: int = 8) -> float:
        """Of ``model`` (this one, as it is now) on the first ``windows`` windows of ``test``."""
        from ..evaluate import perplexity

        model = self.model if model is None else model
        return float(perplexity(model, self.test, self.window, limit=windows))


def load_demo(
    name: str | None = None,
    texts: tuple[str | Path, str | Path] | None = None,
    samples: int = 8,
    window: int = 256,
) -> Demo:
    """A float model, its tokenizer, ``samples`` windows to calibrate on, and tokens to measure on.

    Without ``name`` the embedded model, which needs no network. Otherwise a model directory, or a
    model on the Hugging Face hub such as "HuggingFaceTB/SmolLM2-135M", whose files are downloaded
    once. ``texts`` are two UTF-8 files, to calibrate and to measure on; without them a named model
    takes WikiText-2, its train and its test split. Raises MissingExtraError when transformers, or
    for WikiText-2 datasets, is not installed.
    """
    from ..calibrate import cut, read_text, tokenize
    from ..checkpoint import load_float, load_tokenizer
    from .text import CALIBRATION_SEED, EVALUATION_SEED, generate

    if texts is not None:
        learn, measure = (read_text(path) for path in texts)
    elif name is None:
        learn, measure = generate(CALIBRATION_SEED, 60_000), generate(EVALUATION_SEED, 40_000)
    else:
        learn, measure = _wikitext()
    source = MODEL_DIR if name is None else _directory(name)
    model, tokenizer = load_float(source), load_tokenizer(source)
    calibration = cut(tokenize(learn, tokenizer), window, samples, "the calibration text")
    return Demo(model, tokenizer, calibration, tokenize(measure, tokenizer), window)


def _directory(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from ..errors import MissingExtraError

    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError(
            f"{name!r} is no directory, and the hub needs huggingface_hub: "
            "pip install 'fewbit[hf]'"
        ) from error
    return Path(snapshot_download(name, allow_patterns=_FILES))


def _wikitext() -> tuple[str, str]:
    from ..errors import MissingExtraError

    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError("WikiText-2 needs datasets: pip install 'fewbit[data]'") from error
    parts = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
    learn = "".join(parts["train"][:4000]["text"])
    return learn, "\n\n".join(parts["test"]["text"])
