"""Hidden states between decoder layers, in memory up to a budget and in a file beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .distributed import Ranks, chunks
from .durable import storing
from .errors import DamagedFileError


@dataclass
class LayerInput:
    """One batch in front of a decoder layer: hidden states, the other arguments, real tokens.

    ``others``: args and kwargs by ``id`` of the layer, where layers get different ones (sliding
    and full attention have masks, and sometimes rotary tables, of their own). ``first``: how many
    real tokens all earlier batches hold.
    """

    hidden: Tensor
    args: tuple
    kwargs: dict
    mask: Tensor | None
    others: dict[int, tuple[tuple, dict]] = field(default_factory=dict)
    first: int = 0


class Store:
    """Where hidden states are kept: ``budget`` bytes in memory, the rest in ``folder``.

    The file has no name, so that it is gone when the process is, however that ends. ``ranks``:
    those who share the batches. Memory is the CPU's, also of ranks that compute on cards.
    """

    def __init__(
        self, folder: Path | None = None, budget: float = float("inf"), ranks: Ranks | None = None
    ) -> None:
        self.folder, self.budget, self.used = folder, budget, 0
        self.ranks = Ranks() if ranks is None else ranks
        self.device = None if ranks is None else ranks.device  # None: they stay where they are


class Activations(Sequence[LayerInput]):
    """The inputs of a layer, batch by batch; of ``total`` batches this rank holds its own.

    An item's hidden states are a copy on the device that the layer computes on.
    """

    def __init__(self, total: int, store: Store | None = None) -> None:
        self.total, self.store = total, Store() if store is None else store
        self.items: list[LayerInput] = []
        self.offsets: list[int | None] = []  # in the file; None: in memory
        self.file, self.end, self.held = None, 0, 0

    def append(self, x: LayerInput) -> None:
        if self.store.device is not None:
            x = replace(x, hidden=x.hidden.cpu())
        size = x.hidden.numel() * x.hidden.element_size()
        if self.store.used + size <= self.store.budget:
            self.store.used += size
            self.held += size
            self.items.append(x)
            self.offsets.append(None)
            return
        with storing(self.store.folder, size):
            if self.file is None:
                self.file = tempfile.TemporaryFile(dir=self.store.folder)
            self.file.seek(self.end)
            self.file.write(raw(x.hidden))
        self.items.append(replace(x, hidden=x.hidden.to("meta")))
        self.offsets.append(self.end)
        self.end += size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> LayerInput:
        x = self.items[index]
        return replace(x, hidden=self.kept(index).to(self.store.device or x.hidden.device))

    def kept(self, index: int) -> Tensor:
        """Hidden states where they are kept."""
        hidden, offset = self.items[index].hidden, self.offsets[index]
        if offset is None:
            return hidden
        self.file.seek(offset)
        return read_like(self.file, hidden)

    def follow(self, hidden: Iterable[Tensor]) -> Activations:
        """The same batches with other hidden states, taken one at a time."""
        out = Activations(self.total, self.store)
        for x, h in zip(self.items, hidden, strict=True):
            out.append(replace(x, hidden=h))
        return out

    def chunks(self) -> list[range]:
        """This rank's batches, in the runs that are summed each on its own."""
        own = self.store.ranks.own(self.total)
        return [
            range(part.start - own.start, part.stop - own.start)
            for part in chunks(self.total) if len(own) and part.start in own
        ]

    def close(self) -> None:
        """Give the room back; the hidden states are gone."""
        self.store.used -= self.held
        self.held, self.items, self.offsets = 0, [], []
        if self.file is not None:
            self.file.close()

    @property
    def nbytes(self) -> int:
        """Of all hidden states."""
        return sum(x.hidden.numel() * x.hidden.element_size() for x in self.items)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def read_like(file, like: Tensor) -> Tensor:
    """The next tensor of the shape and type of ``like`` (which may be meta)."""
    data = bytearray(like.numel() * like.element_size())
    if file.readinto(data) != len(data):
        raise DamagedFileError(f"{file.name} ends early: {len(data):,} more bytes belong to it")
    return torch.frombuffer(data, dtype=like.dtype).reshape(like.shape)
