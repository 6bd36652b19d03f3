"""A stand-in for a card: tensors that lie on the CPU and count as lying on cuda:0.

Inside ``Card`` every call into torch is looked at, with a real card's rules: tensors of both places
in one call are an error (but for numbers, indices and copies), a CPU generator draws no numbers
for the card, numpy sees nothing of it, what is made of the card's tensors lies on the card, and
only ``to``, ``cpu`` and their like, which copy, lead from one place to the other.
"""

from collections import Counter

import pytest
import torch
from torch import Tensor, cuda
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fewbit import plan

CARD = torch.device("cuda", 0)


class OnCard(Tensor):
    """A tensor of the card."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __deepcopy__(self, memo):
        copy = self.detach().clone()
        is_parameter = getattr(self, "_is_param", False)
        return torch.nn.Parameter(copy, self.requires_grad) if is_parameter else copy

    def __reduce_ex__(self, protocol):
        raise TypeError(f"a tensor of {CARD} goes from rank to rank by itself, not in an object")

    def __format__(self, spec):
        return format(self.item(), spec)


def card(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, OnCard) else tensor.as_subclass(OnCard)


def on_cpu(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor) if isinstance(tensor, OnCard) else tensor


INDEXING = {Tensor.__getitem__, Tensor.__setitem__}  # of a card's tensor with the CPU's numbers
MOVING = {Tensor.to, Tensor.cpu, Tensor.cuda}
HOST = {Tensor.numpy, Tensor.__array__}
DEVICE = {
    Tensor.device.__get__: CARD, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False
}  # fmt: skip


class Card(TorchFunctionMode):
    """Inside it there is a card with ``free`` bytes. ``calls``: how often an operation used it."""

    def __init__(self, free: int = 1 << 34) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.patch = pytest.MonkeyPatch()
        self.answers = {
            "is_available": lambda: True, "device_count": lambda: 8, "set_device": lambda n: None,
            "get_device_name": lambda device: "cpu",  # so that a result can be the CPU's
            "mem_get_info": lambda device: (free, free), "synchronize": lambda device: None,
        }  # fmt: skip

    def __enter__(self):
        for name, answer in self.answers.items():
            self.patch.setattr(cuda, name, answer)
        self.patch.setitem(plan.PRODUCT, "cuda", 64)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        ours = [t for t in tensors if isinstance(t, OnCard)]
        theirs = [t for t in tensors if not isinstance(t, OnCard) and t.device.type != "meta"]
        if func in DEVICE:
            return DEVICE[func] if ours else func(*args, **kwargs)
        if func is torch._has_compatible_shallow_copy_type:
            return not (ours and theirs) and func(*args)
        if func in MOVING:
            return self._moved(func, args, kwargs)
        name = getattr(func, "__name__", str(func))
        if ours:
            self.calls[name] += 1
            if func in HOST:
                raise TypeError(f"{name}: cannot convert a tensor of {CARD} to numpy")
        indexed = func in INDEXING and isinstance(args[0], OnCard)
        values = args[2:] if func is Tensor.__setitem__ else ()
        free = theirs if func is Tensor.copy_ else [
            t for t in theirs if t.dim() == 0 or indexed and not any(t is v for v in values)
        ]  # fmt: skip
        if ours and len(free) < len(theirs):
            shapes = [tuple(t.shape) for t in theirs]
            raise RuntimeError(f"{name}: tensors of {CARD} and, of shape {shapes}, of the CPU")
        target = kwargs.get("device")
        if target is not None:
            target = torch.device(target)
            kwargs["device"] = torch.device("cpu") if target.type == "cuda" else target
        goes = ours if target is None else target.type == "cuda"
        if goes and kwargs.get("generator") is not None:
            raise RuntimeError(f"{name}: a generator of the CPU draws no numbers for {CARD}")
        result = func(*args, **kwargs)
        if isinstance(result, torch.Size):
            return result
        return tree_map_only(Tensor, card if goes else on_cpu, result)

    def _moved(self, func, args, kwargs):
        tensor, *rest = args
        was = isinstance(tensor, OnCard)
        if func is Tensor.cpu:
            device, dtype, copy = "cpu", None, False
        elif func is Tensor.cuda:
            device, dtype, copy = CARD, None, False
        elif rest and isinstance(rest[0], Tensor):
            device, dtype, copy = rest[0].device, rest[0].dtype, False
            device = CARD if isinstance(rest[0], OnCard) else device
        else:
            copy = kwargs.pop("copy", False)
            device, dtype = torch._C._nn._parse_to(*rest, **kwargs)[:2]
        device = (CARD if was else tensor.device) if device is None else torch.device(device)
        goes = device.type == "cuda"
        real = on_cpu(tensor).to("cpu" if goes else device, dtype or tensor.dtype)
        if real.data_ptr() == tensor.data_ptr() and (copy or goes != was) and not real.is_meta:
            real = real.clone()  # two places never share memory
        elif real is tensor or goes == was and real.dtype == tensor.dtype and not copy:
            return tensor
        return card(real) if goes else real
