"""GGUF blocks of 32 weights, as llama.cpp reads them; written, not read.

    Q4_0  18 bytes: float16 d, 16 bytes; byte j = code[j] | code[j + 16] << 4; w = (code - 8) d
    Q8_0  34 bytes: float16 d, 32 int8;                                         w = code d
    Q4_1  20 bytes: float16 d, float16 m, 16 bytes as in Q4_0;                  w = code d + m
A group of G weights becomes G / 32 blocks with the same d. Q4_0 and Q8_0 hold their grids exactly.
Q4_1 stores m = -z s in float16, which in general rounds it (relative error up to 2**-11).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatLimitError
from ..scheme import FLOAT_BITS, Codes, Scheme
from .base import exact

BLOCK = 32
BYTES = {"Q4_0": 18, "Q8_0": 34, "Q4_1": 20}


def kind_of(scheme: Scheme) -> str:
    """The block type that holds a scheme."""
    if scheme.bits <= 4:
        return "Q4_0" if scheme.symmetric else "Q4_1"
    return "Q8_0"


def refuse(scheme: Scheme, k: int) -> str | None:
    """Why such a weight has no blocks, or None."""
    if scheme.activation_bits < FLOAT_BITS:
        return f"GGUF is weight only, {scheme} quantises activations"
    if k % BLOCK or (scheme.group_size != -1 and scheme.group_size % BLOCK):
        return f"GGUF needs inputs and group_size in multiples of 32, not {k} and {scheme}"
    if scheme.bits == 8 and not scheme.symmetric:
        return "Q8_0 holds differences q - z of at most 7 bits, or symmetric 8 bits"
    return None


def blocks(codes: Codes, scheme: Scheme, rounding: bool = False) -> tuple[str, Tensor]:
    """Type name and uint8 [N, K / 32 * bytes per block].

    Raises UnsupportedError when a scale is no float16, and for Q4_1 when a minimum would be rounded
    and ``rounding`` is False.
    """
    n, k = codes.q.shape
    why = refuse(scheme, k)
    if why:
        raise FormatLimitError(why)
    kind, each = kind_of(scheme), scheme.group_of(k) // BLOCK

    def per_block(values: Tensor) -> Tensor:
        return values.repeat_interleave(each, 1)[:, : k // BLOCK].contiguous()

    d = exact(codes.scale, torch.float16, "GGUF")
    parts = [per_block(d).view(torch.uint8).view(n, -1, 2)]
    if kind == "Q4_1":
        low = -codes.zero_point.float() * d.float()
        m = low.to(torch.float16)
        if not rounding and not torch.equal(m.float(), low):
            raise FormatLimitError(
                "Q4_1 stores the minimum -z s in float16, which would round it here; allow it with "
                "rounding=True, or quantise symmetrically"
            )
        parts.append(per_block(m).view(torch.uint8).view(n, -1, 2))
    if kind == "Q8_0":
        shift = per_block(codes.zero_point).repeat_interleave(BLOCK, 1)
        parts.append((codes.q - shift).view(n, -1, BLOCK))  # modulo 256, which int8 reads back
    else:
        # Narrower symmetric grids sit in the middle of Q4_0's.
        q = codes.q + (8 - (1 << (scheme.bits - 1))) if kind == "Q4_0" else codes.q
        q = q.view(n, -1, 2, BLOCK // 2)
        parts.append(q[:, :, 0] | (q[:, :, 1] << 4))
    return kind, torch.cat(parts, -1).view(n, -1)
