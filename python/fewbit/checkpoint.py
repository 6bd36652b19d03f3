"""Save a quantised model as a directory that engines load, and load such directories.

Model classes and tokenizers are transformers' own; files are written and read by shards.py, whose
layouts are those of formats/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from . import card, formats
from .conversion import finish
from .errors import (
    AlreadyQuantizedError,
    CheckpointError,
    FormatLimitError,
    MissingExtraError,
    NotAModelError,
    NotQuantizedError,
    OutputError,
    UnsupportedError,
)
from .families import linear_names
from .formats import Format
from .formats.base import EXTRAS
from .integrations import attach
from .linear import PackedLinear
from .linearise import linearise_known
from .modules import build_linear, format_for, module_tensors
from .pipeline import replace_module
from .recipes import Recipe
from .report import REPORT, Report
from .runtime import BESIDE, SECTION, hang, refuse_replaced_norms, settings
from .shards import Shards, Writer, same_directory
from .stored import find
from .transforms.rotate import plain_activation


def transformers():
    """The transformers package, or MissingExtraError with the install command."""
    try:
        import transformers
    except ImportError:
        raise MissingExtraError(
            "reading and writing model directories needs transformers: pip install 'fewbit[hf]'"
        ) from None
    return transformers


def save(
    model: nn.Module,
    path: str | Path,
    format: str = "compressed-tensors",
    tokenizer=None,
    max_shard_size: int = 5_000_000_000,
    report: Report | None = None,
) -> list[str]:
    """Write a quantised transformers model to the directory ``path``; returns the file names.

    ``format``: a name of ``fewbit.formats.WRITERS``. What is not quantised is written in the type
    it has. A model card README.md is written too, with the figures of ``report`` (what
    ``quantize_`` returned) where one is given, and the report itself, for ``fewbit report``; one of
    an earlier model in ``path`` goes. Nothing is half-written: files get their names when
    all of them are complete. Raises UsageError for a model without packed linears,
    UnsupportedError where one does not fit.
    """
    writer_format = formats.get(format)
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise UnsupportedError("only transformers models are saved: the model has no config")
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    if not packed:
        raise NotQuantizedError("nothing is quantised: call fewbit.quantize_ first")
    source = getattr(config, "_name_or_path", "")
    if source and same_directory(source, path):
        raise OutputError(f"{path} is the directory that the model was read from")
    online = settings(model)
    if online and format != "fewbit":
        raise FormatLimitError(f"{next(iter(online))} {BESIDE}")
    refuse_replaced_norms(model)
    writer_format = format_for(writer_format, packed.values())
    schemes = {name: module.scheme for name, module in packed.items()}
    shapes = {name: (module.out_features, module.in_features) for name, module in packed.items()}
    for name, (n, k) in shapes.items():
        reason = writer_format.refuse(schemes[name], n, k)
        if reason:
            raise FormatLimitError(f"{name} does not fit format {format}: {reason}")
    ignore = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in packed]
    section = writer_format.config(schemes, ignore)

    with Writer(path, max_shard_size) as writer:
        tied = set() if "lm_head" in packed else tied_names(model)
        for _, tensors in stored_tensors(model, "", writer_format):
            if not tied.issuperset(tensors):
                writer.add(tensors)
        described_as = described(model, _float_dtype(model))
        if "lm_head" in packed:
            described_as["tie_word_embeddings"] = False
        if online:
            described_as[SECTION] = online
        files = finish(writer, described_as, section, _side_files(model, report))
    card.clear(path, files)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    card.write(path, report, source)
    return files


def stored_tensors(
    root: nn.Module, prefix: str, format: Format
) -> Iterator[tuple[bool, dict[str, Tensor]]]:
    """What is stored of a model or a layer, by full name: (is it packed, tensors of one shard)."""
    packed = {n: m for n, m in root.named_modules() if isinstance(m, PackedLinear)}
    for name, module in packed.items():
        tensors = module_tensors(module, format, f"{prefix}{name}")
        if module.bias is not None:
            tensors["bias"] = module.bias
        yield True, {f"{prefix}{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    for name, tensor in root.state_dict().items():
        if name.rpartition(".")[0] not in packed:
            yield False, {f"{prefix}{name}": tensor}


def tied_names(model: nn.Module) -> set[str]:
    """Parameters that are stored under another name only."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return set()
    return set(getattr(model, "_tied_weights_keys", None) or ())


def described(model: nn.Module, dtype: torch.dtype) -> dict:
    """config.json of a model whose float tensors are stored in ``dtype``."""
    config = model.config.to_diff_dict()
    for key in ("_name_or_path", "quantization_config"):
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    return config


def check_fits(model: nn.Module, recipe: Recipe, format: str) -> None:
    """UnsupportedError, before any work, if the result will have no place in the format."""
    writer_format = formats.get(format)
    if format != "fewbit" and any(transform.online for transform in recipe.transforms):
        raise FormatLimitError(f"method {recipe.name!r} with scheme {recipe.scheme} {BESIDE}")
    for key in (key for key in recipe.solver.leaves if key not in writer_format.holds):
        raise FormatLimitError(
            f"method {recipe.name!r} leaves {EXTRAS[key]}, for which format {format} has no place"
        )
    for name in linear_names(model):
        linear = model.get_submodule(name)
        for scheme in recipe.possible_schemes:
            reason = writer_format.refuse(scheme, linear.out_features, linear.in_features)
            if reason:
                raise FormatLimitError(f"{name} does not fit format {format}: {reason}")


