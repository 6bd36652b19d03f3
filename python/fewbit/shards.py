"""Model directories: config.json, and tensors in one or many safetensors files.

A directory may come from a stranger. Names in an index never become paths before they were checked;
files are regular files inside the directory (or in the blobs of the hub cache that it belongs to);
every header is read and bounded before any tensor; nothing is unpickled. Everything that is wrong
is a CheckpointError that names the file.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import durable
from .errors import CheckpointError, DamagedFileError, NotAModelError, UnsafeFileError, UsageError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
MAX_HEADER = 25 << 20  # bytes of one safetensors header: 200,000 tensors
MAX_JSON = 16 << 20  # bytes of config.json and of the index: 100,000 tensors
MAX_TENSORS = 500_000
MAX_NAME = 512
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Entry(NamedTuple):
    """What a header says of one tensor, and the file it lies in."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def meta(self) -> Tensor:
        """A tensor without data, for checks."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class Shards:
    """The tensors of a model directory, listed at once and read one by one.

    ``entries``: by tensor name; ``config``: the parsed config.json ({} when there is none).
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise NotAModelError(f"{self.path} is not a model directory")
        self.config = read_json(self.path, CONFIG) if (self.path / CONFIG).exists() else {}
        self._open: tuple[str, object] | None = None
        self.entries: dict[str, Entry] = {}
        for file, wanted in self._files().items():
            found = self._header(file)
            missing = wanted - found.keys() if wanted is not None else set()
            if missing:
                raise DamagedFileError(f"{file} lacks {min(missing)!r}, which the index puts there")
            self.entries |= found if wanted is None else {n: found[n] for n in wanted}

    def _files(self) -> dict[str, set[str] | None]:
        """Which tensors to take from which file; None for all."""
        if (self.path / INDEX).exists():
            index = read_json(self.path, INDEX).get("weight_map")
            if not isinstance(index, dict) or len(index) > MAX_TENSORS:
                raise CheckpointError(f"{INDEX} needs a weight_map of at most {MAX_TENSORS} names")
            files: dict[str, set[str]] = {}
            for name, file in index.items():
                if not isinstance(file, str):
                    raise CheckpointError(f"{INDEX} puts {name!r:.80} into {file!r:.80}")
                files.setdefault(file, set()).add(name)
            return {file: files[file] for file in sorted(files)}
        if (self.path / WEIGHTS).exists():
            return {WEIGHTS: None}
        pickles = [p.name for p in self.path.iterdir() if p.suffix in PICKLES]
        if pickles:
            raise UnsafeFileError(
                f"{self.path} holds pickled weights ({min(pickles)}), which can run code when they "
                "are opened; fewbit reads safetensors only"
            )
        raise NotAModelError(f"{self.path} holds neither {WEIGHTS} nor {INDEX}")

    def _header(self, file: str) -> dict[str, Entry]:
        path = regular_file(self.path, file, ".safetensors")
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER:
            raise UnsafeFileError(f"{file} has a header of {length} bytes, above {MAX_HEADER}")
        entries = {}
        handle = self._handle(file)
        for name in handle.keys():  # noqa: SIM118 - not a dict
            if len(name) > MAX_NAME:
                raise UnsafeFileError(f"{file} has a tensor name of {len(name)} characters")
            part = handle.get_slice(name)
            dtype = DTYPES.get(part.get_dtype())
            if dtype is None:
                raise CheckpointError(f"{file}: {name!r} has unknown dtype {part.get_dtype()}")
            entries[name] = Entry(file, tuple(part.get_shape()), dtype)
        if len(entries) + len(self.entries) > MAX_TENSORS:
            raise UnsafeFileError(f"{self.path} has more than {MAX_TENSORS} tensors")
        return entries

    def _handle(self, file: str):
        if self._open is None or self._open[0] != file:
            path = regular_file(self.path, file, ".safetensors")
            try:
                self._open = (file, safe_open(path, "pt"))
            except (SafetensorError, OSError, ValueError) as error:
                raise DamagedFileError(
                    f"{file} is not a whole safetensors file: {error}"
                ) from error
        return self._open[1]

    def close(self) -> None:
        """Let go of the file that is open; the next read opens it again."""
        self._open = None

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(self, name: str) -> Tensor:
        """One tensor. Only one file is held open, so read in the order of ``by_file``."""
        entry = self.entries[name]
        try:
            return self._handle(entry.file).get_tensor(name)
        except SafetensorError as error:
            raise DamagedFileError(f"{entry.file}: {name!r} cannot be read: {error}") from error

    def by_file(self) -> Iterator[str]:
        """Tensor names, file by file, so that a model streams through memory once."""
        yield from sorted(self.entries, key=lambda name: (self.entries[name].file, name))


