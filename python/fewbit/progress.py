"""Progress of a run: a bar on a terminal and in notebooks, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm.auto import tqdm


class Progress:
    """Counts decoder layers. ``show`` False prints nothing; ``callback`` gets every event's dict.

    On a terminal each finished linear is a line above a bar with an ETA; elsewhere (a log file) one
    line a decoder layer.
    """

    def __init__(
        self, layers: int, show: bool = True, callback: Callable[[dict], None] | None = None
    ) -> None:
        self.layers, self.done, self.callback = layers, 0, callback
        self.started = time.monotonic()
        self.show = show
        self.interactive = show and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        self.bar = tqdm(total=layers, unit="layer", leave=False) if self.interactive else None

    def linear(self, record) -> None:
        """A linear has been quantised (a LinearRecord)."""
        if self.callback:
            self.callback({"event": "linear", **vars(record)})
        if self.bar is not None:
            self.bar.write(
                f"{record.name:<44} error {record.relative_error:.2e}  {record.seconds:.1f} s",
                file=sys.stderr,
            )

    def layer(self, records) -> None:
        """A decoder layer is finished."""
        self.done += 1
        if self.callback:
            self.callback({"event": "layer", "done": self.done, "layers": self.layers})
        if self.bar is not None:
            self.bar.update()
        elif self.show:
            elapsed = time.monotonic() - self.started
            left = elapsed / self.done * (self.layers - self.done)
            worst = max((r.relative_error for r in records), default=0.0)
            print(
                f"layer {self.done}/{self.layers}  worst error {worst:.2e}  "
                f"{elapsed:.0f} s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
