"""``convert``: one checkpoint format into another, without the model and without loss.

Streams file by file: one Linear is in memory at a time, beside the shard that is being filled. What
the target cannot hold exactly is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import formats
from .engines import Facts, Verdict, validate
from .errors import (
    DamagedFileError,
    FormatLimitError,
    NotQuantizedError,
    OutputError,
    UnsupportedError,
)
from .formats import Format
from .report import REPORT, Report
from .scheme import Scheme
from .shards import Shards, Writer, same_directory, shares_files, side_files
from .stored import Stored, find

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
EMBEDDINGS = ("embed", "wte", "wpe")
MAX_SHARD = 5_000_000_000
MAX_SIDE = 256 << 20  # bytes of a tokenizer's file


@dataclass
class Converted:
    """What ``convert`` did: formats, sizes in bytes, files, and a verdict per engine."""

    source: str
    target: str
    modules: int
    nbytes: int
    files: list[str]
    verdicts: list[Verdict]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"{self.source} -> {self.target}: {self.modules} linears, {self.nbytes:,} bytes"
        return "\n".join([head, *self.notes, *map(str, self.verdicts)])


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    max_shard_size: int = MAX_SHARD,
    rounding: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Converted:
    """Write the quantised model of directory ``source`` in format ``to`` into ``target``.

    The codes, zero points and scales that are read back equal those of the source, or the
    conversion is refused and leaves nothing behind: UnsupportedError names the first Linear that
    does not fit and why. A report beside the source goes along, its figures into the model card.
    CheckpointError: the source is damaged, or ``target`` is the source or shares files with it.
    ``to`` "gguf" writes one file for llama.cpp, whose asymmetric 4-bit blocks round the minimum of
    a group to float16: refused unless ``rounding`` allows it. ``progress`` is called with each
    module's name.
    """
    if to == "gguf":
        return _to_gguf(source, target, rounding)
    formats.get(to)
    refuse_in_place(source, target)
    shards = Shards(source)
    if "quantization_config" not in shards.config:
        raise NotQuantizedError(f"{source} is not quantised: its config.json has no such section")
    plan = formats.parse(shards.config["quantization_config"])
    # A format that is kept keeps what its instance knows (the threshold of LLM.int8()).
    writer_format = plan.format if plan.format.name == to else formats.get(to)
    stored = find(shards, plan)
    schemes = target_schemes(shards, stored, writer_format)
    taken = {name for module in stored.values() for name in module.names.values()}
    floats = [name for name in shards.by_file() if name not in taken]
    ignore = float_linears(shards, floats, stored)
    section = writer_format.config(schemes, ignore)
    report = _report(shards, plan.format.name)
    notes = list(plan.notes)
    if getattr(plan.format, "threshold", 0) > getattr(writer_format, "threshold", 0):
        notes.append(f"{to} says nothing of outlier columns, which LLM.int8() keeps float")
    with Writer(target, max_shard_size) as writer:
        for name in shards.by_file():
            module_name = name.removesuffix("." + plan.format.mark)
            if name not in taken:
                writer.add({name: shards.read(name)})
            elif module_name in stored and name == stored[module_name].names[plan.format.mark]:
                if progress:
                    progress(module_name)
                module = stored[module_name]
                writer.add(repack(shards, module, writer_format, schemes[module_name]))
        config = {k: v for k, v in shards.config.items() if k != "quantization_config"}
        nbytes = writer.total
        texts = side_files(shards.path, SIDE_FILES, MAX_SIDE)
        if report is not None:
            texts[REPORT] = report.text().encode()
        files = finish(writer, config, section, texts)
    from . import card

    card.clear(target, files)
    card.write(target, report, "" if report else shards.path.name)
    return Converted(
        plan.format.name, to, len(stored), nbytes, files, verdicts(target), notes
    )


def _to_gguf(source: str | Path, target: str | Path, rounding: bool) -> Converted:
    from .export_gguf import export

    refuse_in_place(source, target)
    shards = Shards(source)
    plan = formats.parse(shards.config.get("quantization_config"))
    stored = find(shards, plan)
    report = _report(shards, plan.format.name)
    path = export(source, target, rounding)
    schemes = {name: module.scheme for name, module in stored.items()}
    shapes = {name: (m.out_features, m.in_features) for name, m in stored.items()}
    found = validate(Facts("gguf", schemes, shapes))
    size = path.stat().st_size
    from . import card

    if report is not None:
        report.save(Path(target) / REPORT)
    card.clear(target, [REPORT] if report else [])
    kind = shards.config.get("model_type", "model")
    card.write_gguf(target, kind, found, report, "" if report else shards.path.name)
    return Converted(plan.format.name, "gguf", len(stored), size, [path.name], found)


def _report(shards: Shards, format: str) -> Report | None:
    """The report beside the source, where there is one, for the same weights in another format."""
    from . import card

    found = side_files(shards.path, [REPORT], MAX_SIDE)
    if not found:
        return None
    path = shards.path / REPORT
    report = Report.parse(found[REPORT], path)
    try:
        report = report.converted_from(format)
        card.facts(report)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # somebody else's file
        raise DamagedFileError(f"{path} is not a report of fewbit: {error!r}") from error
    return report


def verdicts(path: str | Path) -> list[Verdict]:
    """Which engines load the quantised model in a directory; reads headers only."""
    shards = Shards(path)
    plan = formats.parse(shards.config.get("quantization_config"))
    stored = find(shards, plan)
    taken = {name for module in stored.values() for name in module.names.values()}
    floats = [name for name in shards.by_file() if name not in taken]
    skipped = tuple(n for n in float_linears(shards, floats, stored) if n != "lm_head")
    schemes = {name: module.scheme for name, module in stored.items()}
    shapes = {name: (m.out_features, m.in_features) for name, m in stored.items()}
    return validate(Facts(plan.format.name, schemes, shapes, skipped))


def repack(shards: Shards, module: Stored, to: Format, scheme: Scheme) -> dict[str, Any]:
    """The tensors of one Linear in the target format, by full name."""
    codes, extras = module.codes(shards)
    try:
        packed = to.pack(codes, scheme, **extras)
    except UnsupportedError as error:
        raise type(error)(f"{module.name}: {error.message}") from error
    return {f"{module.name}.{suffix}": tensor for suffix, tensor in packed.items()}


def finish(writer: Writer, config: dict, section: dict, texts: dict[str, bytes]) -> list[str]:
    """Close a checkpoint: config.json with its section, and the side file GPTQ readers look for."""
    return writer.finish(*with_section(config, section, texts))


def with_section(
    config: dict, section: dict, texts: dict[str, bytes]
) -> tuple[dict, dict[str, bytes]]:
    """config.json with its ``quantization_config``, and the side files that go with it."""
    import json

    if section["quant_method"] == "gptq":
        texts = {**texts, "quantize_config.json": (json.dumps(section, indent=2) + "\n").encode()}
    return {**config, "quantization_config": section}, texts


def target_schemes(shards: Shards, stored: dict[str, Stored], to: Format) -> dict[str, Scheme]:
    """The scheme of each Linear in the target; refuses what does not fit before any writing.

    A grid that is symmetric in effect is written as symmetric, which more engines run.
    """
    if not to.writable:
        raise FormatLimitError(f"{to.name} is read, not written")
    by_scheme: dict[Scheme, list[Stored]] = {}
    for module in stored.values():
        by_scheme.setdefault(module.scheme, []).append(module)
    effective = {}
    for scheme, members in by_scheme.items():
        symmetric = all(module.is_symmetric(shards) for module in members)
        effective[scheme] = replace(scheme, symmetric=symmetric)
    schemes = {}
    for name, module in stored.items():
        schemes[name] = effective[module.scheme]
        if module.in_features < 0:
            raise FormatLimitError(
                f"{module.format.name} codes are not on a uniform grid, so {to.name} cannot hold "
                "them; load the model and quantise it again"
            )
        why = to.refuse(schemes[name], module.out_features, module.in_features)
        if why:
            raise FormatLimitError(f"{name} does not fit into {to.name}: {why}")
    return schemes


def float_linears(shards: Shards, floats: list[str], stored: dict[str, Stored]) -> list[str]:
    """Modules for the skip list: two-dimensional float weights that are no embedding, and the head.

    A tied head has no tensor of its own, so it is always named.
    """
    names = []
    for name in floats:
        entry = shards.entries[name]
        module = name.removesuffix(".weight")
        if (
            module != name
            and len(entry.shape) == 2
            and not any(word in module for word in EMBEDDINGS)
        ):
            names.append(module)
    if "lm_head" not in stored and "lm_head" not in names:
        names.append("lm_head")
    return names


def refuse_in_place(source: str | Path, target: str | Path) -> None:
    """A checkpoint is never written over the one that is being read."""
    if same_directory(source, target):
        raise OutputError(f"{target} is the source directory; choose another one")
    shared = shares_files(source, target)
    if shared:
        raise OutputError(f"{Path(target) / shared[0]} is the same file as in {source}")