class Writer:
    """Tensors into shards of at most ``max_shard_size`` bytes; nothing is ever half-written.

    Files get their final names, index and config last, only in ``finish``; before that the
    directory holds files named ``.fewbit-*``, removed again when the block ends with an error.
    """

    def __init__(self, path: str | os.PathLike, max_shard_size: int = 5_000_000_000) -> None:
        self.path, self.limit = Path(path), max_shard_size
        if max_shard_size < 1:
            raise UsageError(f"max_shard_size must be at least 1 byte, got {max_shard_size}")
        self.made = not self.path.exists()
        durable.make_folder(self.path)
        self.files: list[tuple[Path, list[str]]] = []
        self.total = self.pending_bytes = 0
        self.pending: dict[str, Tensor] = {}
        self.homes: set[int] = set()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, error, trace) -> None:
        for path, _ in self.files:
            path.unlink(missing_ok=True)
        if kind is not None and self.made:
            with suppress(OSError):  # not empty: someone else has written there
                self.path.rmdir()

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Tensors that belong into one shard (those of one Linear)."""
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if self.pending and self.pending_bytes + size > self.limit:
            self._flush()
        for name, tensor in tensors.items():
            tensor = tensor.detach().contiguous()
            home = tensor.untyped_storage().data_ptr()
            # A file holds each tensor by itself, so views of one buffer are written as copies.
            self.pending[name] = tensor.clone() if home in self.homes and home else tensor
            self.homes.add(home)
        self.pending_bytes += size
        self.total += size

    def _flush(self) -> None:
        path = self.path / f".fewbit-{os.getpid()}-{len(self.files)}.safetensors"
        self.files.append((path, list(self.pending)))
        durable.save_tensors(path, self.pending)
        self.pending, self.pending_bytes = {}, 0
        self.homes.clear()

    def finish(self, config: dict, side_files: dict[str, bytes] | None = None) -> list[str]:
        """Write index, side files and config.json; returns the names of all files."""
        if self.pending or not self.files:
            self._flush()
        count = len(self.files)
        names = [
            WEIGHTS if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
            for i in range(count)
        ]
        stale = [p for p in self.path.glob("model*.safetensors") if p.name not in names]
        texts = dict(side_files or {})
        if count > 1:
            where = {
                tensor: name
                for name, (_, tensors) in zip(names, self.files, strict=True)
                for tensor in tensors
            }
            index = {"metadata": {"total_size": self.total}, "weight_map": where}
            texts[INDEX] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        else:
            stale += [p for p in (self.path / INDEX,) if p.exists()]
        # config.json goes last: a directory without it is not yet a checkpoint.
        (self.path / CONFIG).unlink(missing_ok=True)
        for (path, _), name in zip(self.files, names, strict=True):
            durable.replace(path, self.path / name)
        for path in stale:
            durable.unlink(path)
        texts[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
        for name, data in texts.items():
            durable.write(self.path / name, data)
        self.files = []
        return [*names, *texts]


def read_json(root: Path, name: str) -> dict:
    """A JSON object of bounded size from a regular file of the directory."""
    path = regular_file(root, name, ".json")
    if path.stat().st_size > MAX_JSON:
        raise UnsafeFileError(f"{name} is above {MAX_JSON} bytes")
    try:
        value = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedFileError(f"{name} must hold an object, not {type(value).__name__}")
    return value


def regular_file(root: Path, name: str, suffix: str) -> Path:
    """The path of ``root/name``, for a plain file name that leads to a regular file inside.

    A link may leave the directory for one place only: the ``blobs`` beside ``snapshots`` in the
    hub's cache. Raises CheckpointError for separators, drive letters, control characters, reserved
    names, links elsewhere, and anything that is not a regular file.
    """
    bad = set('/\\:*?"<>|')
    if (
        not 0 < len(name) <= 200
        or name.startswith(".")
        or not name.endswith(suffix)
        or any(c in bad or not c.isprintable() for c in name)
    ):
        raise UnsafeFileError(f"{name!r:.120} is not the name of a {suffix} file")
    home, path = root.resolve(), Path(os.path.realpath(root / name))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if path.parent != home and path.parent != blobs:
        raise UnsafeFileError(f"{name} leads out of its directory, to {path}")
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise DamagedFileError(f"{name} cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        raise UnsafeFileError(f"{name} is not a regular file")
    return path


def same_directory(a: str | os.PathLike, b: str | os.PathLike) -> bool:
    """True when both paths lead to one directory, by whatever links."""
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def shares_files(source: str | os.PathLike, target: str | os.PathLike) -> list[str]:
    """Files of ``target`` that are hard or soft links to files of ``source``."""
    if not os.path.isdir(target):
        return []
    inodes = {_inode(p) for p in Path(source).iterdir()}
    return sorted(p.name for p in Path(target).iterdir() if _inode(p) in inodes)


def side_files(source: Path, names: Iterable[str], limit: int = MAX_JSON) -> dict[str, bytes]:
    """The text files beside the weights (tokenizer and the like) that exist, as they are."""
    found = {}
    for name in names:
        if (source / name).is_file():
            path = regular_file(source, name, Path(name).suffix)
            if path.stat().st_size > limit:
                raise UnsafeFileError(f"{name} is above {limit} bytes")
            found[name] = path.read_bytes()
    return found


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino
