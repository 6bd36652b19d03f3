"""One run on several processes: calibration windows and layer solves are shared, one rank writes.

Windows are cut into at most ``CHUNKS`` contiguous chunks. Each chunk is summed on its own and the
chunks' sums are added in order, on one process as on eight, so that the bits of every statistic are
the same for any number of ranks. ``torchrun --nproc-per-node N -m fewbit quantize ...`` starts it.

Ranks compute on the CPU, or each on a card of its own. The tensors of statistics go from device to
device, by nccl between cards and by gloo between CPUs; everything else goes by gloo.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import ResumableStop, UnsupportedError, UsageError

CHUNKS = 8
CPU = torch.device("cpu")
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}

T = TypeVar("T")


class Ranks:
    """This process among those of its job, computing on ``device``; alone, its methods do nothing.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device = CPU) -> None:
        if size > CHUNKS:
            raise UsageError(f"at most {CHUNKS} processes share the work, got {size}")
        self.rank, self.size, self.device = rank, size, device

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
        """The value that rank ``source`` has, on all; its tensors must be on the CPU."""
        if self.size == 1:
            return value
        box = [value]
        with lost():
            torch.distributed.broadcast_object_list(box, source)
        return box[0]

    def fold(self, parts: list[T], add: Callable[[T, T], T]) -> T:
        """Every rank's parts added in the order of ranks; the same sum on all.

        The parts are objects whose tensors are attributes, and on ``device``.
        """
        total = None
        if self.rank > 0:
            total = self._receive(self.rank - 1)
        for part in parts:
            total = part if total is None else add(total, part)
        if self.rank + 1 < self.size:
            self._send(total, self.rank + 1)
        return total if self.size == 1 else self._broadcast(total, self.size - 1)

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
        frame, tensors = taken_apart(value, self.device)
        with lost():
            torch.distributed.send_object_list([frame], to)
            for tensor in tensors:
                torch.distributed.send(tensor, to)

    def _receive(self, source: int) -> Any:
        box = [None]
        with lost():
            torch.distributed.recv_object_list(box, source)
            return self._filled(box[0], lambda t: torch.distributed.recv(t, source))

    def _broadcast(self, value: Any, source: int) -> Any:
        frame, tensors = (None, []) if value is None else taken_apart(value, self.device)
        frame = self.share(frame, source)
        with lost():
            if self.rank != source:
                return self._filled(frame, lambda t: torch.distributed.broadcast(t, source))
            for tensor in tensors:
                torch.distributed.broadcast(tensor, source)
        return value

    def _filled(self, frame: Any, fill: Callable[[Tensor], Any]) -> Any:
        """What was taken apart, whole again: ``fill`` receives each of its tensors."""
        for name in _tensors(frame, "meta"):
            tensor = torch.empty_like(getattr(frame, name), device=self.device)
            fill(tensor)
            setattr(frame, name, tensor)
        return frame


def taken_apart(value: T, device: torch.device) -> tuple[T, list[Tensor]]:
    """A copy of an object whose attributes on ``device`` are empty tensors, and what they were.

    What a job on cards keeps on the CPU stays in the copy: nccl sends only what is on a card.
    """
    frame, tensors = copy.copy(value), []
    for name in _tensors(value, device.type):
        tensors.append(getattr(value, name).contiguous())
        setattr(frame, name, tensors[-1].to("meta"))
    return frame, tensors


def _tensors(value: Any, kind: str) -> list[str]:
    """Attributes that are tensors on this kind of device."""
    held = {name: t for name, t in vars(value).items() if isinstance(t, Tensor)}
    return [name for name, t in held.items() if t.device.type == kind]


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


def place(device: str) -> torch.device:
    """Where this rank computes: "cpu", or with "cuda" the card that has its number on this machine.

    Raises UnsupportedError where there is no such card, UsageError for another word.
    """
    if device not in BACKENDS:
        raise UsageError(f"device must be one of {', '.join(BACKENDS)}, got {device!r}")
    if device == "cpu":
        return CPU
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"device 'cuda' needs an NVIDIA GPU, and torch {torch.__version__} finds none; "
            "use 'cpu'"
        )
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise UnsupportedError(
            f"process {number} of this machine has no GPU of its own: there are {count}; start as "
            "many processes as GPUs"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def named(device: torch.device) -> str:
    """What the bits of a result depend on: "cpu", or the model of the card."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


@contextmanager
def job(device: str = "cpu") -> Iterator[Ranks]:
    """The ranks that torchrun has started; one alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    where = place(device)
    if size == 1 or "RANK" not in os.environ:
        yield Ranks(device=where)
        return
    ranks = Ranks(int(os.environ["RANK"]), size, where)
    with lost():
        torch.distributed.init_process_group(BACKENDS[where.type])
    yield ranks
    # Gloo's threads drop the tensors of their last work after its waiter has gone on, which ends a
    # process that is already shutting down; a barrier has none, and lets them finish.
    with lost():
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
