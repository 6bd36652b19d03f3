"""The journal of a run: a folder beside the output, in which every finished step survives a crash.

    OUT.fewbit/identity.json          what the run depends on; a run that differs is refused
    OUT.fewbit/lock                   held by the one process that may write here
    OUT.fewbit/checkpoint/model-..    finished shards: step 0 what lies around the layers, then one
                                      decoder layer each
    OUT.fewbit/state-00003            hidden states after step 3, for the step that comes next
    OUT.fewbit/step-00003.json        what step 3 did; it counts as done when this file exists

Every file is written under a temporary name, synced, renamed, and the folder synced, the step's
JSON last. At the end the folder ``checkpoint`` becomes the output in one rename.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from . import durable
from .distributed import Ranks
from .errors import OutputError, UsageError
from .shards import CONFIG, INDEX, WEIGHTS, same_directory, shares_files

SUFFIX = ".fewbit"


class Journal:
    """The steps of one run, ``layers`` + 1 of them; used as a block that holds the lock.

    Of several ``ranks`` the first opens and writes it, and the others read what it has said.
    Raises UsageError when another process holds it, when the run that was begun here differs in
    what ``identity`` says, or when the output exists already; StorageError when the folder cannot
    be written.
    """

    def __init__(
        self, output: str | os.PathLike, identity: dict, layers: int, ranks: Ranks | None = None
    ) -> None:
        self.output = Path(output).absolute()
        self.root = folder_of(output)
        self.steps = layers + 1
        self.ranks = Ranks() if ranks is None else ranks
        self._lock = None
        if self.ranks.writes:
            durable.make_folder(self.root)
            self._lock = lock(self.root / "lock")
            try:
                self._open(identity)
            except BaseException:
                self.close()
                raise
        self.done = self.ranks.share(getattr(self, "done", 0))

    def _open(self, identity: dict) -> None:
        for part in [*self.root.glob(f"*{durable.PART}"), *self.shards.glob(f"*{durable.PART}")]:
            part.unlink()
        path = self.root / "identity.json"
        if path.exists():
            differs = difference(json.loads(path.read_text()), json.loads(json.dumps(identity)))
            if differs:
                raise UsageError(
                    f"{self.root} holds an unfinished run that differs in {'; '.join(differs)}: "
                    "repeat its command to finish it, or start afresh with --restart"
                )
        else:
            durable.write(path, (json.dumps(identity, indent=1) + "\n").encode())
        durable.make_folder(self.shards)
        self.done = next(i for i in range(self.steps + 1) if not self._entry(i).exists())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    def close(self) -> None:
        """Let the lock go; a run that has not finished a single step leaves nothing behind."""
        if self._lock is None:
            return
        if not getattr(self, "done", 1):
            shutil.rmtree(self.root, ignore_errors=True)
        os.close(self._lock)

    @property
    def shards(self) -> Path:
        return self.root / "checkpoint"

    def _entry(self, step: int) -> Path:
        return self.root / f"step-{step:05}.json"

    def shard(self, step: int) -> str:
        """The name of the step's file in the finished checkpoint."""
        if self.steps == 1:
            return WEIGHTS
        return f"model-{step + 1:05}-of-{self.steps:05}.safetensors"

    def entry(self, step: int) -> dict:
        """What the step left to be known: the dict given to ``commit``."""
        return json.loads(self._entry(step).read_text(encoding="utf-8"))

    def commit(
        self, step: int, tensors: dict[str, Tensor], entry: dict, state: Iterable = (),
        state_bytes: int = 0,
    ) -> None:
        """Make a step last: its tensors, its entry, and the state that the next one starts from."""
        durable.save_tensors(self.shards / self.shard(step), tensors)
        if state_bytes:
            durable.write(self._state(step), state, state_bytes)
        entry = {**entry, "tensors": {n: t.numel() * t.element_size() for n, t in tensors.items()}}
        durable.write(self._entry(step), (json.dumps(entry) + "\n").encode())
        self.done = step + 1
        if step and self._state(step - 1).exists():
            durable.unlink(self._state(step - 1))

    def _state(self, step: int) -> Path:
        return self.root / f"state-{step:05}"

    def state(self):
        """The state after the last finished step, as an open file."""
        return open(self._state(self.done - 1), "rb")

    def complete(self, config: dict, texts: dict[str, bytes]) -> None:
        """Add index, config and side files: the checkpoint is whole, under the journal's name."""
        sizes = {
            name: (self.shard(step), nbytes)
            for step in range(self.steps)
            for name, nbytes in self.entry(step)["tensors"].items()
        }
        index = {
            "metadata": {"total_size": sum(nbytes for _, nbytes in sizes.values())},
            "weight_map": {name: file for name, (file, _) in sizes.items()},
        }
        texts = {
            **texts,
            INDEX: (json.dumps(index, indent=2, sort_keys=True) + "\n").encode(),
            CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        }
        for name, data in texts.items():
            durable.write(self.shards / name, data)

    def publish(self) -> None:
        """Give the whole checkpoint the output's name, and tidy up."""
        durable.replace(self.shards, self.output)
        shutil.rmtree(self.root, ignore_errors=True)
        self.done = -1


def folder_of(output: str | os.PathLike) -> Path:
    """Where the journal of a run to ``output`` lies."""
    output = Path(output).absolute()
    return output.with_name(output.name + SUFFIX)


def lock(path: Path) -> int:
    """An exclusive lock that the system gives back when the process ends; its descriptor."""
    with durable.storing(path, 0):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise UsageError(
            f"another process ({holder}) is writing {path.parent}; wait for it or choose another "
            "output"
        ) from None
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def difference(old: dict, new: dict, path: str = "") -> list[str]:
    """What differs between two identities, in words: 'recipe.scheme.bits (3, now 4)'."""
    found = []
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        name = f"{path}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            found += difference(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name} ({_short(a)}, now {_short(b)})")
    return found[:4] if not path else found


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_output(source: str | os.PathLike | None, output: str | os.PathLike) -> None:
    """Before hours of work: an output that cannot be written, or would be overwritten."""
    out = Path(output)
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {str(output)!r} exists and is not a directory")
    if source is not None and same_directory(source, output):
        raise OutputError(f"{output} is the source directory; choose another one")
    if source is not None and shares_files(source, output):
        raise OutputError(f"{output} shares files with {source}; choose another directory")
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"the output directory {str(output)!r} is not empty")
    if out.is_mount():
        raise OutputError(f"{output} is a mount point: choose a directory inside it")
    parent = next(p for p in (out.absolute().parent, *out.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"the output {str(out)!r} cannot be written: no permission in {parent}")
