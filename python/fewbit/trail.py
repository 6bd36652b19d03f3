"""What a run carries from one decoder layer to the next, as one thing that can be kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import Activations, raw, read_like
from .calibrate import FloatPass, Windows
from .certificate import Probe


@dataclass
class Trail:
    """What one layer hands to the next: its inputs, the float model's, and the probe's."""

    inputs: Activations | None
    floats: FloatPass | None
    probe: Probe | None

    def chunks(self, data: Windows) -> Iterator[memoryview]:
        """All hidden states as bytes, on the rank that writes; the others send theirs."""
        for activations in self._activations():
            own = (activations.kept(i) for i in range(len(activations)))
            for hidden in activations.store.ranks.gather(own, _likes(activations, data)):
                yield raw(hidden)
        if self.probe is not None:
            yield from map(raw, self.probe.hidden.values())

    def nbytes(self, data: Windows | None) -> int:
        """Of what ``chunks`` gives."""
        likes = [like for a in self._activations() for like in _likes(a, data)]
        likes += [] if self.probe is None else list(self.probe.hidden.values())
        return sum(like.numel() * like.element_size() for like in likes)

    def read(self, file, data: Windows | None) -> None:
        """Take all hidden states from what ``chunks`` gave; the rest stays as it is."""
        fresh = []
        for activations in self._activations():
            likes = _likes(activations, data)
            own = activations.store.ranks.own(len(likes))
            fresh.append(activations.follow(
                hidden for i, like in enumerate(likes)
                if (hidden := read_like(file, like)) is not None and i in own
            ))
        self.close()
        if fresh:
            self.inputs = fresh[0]
        if self.floats is not None:
            self.floats = FloatPass(fresh[1])
        if self.probe is not None:
            streams = self.probe.hidden.items()
            self.probe.hidden = {
                name: read_like(file, like).to(like.device) for name, like in streams
            }

    def close(self) -> None:
        """Give the room of all hidden states back."""
        for activations in self._activations():
            activations.close()

    def _activations(self) -> list[Activations]:
        floats = None if self.floats is None else self.floats.inputs
        return [a for a in (self.inputs, floats) if a is not None]


def _likes(activations: Activations, data: Windows) -> list[Tensor]:
    """Empty tensors like the hidden states of all batches, whoever holds them."""
    mine = activations.items[0].hidden
    return [
        torch.empty(*batch.shape, mine.shape[-1], dtype=mine.dtype, device="meta")
        for batch in data.batches
    ]
