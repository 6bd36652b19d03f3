"""One run on several processes: calibration windows and layer solves are shared, one rank writes.

Windows are cut into at most ``CHUNKS`` contiguous chunks. Each chunk is summed on its own and the
chunks' sums are added in order, on one process as on eight, so that the bits of every statistic are
the same for any number of ranks. ``torchrun --nproc-per-node N -m fewbit quantize ...`` starts it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import ResumableStop, UsageError

CHUNKS = 8

T = TypeVar("T")


class Ranks:
    """This process among those of its job; alone, every method does nothing."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        if size > CHUNKS:
            raise UsageError(f"at most {CHUNKS} processes share the work, got {size}")
        self.rank, self.size = rank, size

    @property
    def writes(self) -> bool:
        """This rank does all that is done once."""
        return self.rank == 0

    def owner(self, index: int) -> int:
        """Who does the ``index``-th of several equal pieces of work."""
        return index % self.size

    def own(self, count: int) -> range:
        """This rank's items of ``count``: whole chunks, in order."""
        mine = [i for i, r in enumerate(self.holders(count)) if r == self.rank]
        return range(mine[0], mine[-1] + 1) if mine else range(0)

    def holders(self, count: int) -> list[int]:
        """The rank that has each of ``count`` items."""
        parts = chunks(count)
        return [i * self.size // len(parts) for i, part in enumerate(parts) for _ in part]

    def share(self, value: T, source: int = 0) -> T:
        """The value that rank ``source`` has, on all."""
        if self.size == 1:
            return value
        box = [value]
        with lost():
            torch.distributed.broadcast_object_list(box, source)
        return box[0]

    def fold(self, parts: list[T], add: Callable[[T, T], T]) -> T:
        """Every rank's parts added in the order of ranks; the same sum on all."""
        total = None
        if self.size > 1 and self.rank > 0:
            total = self._receive(self.rank - 1)
        for part in parts:
            total = part if total is None else add(total, part)
        if self.size > 1 and self.rank + 1 < self.size:
            self._send(total, self.rank + 1)
        return self.share(total, self.size - 1)

    def gather(self, tensors: Iterator[Tensor], like: list[Tensor]) -> Iterator[Tensor]:
        """On rank 0 all items in order, its own and the others'; ``like``: their shapes."""
        for item, holder in zip(like, self.holders(len(like)), strict=True):
            if holder == self.rank == 0:
                yield next(tensors)
            elif holder == self.rank:
                with lost():
                    torch.distributed.send(next(tensors).contiguous(), 0)
            elif self.rank == 0:
                out = torch.empty(item.shape, dtype=item.dtype)
                with lost():
                    torch.distributed.recv(out, holder)
                yield out

    def _send(self, value: Any, to: int) -> None:
        with lost():
            torch.distributed.send_object_list([value], to)

    def _receive(self, source: int) -> Any:
        box = [None]
        with lost():
            torch.distributed.recv_object_list(box, source)
        return box[0]


def chunks(count: int) -> list[range]:
    """At most CHUNKS contiguous ranges over ``count`` items, none empty."""
    n = min(CHUNKS, count)
    return [range(i * count // n, (i + 1) * count // n) for i in range(n)]


@contextmanager
def lost() -> Iterator[None]:
    """A partner that has gone ends this process too, with what is finished kept."""
    try:
        yield
    except RuntimeError as error:
        raise ResumableStop(
            f"another process of the job is gone ({str(error).splitlines()[0][:120]}); what is "
            "finished is kept, and the same command goes on"
        ) from error


@contextmanager
def job() -> Iterator[Ranks]:
    """The ranks that torchrun has started; one alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    ranks = Ranks(int(os.environ["RANK"]), size)
    with lost():
        torch.distributed.init_process_group("gloo")
    yield ranks
    # Gloo's threads drop the tensors of their last work after its waiter has gone on, which ends a
    # process that is already shutting down; a barrier has none, and lets them finish.
    with lost():
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
