"""A transformers Cache that stores keys and values in 2 to 8 bits; works in ``generate()``.

    cache = QuantizedCache(model, bits=4)
    model.generate(ids, past_key_values=cache)

Imported only by those who use it, because it subclasses a class of transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import MissingExtraError, UnsupportedError
from .families import decoder_layers, describe
from .hadamard import transform
from .kv import SLOT, KVCodes, OnlineKV, head_dim, kv_values

try:
    from transformers.cache_utils import Cache, DynamicLayer
except ImportError as error:
    raise MissingExtraError("the KV cache needs transformers: pip install fewbit[hf]") from error


def _pack(codes: KVCodes, bits: int) -> Tensor:
    """One uint8 row per token and head: codes (two a byte up to 4 bits), scale, zero point."""
    q = codes.q
    if bits <= 4:
        if q.shape[-1] % 2:
            q = torch.nn.functional.pad(q, (0, 1))
        q = q[..., 0::2] | (q[..., 1::2] << 4)
    return torch.cat((q, codes.scale.contiguous().view(torch.uint8), codes.zero_point), dim=-1)


def _unpack(rows: Tensor, bits: int, width: int) -> KVCodes:
    q, scale, zero_point = rows[..., :-3], rows[..., -3:-1], rows[..., -1:]
    if bits <= 4:
        q = torch.stack((q & 15, q >> 4), dim=-1).flatten(-2)[..., :width]
    return KVCodes(q, scale.contiguous().view(torch.float16), zero_point)


class QuantizedLayer(DynamicLayer):
    """``keys`` and ``values`` are the packed rows, so that every method which selects, repeats or
    crops along batch and tokens is the base class's own."""

    def __init__(self, online: OnlineKV, owner: nn.Module | None) -> None:
        super().__init__()
        self.online, self.owner = online, owner

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Quantise and store new keys and values; all keys and values so far, as floats."""
        online, dtype = self.online, key_states.dtype
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = self.keys.to(torch.uint8), self.values.to(torch.uint8)
        self.widths = (key_states.shape[-1], value_states.shape[-1])
        if online.rotate:
            key_states = online.hadamard(key_states)
        for name, new in (("keys", key_states), ("values", value_states)):
            rows = _pack(online.codes(new), online.bits)
            setattr(self, name, torch.cat([getattr(self, name), rows], dim=-2))
        keys, values = (
            kv_values(_unpack(rows, online.bits, width), dtype)
            for rows, width in zip((self.keys, self.values), self.widths, strict=True)
        )
        if self.owner is not None:  # its attention rotates the query instead
            self.owner.from_cache = True
        elif online.rotate:
            keys = transform(keys, online.hadamard.plan, inverse=True)
        return keys, values

    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.numel() + self.values.numel() if self.is_initialized else 0


class QuantizedCache(Cache):
    """Keys and values of ``model`` in ``bits`` bits, one scale per token and head.

    On a model that carries an OnlineKV (R3, or a scheme with kv bits) its settings hold and the
    arguments are not used. Otherwise ``rotate`` stores Q(k H) and turns keys back when they are
    read. Sliding-window layers are refused.
    """

    def __init__(
        self, model: nn.Module, bits: int = 4, rotate: bool = True,
        symmetric: bool = False, clip: float = 1.0,
    ) -> None:
        family, layers = describe(model), []
        window = getattr(model.config, "sliding_window", None)
        if window and getattr(model.config, "use_sliding_window", True):
            raise UnsupportedError(
                f"QuantizedCache has no sliding window, and {type(model).__name__} uses one of "
                f"{window} tokens"
            )
        width = head_dim(model.config)
        path = next(s.writes for s in family.sublayers if s.heads).rpartition(".")[0]
        for layer in decoder_layers(model, family):
            owner = getattr(layer.get_submodule(path), SLOT, None)
            if owner is not None and owner.bits < 16:
                layers.append(QuantizedLayer(owner, owner))
            else:
                online = OnlineKV(width, rotate, bits, symmetric, clip)
                layers.append(QuantizedLayer(online, None))
        super().__init__(layers=layers)

    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.nbytes() for layer in self.layers)
