"""Fields of 2..8 bits in little-endian int32 words: the one place that knows bit positions.

All formats store a row of codes as a dense little-endian bit stream: element i occupies bits
[bits * i, bits * i + bits). For 2, 4 and 8 bits this is field i of a word; for 3, 5, 6 and 7 bits
elements straddle words, and 32 of them fill ``bits`` words. Everything here works on the last
dimension; a format that packs along another one transposes words, never single codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32
BLOCK = 1 << 18  # codes worked on at a time: few enough to stay in cache, enough to pay a call


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
    k = q.shape[-1]
    rows = q.reshape(q.shape[:-1].numel(), k)
    out = torch.empty(len(rows), words(k, bits), dtype=torch.int32)
    whole = k + -k % WORD
    step = max(1, BLOCK // max(whole, 1))
    for i in range(0, len(rows) if out.numel() else 0, step):
        block = rows[i : i + step]
        if whole != k:
            block = torch.nn.functional.pad(block, (0, whole - k))
        out[i : i + step] = _squeeze(block.contiguous(), bits)[:, : out.shape[1]]
    return out.reshape(*q.shape[:-1], out.shape[1])


def unpack(packed: Tensor, bits: int, elements: int) -> Tensor:
    """int32 [..., words] -> uint8 codes [..., elements]: the inverse of ``pack``."""
    rows = packed.reshape(packed.shape[:-1].numel(), packed.shape[-1])
    out = torch.empty(len(rows), elements, dtype=torch.uint8)
    whole = words(elements + -elements % WORD, bits)
    step = max(1, BLOCK // max(elements, 1))
    for i in range(0, len(rows) if out.numel() else 0, step):
        block = rows[i : i + step]
        if whole != block.shape[1]:
            block = torch.nn.functional.pad(block, (0, whole - block.shape[1]))
        out[i : i + step] = _spread(block.contiguous(), bits)[:, :elements]
    return out.reshape(*packed.shape[:-1], elements)


def unpack_padded(packed: Tensor, bits: int, elements: int) -> Tensor:
    """As ``unpack`` for words that hold floor(32 / bits) fields and waste the rest (read only)."""
    shift = torch.arange(WORD // bits, dtype=torch.int32) * bits
    fields = (packed.unsqueeze(-1) >> shift) & ((1 << bits) - 1)
    return fields.flatten(-2)[..., :elements].to(torch.uint8)


def _squeeze(q: Tensor, bits: int) -> Tensor:
    """uint8 [R, 32 * W] -> int32 [R, bits * W], eight codes at a time.

    The eight bytes of an int64 close up pairwise: gaps of 8 - bits between neighbours, then twice
    that between pairs, then four times between quads. The result is the low 8 * bits bits.
    """
    if bits == 8:
        return q.view(torch.int32)
    x, gap = q.view(torch.int64), 8 - bits
    for level in range(3):
        width, shift, period = bits << level, gap << level, 16 << level
        if gap < bits:  # the shifted copy would run into fields that stay
            low, high = x & _mask(width, period), (x >> shift) & _mask(width, period, width)
            x = low.bitwise_or_(high)
        else:
            x = (x >> shift).bitwise_or_(x).bitwise_and_(_mask(2 * width, period))
    if bits == 4:
        return x.to(torch.int32)
    if bits == 2:
        return x.to(torch.int16).view(torch.int32)
    # Four chunks of 8 * bits make `bits` words: word w takes the chunks that overlap it.
    chunks = x.view(len(q), -1, 4).unbind(-1)
    size = 8 * bits
    out = []
    for w in range(bits):
        word = None
        for c, chunk in enumerate(chunks):
            at = c * size - w * WORD
            if -size < at < WORD:
                part = chunk << at if at >= 0 else chunk >> -at
                word = part if word is None else word | part
        out.append(word.to(torch.int32))  # int64 -> int32 keeps the low 32 bits
    return torch.stack(out, -1).view(len(q), -1)


def _spread(packed: Tensor, bits: int) -> Tensor:
    """int32 [R, bits * W] -> uint8 [R, 32 * W]: ``_squeeze`` run backwards."""
    if bits == 8:
        return packed.view(torch.uint8)
    if bits == 4:
        x = packed.to(torch.int64) & 0xFFFFFFFF
    elif bits == 2:
        x = packed.view(torch.int16).to(torch.int64) & 0xFFFF
    else:
        parts = packed.to(torch.int64).bitwise_and_(0xFFFFFFFF)
        parts = parts.view(len(packed), -1, bits).unbind(-1)
        size, chunks = 8 * bits, []
        for c in range(4):
            chunk = None
            for w, part in enumerate(parts):
                at = w * WORD - c * size
                if -WORD < at < size:
                    piece = part << at if at >= 0 else part >> -at
                    chunk = piece if chunk is None else chunk | piece
            chunks.append(chunk & ((1 << size) - 1))
        x = torch.stack(chunks, -1).view(len(packed), -1)
    gap = 8 - bits
    for level in (2, 1, 0):
        width, shift, period = bits << level, gap << level, 16 << level
        if gap < bits:
            low, high = x & _mask(width, period), (x & _mask(width, period, width)) << shift
            x = low.bitwise_or_(high)
        else:
            x = (x << shift).bitwise_or_(x).bitwise_and_(_mask(width, 8 << level))
    return x.view(torch.uint8)


def _mask(ones: int, period: int, at: int = 0) -> int:
    """Signed int64 with ``ones`` bits from bit ``at`` of every ``period`` bits set."""
    value = sum(((1 << ones) - 1) << (start + at) for start in range(0, 64, period))
    return value - (1 << 64) if value >> 63 else value
