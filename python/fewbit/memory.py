"""What this process holds in memory, in bytes: now and at most.

Linux says both in /proc. ``ru_maxrss``, which serves elsewhere, knows only the most, and counts the
process that started this one until its program was loaded.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

LARGE = 4 << 20
_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def resident() -> int:
    """Bytes held now; the most so far where that is not known, 0 where neither is."""
    return _status("VmRSS") or _maxrss()


def peak() -> int:
    """The most bytes held so far, or since ``reset_peak``; 0 where that is not known."""
    return _status("VmHWM") or _maxrss()


def reset_peak() -> int:
    """Let ``peak`` begin anew, where the system can; returns it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def trim() -> None:
    """Hand freed memory back to the system: the C library keeps what came in small pieces."""
    with suppress(OSError, AttributeError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def keep_apart() -> None:
    """From now on every large tensor has pages of its own, which go back when it is freed.

    The C library puts what is smaller than the largest piece freed so far (up to 32 MiB) into one
    heap, where a few small pieces between the activations of a layer hold hundreds of megabytes.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LARGE)


def _status(field: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    return 0


def _maxrss() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
