"""Files that survive a crash: written under a temporary name, synced, then renamed.

Every change of the file system goes through one of these functions, and each calls ``hook`` first
with what it is about to do: the place where tests count the steps and fail, tear or kill at the
N-th. An error of the disk becomes a StorageError that says how many bytes were wanted and where.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from .errors import StorageError

PART = ".part"  # ends the names of files that are not finished; they are never read

hook: Callable[[str, Path], None] | None = None


def _step(action: str, path: Path) -> None:
    if hook is not None:
        hook(action, path)


@contextmanager
def storing(path: Path, nbytes: int) -> Iterator[None]:
    """Errors of the disk inside the block, as one sentence."""
    try:
        yield
    except SafetensorError as error:  # an I/O error that comes through the library as text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise StorageError(_sentence(path, nbytes, OSError(int(number[1]), ""))) from error
    except OSError as error:
        raise StorageError(_sentence(path, nbytes, error)) from error


def _sentence(path: Path, nbytes: int, error: OSError) -> str:
    folder = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    free = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with suppress(OSError):
            free = f", {shutil.disk_usage(folder).free:,} bytes are free"
    reason = os.strerror(error.errno) if error.errno else str(error)
    size = f" ({nbytes:,} bytes)" if nbytes else ""
    return f"{path}{size} cannot be written: {reason}{free}"


@contextmanager
def _cleaning(temporary: Path) -> Iterator[None]:
    """Give the space of a file back that an error has cut short."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def part(path: Path) -> Path:
    """The name of a file until it is finished."""
    return path.with_name(path.name + PART)


def write(path: Path, chunks: bytes | Iterable[bytes | memoryview], nbytes: int = 0) -> None:
    """A whole file, or nothing under that name; ``nbytes``: what an error should call its size."""
    chunks = [chunks] if isinstance(chunks, bytes) else chunks
    nbytes = nbytes or sum(len(c) for c in chunks if isinstance(chunks, list))
    temporary = part(path)
    with storing(path, nbytes), _cleaning(temporary):
        _step("write", temporary)
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            _step("sync", temporary)
            os.fsync(file.fileno())
    replace(temporary, path, nbytes)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, complete or absent; readable as far as the umask says."""
    from safetensors.torch import save_file

    nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
    temporary = part(path)
    with storing(path, nbytes), _cleaning(temporary):
        _step("write", temporary)
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes its files private
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)
        _step("sync", temporary)
        sync(temporary)
    replace(temporary, path, nbytes)


def replace(old: Path, new: Path, nbytes: int = 0) -> None:
    """Rename, and make the rename last; ``nbytes``: as for ``write``."""
    with storing(new, nbytes):
        _step("rename", new)
        os.replace(old, new)
        _step("sync", new.parent)
        sync(new.parent)


def unlink(path: Path) -> None:
    with storing(path, 0):
        _step("unlink", path)
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """A folder and those above it, each of them in its parent for good."""
    with storing(path, 0):
        for folder in reversed((path, *path.parents)):
            if not folder.exists():
                _step("mkdir", folder)
                folder.mkdir(exist_ok=True)
                sync(folder.parent)


def sync(path: Path) -> None:
    """fsync of a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
