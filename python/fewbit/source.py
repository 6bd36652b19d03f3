"""Where the pipeline's layers come from: a live model, or a directory, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .distributed import CPU
from .errors import CheckpointError, NonFiniteError, UnsupportedError
from .families import Family, decoder_layers
from .linearise import linearise_layer
from .shards import Shards
from .undo import Snapshot


class Source:
    """A live model: everything is in memory, before and after."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model, self.family = model, family

    @contextmanager
    def around(self) -> Iterator[None]:
        """Embedding, positions, final norm and head are in memory inside the block."""
        yield

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """One decoder layer, linearised, to be changed inside the block."""
        yield decoder_layers(self.model, self.family)[index]

    def release(self, linear: nn.Module) -> None:
        """A linear has been solved and replaced: nobody asks for its float weight any more."""

    def outside(self, writes: bool) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of what lies around the layers, in memory (``writes``) or as stored."""
        inside = f"{self.family.layers}."
        for name, tensor in self.model.state_dict().items():
            if not name.startswith(inside):
                yield name, tensor


class Directory(Source):
    """A model directory under an empty model: one layer at a time has weights, float32.

    They are read to ``device``, which is where the model's buffers go for good.

    Raises UnsupportedError when transformers stores the model under other names or in other
    shapes than it runs it, so that only transformers can load it, as a whole.
    """

    def __init__(
        self, model: nn.Module, family: Family, shards: Shards, device: torch.device = CPU
    ) -> None:
        super().__init__(model, family)
        self.shards, self.device = shards, device
        self.names = stored_names(model, shards)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    @contextmanager
    def around(self) -> Iterator[None]:
        inside = f"{self.family.layers}."
        snapshots = []
        for name, module in self.model.named_modules():
            if f"{name}.".startswith(inside):
                continue
            snapshots.append((module, dict(module._parameters), dict(module._modules)))
            self._fill(module, f"{name}." if name else "")
        self.model.tie_weights()
        try:
            yield
        finally:
            for module, parameters, children in snapshots:
                module._parameters.update(parameters)
                module._modules.update(children)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        layer = decoder_layers(self.model, self.family)[index]
        empty = Snapshot(layer)
        for name, module in layer.named_modules():
            prefix = f"{self.family.layers}.{index}.{name}"
            self._fill(module, prefix if prefix.endswith(".") else f"{prefix}.")
        linearise_layer(layer, self.family)
        try:
            yield layer
        finally:
            empty.restore(layer)

    def release(self, linear: nn.Module) -> None:
        # The module itself stays: ``layer`` puts it back, empty, at its end.
        for name, value in linear._parameters.items():
            if value is not None:
                linear._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)

    def outside(self, writes: bool) -> Iterator[tuple[str, Tensor]]:
        if writes:
            yield from super().outside(writes)
            return
        inside = f"{self.family.layers}."
        for name, stored in self.names.items():
            if not name.startswith(inside):
                yield name, self.shards.read(stored)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                stored = self.names.get(f"{prefix}{name}")
                if old is None or stored is None:
                    continue
                value = self.shards.read(stored)
                dtype = torch.float32 if value.is_floating_point() else value.dtype
                value = value.to(self.device, dtype, copy=True)
                self.shards.close()  # unmaps: mapped pages count as this process's memory
                if table is module._parameters:
                    value = nn.Parameter(value, requires_grad=False)
                table[name] = value


def stored_names(model: nn.Module, shards: Shards) -> dict[str, str]:
    """The stored name of every tensor of the model; those of a base model lack its prefix.

    Raises UnsupportedError for a tensor that is stored under no such name, CheckpointError for one
    of another shape.
    """
    prefix = f"{model.base_model_prefix}."
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    tied = tied if getattr(model.config, "tie_word_embeddings", False) else set()
    buffers = {name for name, _ in model.named_buffers()}
    names = {}
    for name, tensor in model.state_dict().items():
        stored = name if name in shards else name.removeprefix(prefix)
        if stored not in shards:
            if name in tied or name in buffers:
                continue
            raise UnsupportedError(f"no tensor {name} is stored in {shards.path}")
        shape = shards.entries[stored].shape
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{stored} is {list(shape)}, but the model needs {list(tensor.shape)}"
            )
        names[name] = stored
    return names


ROWS = 1 << 24  # elements looked at in one go
MAPPED = 1 << 28  # bytes of a file that may stay mapped: they count as this process's memory


def scan(shards: Shards) -> dict[str, str]:
    """Look at every stored number once; returns a checksum by tensor name.

    Raises NonFiniteError naming the tensors that hold NaN or infinity.
    """
    sums, bad, seen = {}, [], 0
    for name in shards.by_file():
        seen += shards.entries[name].nbytes
        if seen > MAPPED:
            shards.close()
            seen = 0
        tensor = shards.read(name)
        if tensor.is_floating_point() and not finite(tensor):
            bad.append(name)
        sums[name] = checksum(tensor)
        del tensor
    shards.close()
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NonFiniteError(
            f"{', '.join(bad[:3])}{more} hold values that are not finite: the file is damaged, or "
            "the training has diverged"
        )
    return sums


def finite(tensor: Tensor) -> bool:
    """True when no number is NaN or infinite; no copy of the tensor is made."""
    flat = tensor.reshape(-1)
    for part in flat.split(ROWS):
        part = part if part.dtype.itemsize > 1 else part.float()
        if part.numel() and not all(map(torch.isfinite, part.aminmax())):
            return False
    return True


def checksum(tensor: Tensor) -> str:
    """SHA-256 over type, shape and the integer sum of each row's words: as fast as memory.

    Tells weights apart that anything has changed; it is no protection against intent.
    """
    import hashlib

    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    rows = tensor.detach().contiguous().view(words[tensor.dtype.itemsize])
    rows = rows.reshape(-1, rows.shape[-1]) if rows.dim() > 1 else rows.reshape(-1, 1)
    for part in rows.split(max(1, ROWS // max(rows.shape[1], 1))):
        digest.update(part.sum(1, dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()
