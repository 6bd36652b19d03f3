"""The modules that carry packed weights, in place of nn.Linear."""

from __future__ import annotations

from torch import Tensor, nn

from . import ops
from .scheme import Codes, Scheme

PACKABLE_BITS = (2, 3, 4, 8)


class PackedLinear(nn.Module):
    """y = x W^T + b with W on a grid of 2..8 bits, unpacked inside the matrix product.

    Buffers: ``packed`` int32 [words], ``scale`` [panels, groups, 16] of ``scheme.scale_dtype`` and
    ``zero_point`` uint8 [panels, groups, 16] (cpp/include/fewbit/layout.h); ``bias`` [out_features]
    or None. Widths of 5 to 7 bits are stored in 8. Input [..., in_features] in float32, float16 or
    bfloat16; output of the same type, accumulated in float32.
    """

    def __init__(self, codes: Codes, scheme: Scheme, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.q.shape
        self.scheme = scheme
        self.stored_bits = scheme.bits if scheme.bits in PACKABLE_BITS else 8
        packed, scale, zero_point = ops.pack(*codes, self.stored_bits, scheme.group_size)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme | str) -> PackedLinear:
        """Pack one layer by round-to-nearest, without calibration."""
        scheme = Scheme.parse(scheme)
        weight = linear.weight.detach()
        codes = Codes(
            *ops.quantize(
                weight, scheme.bits, scheme.group_size, scheme.symmetric, scheme.scale_dtype
            )
        )
        return cls(codes, scheme, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        out = ops.w4a16_linear(
            flat,
            self.packed,
            self.scale,
            self.zero_point,
            self.bias,
            self.out_features,
            self.stored_bits,
            self.scheme.group_size,
        )
        return out.reshape(*x.shape[:-1], self.out_features)

    def codes(self) -> Codes:
        """The canonical form, for checkpoints and inspection."""
        return Codes(
            *ops.unpack(
                self.packed,
                self.scale,
                self.zero_point,
                self.out_features,
                self.in_features,
                self.stored_bits,
                self.scheme.group_size,
            )
        )

    @property
    def weight(self) -> Tensor:
        """The weight in use, float32 [out_features, in_features]; computed at every access."""
        return ops.dequantize(*self.codes(), self.scheme.group_size)

    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and bias as held in memory."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def _apply(self, fn, recurse=True):
        # model.half() and the like change the type of activations; scales keep theirs, because the
        # codes were computed against them.
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, scheme={self.scheme}"
