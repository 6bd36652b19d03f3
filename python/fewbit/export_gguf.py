"""A quantised Llama directory as one GGUF file for llama.cpp, through the ``gguf`` package."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from . import formats
from .errors import (
    CheckpointError,
    FormatLimitError,
    MissingExtraError,
    NotAModelError,
    UnsupportedError,
)
from .formats import gguf as layout
from .scheme import Codes
from .shards import Shards, read_json
from .stored import Stored, find

FILE = "model.gguf"
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
LLAMA3_DIGITS = r"\p{N}{1,3}"  # marks the pre-tokenizer of Llama 3
NORMAL, CONTROL, USER, BYTE = 1, 3, 4, 6  # token types


def export(source: str | Path, target: str | Path, rounding: bool = False) -> Path:
    """Write ``target``/model.gguf from the quantised model in ``source``; returns its path.

    Codes and scales are those of the source; rows of q and k are in llama.cpp's rotary order.
    UnsupportedError for other architectures and for what GGUF blocks cannot hold; ``rounding``
    allows Q4_1's float16 minima. One tensor is in memory at a time.
    """
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("writing GGUF needs the gguf package: pip install gguf") from None
    shards = Shards(source)
    config = shards.config
    if (config.get("architectures") or [None])[0] not in ARCHITECTURES:
        raise FormatLimitError(
            f"GGUF is written for {', '.join(ARCHITECTURES)}, not {config.get('architectures')}"
        )
    plan = formats.parse(config.get("quantization_config"))
    stored = find(shards, plan)
    for module in stored.values():
        why = layout.refuse(module.scheme, module.in_features)
        if why:
            raise FormatLimitError(f"{module.name}: {why}")
    Path(target).mkdir(parents=True, exist_ok=True)
    temporary = Path(target) / f".fewbit-{os.getpid()}.gguf"
    writer = gguf.GGUFWriter(temporary, "llama")
    try:
        _metadata(writer, config, stored, gguf)
        _vocabulary(writer, Path(source), config)
        _tensors(writer, gguf, shards, stored, config, rounding)
        os.replace(temporary, Path(target) / FILE)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    return Path(target) / FILE


def _tensors(writer, gguf, shards: Shards, stored: dict[str, Stored], config: dict, rounding: bool):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    taken = {full: module for module in stored.values() for full in module.names.values()}
    plan: list[tuple[str, Stored | str]] = []
    for name in shards.by_file():
        module = taken.get(name)
        if module is not None and name != module.names[module.format.mark]:
            continue
        source = name if module is None else f"{module.name}.weight"
        if source.endswith("inv_freq"):
            continue
        known = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise FormatLimitError(f"{source} has no place in llama.cpp's llama architecture")
        plan.append((known, name if module is None else module))
    for known, item in plan:
        if isinstance(item, Stored):
            kind = layout.kind_of(_effective(shards, item))
            width = item.in_features // layout.BLOCK * layout.BYTES[kind]
            writer.add_tensor_info(
                known,
                (item.out_features, width),
                _uint8(),
                item.out_features * width,
                raw_dtype=gguf.GGMLQuantizationType[kind],
            )
        else:
            array, raw = _float(shards, item, gguf, meta=True)
            writer.add_tensor_info(known, *array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, item in plan:
        if isinstance(item, Stored):
            codes, extras = item.codes(shards)
            if extras:
                raise FormatLimitError(f"{item.name}: GGUF has no place for {', '.join(extras)}")
            codes = Codes(*(_rotary_rows(part, item.name, config) for part in codes))
            try:
                _, data = layout.blocks(codes, _effective(shards, item), rounding)
            except UnsupportedError as error:
                raise type(error)(f"{item.name}: {error.message}") from error
            writer.write_tensor_data(data.numpy())
        else:
            array, _ = _float(shards, item, gguf, config=config)
            writer.write_tensor_data(array)


def _effective(shards: Shards, module: Stored):
    from dataclasses import replace

    return replace(module.scheme, symmetric=module.is_symmetric(shards))


def _float(shards: Shards, name: str, gguf, config: dict | None = None, meta: bool = False):
    """Norms as float32, matrices in their own type; ((shape, dtype, bytes) or data, raw type)."""
    entry = shards.entries[name]
    dtype = torch.float32 if len(entry.shape) < 2 else entry.dtype
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    if dtype not in kinds:
        raise FormatLimitError(f"{name} is {entry.dtype}, which is not written to GGUF")
    raw = gguf.GGMLQuantizationType[kinds[dtype]]
    if meta:
        if dtype == torch.bfloat16:  # numpy has no bfloat16: bytes, with the raw type
            shape = (*entry.shape[:-1], 2 * entry.shape[-1])
            return (shape, _uint8(), torch.Size(shape).numel()), raw
        import numpy

        numpy_dtype = numpy.dtype("float32" if dtype == torch.float32 else "float16")
        return (entry.shape, numpy_dtype, torch.Size(entry.shape).numel() * dtype.itemsize), raw
    tensor = _rotary_rows(shards.read(name), name.removesuffix(".weight"), config).to(dtype)
    tensor = tensor.contiguous()
    if dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint8)
    return tensor.numpy(), raw


def _uint8():
    import numpy

    return numpy.dtype("uint8")


def _rotary_rows(tensor: Tensor, name: str, config: dict) -> Tensor:
    """llama.cpp turns neighbouring channels of a head; transformers turns halves."""
    part = name.rpartition(".")[2]
    if part not in ("q_proj", "k_proj"):
        return tensor
    heads = config["num_attention_heads"]
    if part == "k_proj":
        heads = config.get("num_key_value_heads") or heads
    return tensor.view(heads, 2, len(tensor) // heads // 2, -1).transpose(1, 2).reshape_as(tensor)


def _metadata(writer, config: dict, stored: dict[str, Stored], gguf) -> None:
    def number(key, default=None):
        value = config.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise CheckpointError(f"config.json needs a number for {key!r}, got {value!r:.80}")
        return value

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    head_dim = config.get("head_dim") or hidden // heads
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise FormatLimitError(f"rope scaling {rope!r:.120} is not written to GGUF")
    writer.add_context_length(number("max_position_embeddings"))
    writer.add_embedding_length(hidden)
    writer.add_block_count(number("num_hidden_layers"))
    writer.add_feed_forward_length(number("intermediate_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(number("num_key_value_heads", heads))
    writer.add_layer_norm_rms_eps(number("rms_norm_eps", 1e-6))
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10000.0))))
    writer.add_vocab_size(number("vocab_size"))
    eight = all(module.scheme.bits > 4 for module in stored.values())
    writer.add_file_type(
        gguf.LlamaFileType.MOSTLY_Q8_0 if eight else gguf.LlamaFileType.MOSTLY_Q4_0
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _vocabulary(writer, source: Path, config: dict) -> None:
    """Tokens, types and merges of a byte-level or byte-fallback BPE tokenizer.json."""
    if not (source / "tokenizer.json").is_file():
        raise NotAModelError(f"{source} has no tokenizer.json, which a GGUF file has to hold")
    tokenizer = read_json(source, "tokenizer.json")
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise FormatLimitError(f"a {model.get('type')!r} tokenizer is not written to GGUF")
    size = config["vocab_size"]
    tokens, types = [f"[PAD{i}]" for i in range(size)], [USER] * size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in tokenizer.get("added_tokens") or ():
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added.get("special") else USER
    if model.get("byte_fallback"):
        for index, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x"):
                types[index] = BYTE
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(i) for i in range(size)])  # earlier merges come first
    else:
        llama3 = LLAMA3_DIGITS in json.dumps(
            tokenizer.get("pre_tokenizer"), ensure_ascii=False
        ).replace("\\\\", "\\")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe" if llama3 else "gpt-2")
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
    ):
        value = config.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            add(value)
    first = ((tokenizer.get("post_processor") or {}).get("single") or [{}])[0]
    writer.add_add_bos_token("SpecialToken" in first)
