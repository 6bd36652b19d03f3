"""Fields of 2..8 bits in little-endian int32 words: the one place that knows bit positions.

All formats store a row of codes as a dense little-endian bit stream: element i occupies bits
[bits * i, bits * i + bits). For 2, 4 and 8 bits this is field i of a word; for 3, 5, 6 and 7 bits
elements straddle words, and 32 of them fill ``bits`` words. Everything here works on the last
dimension; a format that packs along another one transposes words, never single codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops

WORD = 32


def words(elements: int, bits: int) -> int:
    """int32 words of a dense stream of ``elements`` fields."""
    return -(-elements * bits // WORD)


def words_padded(elements: int, bits: int) -> int:
    """int32 words when each holds only floor(32 / bits) whole fields (older 3-bit files)."""
    return -(-elements // (WORD // bits))


def pack(q: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., K] below 2**bits -> int32 [..., ceil(K * bits / 32)]; tail bits are zero.

    Codes are not checked here: one above 2**bits - 1 would run into its neighbour.
    """
    rows = q.reshape(q.shape[:-1].numel(), q.shape[-1])
    return ops.pack_fields(rows, bits).reshape(*q.shape[:-1], words(q.shape[-1], bits))


def unpack(packed: Tensor, bits: int, elements: int) -> Tensor:
    """int32 [..., words] -> uint8 codes [..., elements]: the inverse of ``pack``."""
    rows = packed.reshape(packed.shape[:-1].numel(), packed.shape[-1])
    return ops.unpack_fields(rows, bits, elements).reshape(*packed.shape[:-1], elements)


def unpack_padded(packed: Tensor, bits: int, elements: int) -> Tensor:
    """As ``unpack`` for words that hold floor(32 / bits) fields and waste the rest (read only)."""
    shift = torch.arange(WORD // bits, dtype=torch.int32) * bits
    fields = (packed.unsqueeze(-1) >> shift) & ((1 << bits) - 1)
    return fields.flatten(-2)[..., :elements].to(torch.uint8)
