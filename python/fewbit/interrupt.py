"""Ctrl-C on the command line: the process ends within GRACE seconds, wherever it is.

Python sees a signal only between two of its own steps, and a matrix product may take minutes. What
is on disk is valid at any time (durable.py, journal.py), so a process that has not come back by
then is ended from another thread; a second Ctrl-C ends it at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE = 0.25
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def prompt(message: Callable[[], str], code: int) -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt inside the block, or end the process with ``code``
    after ``message``; so does an error that follows one, since foreign code may turn the exception
    into its own. Does nothing outside the main thread, which alone gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    old_wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    came = []

    def stop(number, frame) -> None:
        came.append(number)
        raise KeyboardInterrupt

    old = {number: signal.signal(number, stop) for number in SIGNALS}
    over = threading.Event()
    threading.Thread(target=_watch, args=(read, over, message, code), daemon=True).start()
    try:
        yield
    except Exception as error:
        if came:
            raise KeyboardInterrupt from error
        raise
    finally:
        over.set()
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_wakeup)
        os.close(write)  # the watcher reads the end and closes its side


def _watch(read: int, over: threading.Event, message: Callable[[], str], code: int) -> None:
    timer = None
    while data := os.read(read, 16):
        stops = sum(byte in SIGNALS for byte in data)
        if stops == 0:
            continue
        if timer is not None or stops > 1:
            end(message(), code)
        timer = threading.Timer(GRACE, lambda: over.is_set() or end(message(), code))
        timer.daemon = True
        timer.start()
    os.close(read)


def end(message: str, code: int) -> None:
    """Leave at once, without the interpreter's own farewell, which takes too long."""
    os.write(sys.stderr.fileno(), f"{message}\n".encode())
    os._exit(code)
