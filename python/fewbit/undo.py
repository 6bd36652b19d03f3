"""Undo: put a model back as it was before ``quantize_``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import NotQuantizedError
from .integrations import detach

_MARK = "_fewbit_undo"


class Snapshot:
    """The module tree, parameters and buffers of a model, and copies of their values."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {m: dict(m._modules) for m in model.modules()}
        self.tensors: list[tuple[dict, str, Tensor, Tensor]] = []
        copies: dict[int, Tensor] = {}
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        copy = copies.setdefault(id(tensor), tensor.detach().clone())
                        self.tensors.append((table, name, tensor, copy))
        self.absent = [
            (table, name)
            for module in model.modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is None
        ]
        config = getattr(model, "config", None)
        self.config = None if config is None else dict(vars(config))
        self.tied = getattr(model, "all_tied_weights_keys", None)

    def differs(self) -> bool:
        """The model has another module or another value now."""
        return any(m._modules != children for m, children in self.modules.items()) or any(
            table.get(name) is None or not torch.equal(table[name], copy)
            for table, name, _, copy in self.tensors
        )

    def restore(self, model: nn.Module) -> None:
        for module, children in self.modules.items():
            module._modules.clear()
            module._modules.update(children)
        for table, name, tensor, copy in self.tensors:
            tensor.data = copy
            table[name] = tensor
        for table, name in self.absent:  # a bias that folding has added
            table[name] = None
        if self.config is not None:
            vars(model.config).clear()
            vars(model.config).update(self.config)
        if self.tied is not None:
            model.all_tied_weights_keys = self.tied


def remember(model: nn.Module) -> None:
    """Keep what ``restore_`` needs: a copy of the float weights."""
    object.__setattr__(model, _MARK, Snapshot(model))


def restore_(model: nn.Module) -> nn.Module:
    """Undo ``quantize_``: the model computes what it did before, bit for bit.

    Raises UsageError when the model was not quantised here, or with ``keep_float=False``.
    """
    snapshot = getattr(model, _MARK, None)
    if snapshot is None:
        raise NotQuantizedError(
            "nothing to restore: the model was not quantised in this process with keep_float=True"
        )
    snapshot.restore(model)
    forget(model)
    detach(model)
    return model


def forget(model: nn.Module) -> None:
    """Drop the copy of the float weights; ``restore_`` is no longer possible."""
    model.__dict__.pop(_MARK, None)
