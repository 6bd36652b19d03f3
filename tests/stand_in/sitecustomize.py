"""torch on the stand-in card (cudart.cpp): the CPU does the work of torch's own CUDA kernels.

Python imports this file by itself where the folder is on PYTHONPATH. Every operator of torch with a
CUDA kernel, but for those that only make or view memory, fetches its arguments from the card, runs
on the CPU and puts results back. torch's own copies between card and host stay as they are.
"""

import ctypes

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

runtime = ctypes.CDLL("libcudart.so.13")  # the one that is preloaded
runtime.cudaMemcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
ANYWHERE = 4  # cudaMemcpyDefault
NATIVE = {
    "aten::empty.memory_format", "aten::empty_strided", "aten::resize_", "aten::record_stream",
    "aten::set_", "aten::set_.source_Storage", "aten::set_.source_Storage_storage_offset",
    "aten::set_.source_Tensor", "aten::_pin_memory", "aten::is_pinned", "aten::is_set_to",
}  # fmt: skip


def copy(target: torch.UntypedStorage, source: torch.UntypedStorage) -> None:
    if source.nbytes():
        error = runtime.cudaMemcpy(target.data_ptr(), source.data_ptr(), source.nbytes(), ANYWHERE)
        if error:
            runtime.cudaGetLastError()  # leave nothing behind for torch's next call
            raise RuntimeError(f"a copy to or from the card: error {error}")


def on_cpu(op):
    """The operator for arguments on the card, by way of the CPU."""
    schema = op._schema
    tensors = {a.name for a in schema.arguments if str(a.type) in ("Tensor", "Optional[Tensor]")}
    written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}

    def call(*args, **kwargs):
        named = dict(zip((a.name for a in schema.arguments), args, strict=False), **kwargs)
        for name in tensors & named.keys():
            if isinstance(named[name], int | float):  # a number where torch has a tensor of one
                named[name] = torch.tensor(named[name])
        devices = (t.device if isinstance(t, Tensor) else t for t in tree_leaves(named))
        device = next(d for d in devices if isinstance(d, torch.device) and d.type == "cuda")
        storages, twins = {}, {}

        def fetch(x):
            if isinstance(x, torch.device):
                return torch.device("cpu")
            if isinstance(x, torch.Generator):
                return None
            if not isinstance(x, Tensor) or not x.is_cuda:
                return x
            there = x.untyped_storage()
            key = there.data_ptr()
            if key not in storages:
                here = torch.UntypedStorage(there.nbytes())
                copy(here, there)
                storages[key] = here
            twin = torch.empty(0, dtype=x.dtype)
            twin.set_(storages[key], x.storage_offset(), x.size(), x.stride())
            twins[id(twin)] = (twin, x)
            return twin

        def put(x):
            if not isinstance(x, Tensor) or x.is_cuda:
                return x
            if id(x) in twins:
                return twins[id(x)][1]
            made = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)
            if x.numel():
                copy(made.untyped_storage(), dense(x).untyped_storage())
            return made

        result = op(**tree_map(fetch, named))
        outputs = tree_leaves([named.get(name) for name in written])
        for twin, x in twins.values():
            if any(x is out for out in outputs):
                if twin.size() != x.size():
                    x.resize_(twin.size())
                    twin = twin.clone(memory_format=torch.contiguous_format)
                copy(x.untyped_storage(), twin.untyped_storage())
        return tree_map(put, result)

    return call


def dense(x: Tensor) -> Tensor:
    """x with its strides in a storage of its own."""
    if x.storage_offset() == 0:
        return x
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype).copy_(x)


def serve() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("aten::") or name in NATIVE or not has(name, "CUDA"):
            continue
        packet, _, overload = name.removeprefix("aten::").partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        if any(r.alias_info and not r.alias_info.is_write for r in op._schema.returns):
            continue  # a view
        library.impl(name.removeprefix("aten::"), on_cpu(op), "CUDA", allow_override=True)
    library.impl("copy_", on_cpu(torch.ops.aten.copy_.default), "CUDA", allow_override=True)
    return library


LIBRARY = serve()
