"""Progress of a run: one line a linear, and on a terminal or in a notebook a bar below them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from .memory import resident

HEAD = (
    f"{'linear':<40} {'error':>8} {'tokens':>9} {'rung':>4} {'seconds':>8} {'memory':>9} "
    f"{'left':>8}"
)


class Progress:
    """Counts decoder layers. ``show`` False prints nothing; ``callback`` gets every event's dict.

    Events: {"event": "linear", the fields of a LinearRecord, "memory": bytes} and {"event":
    "layer", "done", "layers", "seconds", "seconds_left"}; what the callback raises stops the run.
    Lines go to stderr, and in a notebook, which shows that as an error, to stdout: linear, relative
    error, calibration tokens, rung of the solver's ladder, seconds, memory of the process (and of
    the GPU), time left.
    """

    def __init__(
        self, layers: int, show: bool = True, callback: Callable[[dict], None] | None = None
    ) -> None:
        self.layers, self.done, self.first, self.callback = layers, 0, 0, callback
        self.started = self.latest = time.monotonic()  # latest: when a layer was last finished
        self.show, notebook = show, "ipykernel" in sys.modules
        self.stream = sys.stdout if notebook else sys.stderr
        interactive = show and (notebook or sys.stderr.isatty())
        self.bar = tqdm(total=layers, unit="layer", leave=False) if interactive else None
        if show:
            self._say(HEAD)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    def skip(self, layers: int) -> None:
        """``layers`` were finished by an earlier run."""
        self.done = self.first = layers
        if self.bar is not None:
            self.bar.update(layers)
        if self.show and layers:
            self._say(f"{layers} of {self.layers} layers are done already")

    def linear(self, record) -> None:
        """A linear has been quantised (a LinearRecord)."""
        if self.callback:
            memory, _ = held_bytes()
            self.callback({"event": "linear", **vars(record), "memory": memory})
        if self.show:
            name = record.name if len(record.name) <= 40 else "..." + record.name[-37:]
            self._say(
                f"{name:<40} {record.relative_error:8.1e} {record.tokens:9,} {record.rung:4} "
                f"{record.seconds:8.2f} {_memory():>9} {_clock(self.seconds_left):>8}"
            )

    def layer(self, records) -> None:
        """A decoder layer is finished."""
        self.done += 1
        self.latest = time.monotonic()
        if self.callback:
            self.callback({
                "event": "layer", "done": self.done, "layers": self.layers,
                "seconds": time.monotonic() - self.started, "seconds_left": self.seconds_left,
            })  # fmt: skip
        if self.bar is not None:
            self.bar.update()
        elif self.show:
            self._say(f"layer {self.done}/{self.layers} done, {_clock(self.seconds_left)} left")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    @property
    def seconds_left(self) -> float | None:
        """At the pace of the layers so far; None before the first one is done."""
        if self.done == self.first:
            return None
        pace = (self.latest - self.started) / (self.done - self.first)
        return max(0.0, pace * (self.layers - self.done) - (time.monotonic() - self.latest))

    def _say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)


def held_bytes() -> tuple[int, int]:
    """Memory in use now: resident in this process (0 where that is unknown), and on the GPU."""
    gpu = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
    return resident(), gpu


def _memory() -> str:
    used, gpu = held_bytes()
    text = f"{used / 2**20:.0f} MiB" if used else "-"
    return f"{text}+{gpu / 2**20:.0f}" if gpu else text


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