def _float_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _side_files(model: nn.Module, report: Report | None) -> dict[str, bytes]:
    files = {}
    if (generation := getattr(model, "generation_config", None)) is not None:
        files["generation_config.json"] = generation.to_json_string().encode()
    if report is not None:
        files[REPORT] = report.text().encode()
    return files


def load(path: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """A quantised model directory, in any format that fewbit reads, onto fewbit's kernels.

    Returns the transformers model in eval mode, its quantised linears as PackedLinear and all else
    in ``dtype`` (None: as stored). Scales and codes are as stored in any case. Raises
    CheckpointError for a directory that is damaged, incomplete or not quantised.
    """
    shards = Shards(path)
    if "quantization_config" not in shards.config:
        raise NotQuantizedError(f"{path} is not quantised: its config.json has no such section")
    stored = find(shards, formats.parse(shards.config["quantization_config"]))
    model = empty_model(path)
    linearise_known(model)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in stored.items():
        if name not in linears:
            raise CheckpointError(f"{name} is quantised in the files, but no Linear of the model")
        bias = shards.read(f"{name}.bias") if f"{name}.bias" in shards else None
        replace_module(model, name, build_linear(linear, shards, bias, model.get_submodule(name)))
    signs = hang(model, shards.config.get(SECTION, {}))
    used = {full for linear in stored.values() for full in linear.names.values()}
    used |= {f"{name}.bias" for name in stored}
    rest = {name: shards.read(name) for name in shards.by_file() if name not in used}
    if lacking := set(signs) - rest.keys():
        raise CheckpointError(f"{path} lacks {min(lacking)!r}, which the model needs")
    _fill(model, rest, set(stored))
    model.tie_weights()
    missing = [n for n, p in model.named_parameters() if p.is_meta]
    if missing:
        raise CheckpointError(f"{path} lacks {min(missing)!r}, which the model needs")
    for name in stored:  # codebook weights are float linears: one type with the rest
        if isinstance(model.get_submodule(name), nn.Linear):
            model.get_submodule(name).to(_float_dtype(model))
    if dtype is not None:
        model.to(dtype)
    attach(model, shards.config["quantization_config"])
    return model.eval()


def _fill(model: nn.Module, tensors: dict, packed: set[str]) -> None:
    """Put stored tensors into the empty model, refusing names and shapes it does not have."""
    own = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in packed
    }
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"\.inv_freq$"]
    for name, tensor in tensors.items():
        if name not in own and any(re.search(pattern, name) for pattern in ignored):
            continue
        if name not in own:
            raise CheckpointError(f"the files hold {name!r}, which the model does not have")
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{name} is {list(tensor.shape)}, the model needs {list(own[name].shape)}"
            )
    tensors = {name: tensor for name, tensor in tensors.items() if name in own}
    model.load_state_dict(tensors, strict=False, assign=True)


def empty_model(path: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model that a directory's config.json describes: real buffers, parameters without data.

    ``dtype``: of what is computed (None: as the config says).
    """
    hf = transformers()
    if not (Path(path) / "config.json").is_file():
        raise NotAModelError(f"{path} is not a model directory: it has no config.json")
    try:
        config = hf.AutoConfig.from_pretrained(path, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # its modules are made here, not by transformers
        named = {} if dtype is None else {"dtype": dtype}
        with _parameters_on_meta(), plain_activation(config):
            return hf.AutoModelForCausalLM.from_config(config, **named)
    except (ValueError, KeyError, OSError) as error:
        raise NotAModelError(f"{path} does not describe a causal model: {error}") from error


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made inside the block take no memory; buffers (rotary tables) are real."""
    register = nn.Module.register_parameter

    def on_meta(module, name, parameter):
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def load_float(path: str | Path, dtype: torch.dtype | None = torch.float32) -> nn.Module:
    """A float model directory (safetensors), through transformers; never from the network."""
    hf = transformers()
    shards = Shards(path)  # refuses what is not a safetensors model directory
    refuse_quantized(shards)
    try:
        with _quiet(hf):
            model = hf.AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype or "auto", local_files_only=True, use_safetensors=True
            )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise NotAModelError(f"{path} is not a causal model: {error}") from error
    return model.eval()


def refuse_quantized(shards: Shards) -> None:
    """UsageError, with the method that the config names, for a model that is not float."""
    section = shards.config.get("quantization_config")
    if section is not None:
        method = section.get("quant_method") if isinstance(section, dict) else section
        raise AlreadyQuantizedError(f"{shards.path} is already quantised (quant_method {method!r})")


@contextmanager
def _quiet(hf) -> Iterator[None]:
    """Without transformers' own loading bar: a model of megabytes or gigabytes is one event."""
    logging = hf.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_any(path: str | Path, dtype: torch.dtype | None = torch.float32) -> nn.Module:
    """A model directory, quantised or float."""
    if "quantization_config" in Shards(path).config:
        return load(path, dtype)
    return load_float(path, dtype)


def load_tokenizer(path: str | Path):
    """The tokenizer of a model directory, from its own files."""
    hf = transformers()
    try:
        return hf.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise NotAModelError(f"{path} has no tokenizer that loads: {error}") from error
