"""Quantised keys and values, and the rotation of queries and keys that makes keys easy to quantise.

One scale and one zero point per token and head. ``OnlineKV`` hangs on an attention module and acts
on q, k and v after rope, through transformers' attention interface: it is what an evaluation
without cache sees. ``kv_cache.QuantizedCache`` stores the same codes, packed, for generation.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import MissingExtraError, RotationLimitError, UnsupportedError, UsageError
from .online import KV_SLOT as SLOT
from .online import OnlineHadamard, straight_through
from .orthogonal import rotation
from .scheme import check_int

PREFIX = "fewbit_"


def head_dim(config: Any) -> int:
    """Channels of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class KVCodes(NamedTuple):
    """``x = (q - zero_point) * scale``: q uint8 [..., width], scale float16 and zero_point uint8
    [..., 1]."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor


def kv_codes(x: Tensor, bits: int, symmetric: bool = False, clip: float = 1.0) -> KVCodes:
    """Codes 0 .. 2^bits - 1 of each row of x [..., width], against the float16 scale.

    The range holds 0 and is shrunk by ``clip``; an all-zero row has scale 1.
    """
    check_int("bits", bits, 2, 8)
    top = 2**bits - 1
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    if symmetric:
        scale = h.abs().amax(-1, keepdim=True) * clip / (2 ** (bits - 1) - 1)
    else:
        low = h.amin(-1, keepdim=True).clamp(max=0) * clip
        scale = (h.amax(-1, keepdim=True).clamp(min=0) * clip - low) / top
    scale = scale.clamp(max=65504.0).to(torch.float16)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    s = scale.to(h.dtype)
    if symmetric:
        zero = torch.full_like(s, 2 ** (bits - 1))
    else:
        zero = (-(low / s).round()).clamp(0, top)
    q = ((h / s).round() + zero).clamp(0, top)
    return KVCodes(q.to(torch.uint8), scale, zero.to(torch.uint8))


def kv_values(codes: KVCodes, dtype: torch.dtype) -> Tensor:
    """The floats that the codes stand for, [..., width] in ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    q = codes.q.to(wide) - codes.zero_point.to(wide)
    return (q * codes.scale.to(wide)).to(dtype)


class OnlineKV(nn.Module):
    """q, k, v [batch, heads, tokens, width] -> q H, Q(k H), Q(v); H only with ``rotate``.

    ``bits`` 16 leaves k and v float.
    """

    def __init__(
        self, width: int, rotate: bool = False, bits: int = 16,
        symmetric: bool = False, clip: float = 1.0,
    ) -> None:
        super().__init__()
        if bits != 16 and not 2 <= bits <= 8:
            raise UsageError(f"kv bits must be 16 (float) or in 2..8, got {bits}")
        self.width, self.rotate, self.bits = width, rotate, bits
        self.symmetric, self.clip = symmetric, clip
        self.hadamard = OnlineHadamard(rotation(width))
        self.from_cache = False  # set by QuantizedCache: k and v arrive rotated and quantised

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.rotate:
            q = self.hadamard(q)
        if self.from_cache:
            self.from_cache = False
            return q, k, v
        if self.rotate:
            k = self.hadamard(k)
        if self.bits < 16:
            k, v = self.through(k), self.through(v)
        return q, k, v

    def through(self, x: Tensor) -> Tensor:
        """x on its grid and back; a gradient passes straight through."""
        return straight_through(lambda t: kv_values(self.codes(t), t.dtype), x)

    def codes(self, x: Tensor) -> KVCodes:
        return kv_codes(x, self.bits, self.symmetric, self.clip)

    def settings(self) -> dict:
        """JSON for runtime.py."""
        names = ("width", "rotate", "bits", "symmetric", "clip")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        return f"{self.width}, rotate={self.rotate}, bits={self.bits}"


def require_interface(module: nn.Module, what: str) -> None:
    """RotationLimitError where a model's file computes attention by itself (Falcon, Bloom)."""
    if not hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS"):
        raise RotationLimitError(
            f"{what} is not supported for {type(module).__name__}: its attention does not go "
            "through transformers' attention interface, where keys and values could be changed"
        )


def attach_kv(attention: nn.Module, width: int, **changes: Any) -> OnlineKV:
    """Hang an OnlineKV on an attention module, or change the one it has, and let the model's
    attention pass through it: "eager", or any implementation that transformers registers."""
    require_interface(attention, "a rotated or quantised KV")
    config = attention.config  # the whole model's: one object
    if not config._attn_implementation.startswith(PREFIX):
        config._attn_implementation = _register(config._attn_implementation)
    online = getattr(attention, SLOT, None)
    if online is None:
        online = OnlineKV(width, **changes)
        attention.add_module(SLOT, online)
        return online
    for name, value in changes.items():
        setattr(online, name, value)
    return online


@cache
def _register(base: str) -> str:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise MissingExtraError(
            "rotating or quantising keys and values needs transformers: pip install fewbit[hf]"
        ) from error
    functions, masks = AttentionInterface(), AttentionMaskInterface()
    if base != "eager" and base not in functions:
        raise UnsupportedError(f"attention implementation {base!r} cannot carry a quantised KV")

    def attention(module, query, key, value, attention_mask, **kwargs):
        online = getattr(module, SLOT, None)
        if online is not None:
            query, key, value = online(query, key, value)
        if base == "eager":  # every model file has its own
            run = sys.modules[type(module).__module__].eager_attention_forward
        else:
            run = functions[base]
        return run(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(PREFIX + base, attention)
    if base in masks:
        AttentionMaskInterface.register(PREFIX + base, masks[base])
    return PREFIX + base
