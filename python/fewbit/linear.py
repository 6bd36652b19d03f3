"""The modules that carry packed weights, in place of nn.Linear."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops
from .errors import UsageError
from .scheme import Codes, Scheme

PACKABLE_BITS = (2, 3, 4, 8)


class KeepsType(nn.Module):
    """A module with float buffers whose type model.to(dtype), model.half() and the like leave."""

    keeps_type: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name) for name in self.keeps_type}
        super()._apply(fn, recurse)
        for name, old in before.items():
            if old is not None and getattr(self, name).dtype != old.dtype:
                setattr(self, name, old.to(getattr(self, name).device))
        return self


class PackedLinear(KeepsType):
    """y = x W^T + b with W on a grid of 2..8 bits, unpacked inside the matrix product.

    Buffers: ``packed`` int32 [words], ``scale`` [panels, groups, 16] of ``scheme.scale_dtype`` and
    ``zero_point`` uint8 [panels, groups, 16] (cpp/include/fewbit/layout.h); ``bias`` [out_features]
    or None. Widths of 5 to 7 bits are stored in 8. Input [..., in_features] in float32, float16 or
    bfloat16; output of the same type, accumulated in float32. With a symmetric grid for its inputs
    beside it (online.ActivationQuant) the product is in integers, exact within a group, and where
    an online transform comes first, one operator makes its codes.
    """

    keeps_type = ("scale",)  # the codes were computed against it

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
        flat = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        weight = (self.packed, self.scale, self.zero_point, self.bias, self.out_features)
        group_size, taken = self.scheme.group_size, self.takes(x)
        if not taken:
            out = ops.w4a16_linear(flat, *weight, self.stored_bits, group_size)
            return out if x.dim() == 2 else out.reshape(*x.shape[:-1], self.out_features)
        quant = self.online_quant
        fours, clip = self._fours(quant), None
        if "online_hadamard" in taken:
            codes, scale = self.online_hadamard.codes(flat, quant.bits, quant.clip)
        elif fours:  # quantised in the product
            codes, scale, clip = flat, None, quant.clip
        else:
            codes, scale = quant.codes(flat)
        if fours:
            out = ops.w4a4_linear(codes, *weight, group_size, scale, clip)
        else:
            out = ops.w8a8_linear(codes, *weight, self.stored_bits, group_size, True, scale)
        return out.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def takes(self, x: Tensor) -> tuple[str, ...]:
        """The slots (online.SLOTS) whose work on x the product does itself."""
        quant = self._modules.get("online_quant")
        if quant is None or type(self) is not PackedLinear or not quant.serves(x):
            return ()
        words = self._fours(quant) and self.in_features % 8 == 0
        whole = words or (quant.bits == 8 and quant.per == "token")
        if whole and self._modules.get("online_hadamard") is not None:
            return ("online_hadamard", "online_quant")
        return ("online_quant",)

    def _fours(self, quant: nn.Module) -> bool:
        """Whether codes of 4 bits meet codes of 4 bits."""
        return quant.bits == self.stored_bits == 4 and quant.per == "token"

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

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, scheme={self.scheme}"


class Int8Linear(PackedLinear):
    """PackedLinear with int8 activations: W8A8, or W4A8 with 4-bit codes; integer sums are exact.

    ``scheme.activations`` says how activations are scaled: "token" (one dynamic scale a row),
    "tensor" (one dynamic scale a call) or "static" (``x_scale`` [1] float32). Without
    ``scheme.symmetric_activations`` a token has a zero point of its own, and static scales have
    ``x_zero_point`` [1] int32.
    """

    keeps_type = ("scale", "x_scale")

    def __init__(
        self,
        codes: Codes,
        scheme: Scheme,
        bias: Tensor | None = None,
        x_scale: Tensor | None = None,
        x_zero_point: Tensor | None = None,
    ) -> None:
        super().__init__(codes, scheme, bias)
        if scheme.activation_bits != 8:
            raise UsageError(f"Int8Linear needs activation_bits 8, got {scheme.activation_bits}")
        if (scheme.activations == "static") != (x_scale is not None):
            raise UsageError(
                'x_scale belongs to activations="static" and is needed there, '
                f"got {scheme.activations!r} {'with' if x_scale is not None else 'without'} x_scale"
            )
        self.symmetric = scheme.symmetric_activations
        if scheme.activations == "tensor" and not self.symmetric:
            raise UsageError('activations="tensor" has a symmetric grid only')
        if (x_zero_point is not None) != (x_scale is not None and not self.symmetric):
            raise UsageError(
                "x_zero_point belongs to static, asymmetric activations and is needed there"
            )
        sums = None
        if not self.symmetric:
            sums = ops.code_sums(codes.q, codes.zero_point, scheme.group_size)
        self.register_buffer("x_scale", x_scale)
        self.register_buffer("x_zero_point", x_zero_point)
        self.register_buffer("code_sum", sums, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        x_scale = self.x_scale
        if self.scheme.activations == "tensor" and flat.shape[0]:
            tiny = torch.finfo(torch.float32).tiny
            x_scale = (flat.abs().amax().float() / 127).clamp(min=tiny).reshape(1)
        out = ops.w8a8_linear(
            flat,
            self.packed,
            self.scale,
            self.zero_point,
            self.bias,
            self.out_features,
            self.stored_bits,
            self.scheme.group_size,
            self.symmetric,
            x_scale,
            self.x_zero_point,
            self.code_sum,
        )
        return out if x.dim() == 2 else out.reshape(*x.shape[:-1], self.out_features)


class Int4Linear(PackedLinear):
    """PackedLinear of 4 bits with activations of 4 bits, one dynamic scale a token; integer sums
    are exact."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        weight = (self.packed, self.scale, self.zero_point, self.bias, self.out_features)
        out = ops.w4a4_linear(flat, *weight, self.scheme.group_size)
        return out if x.dim() == 2 else out.reshape(*x.shape[:-1], self.out_features)


class MixedInt8Linear(PackedLinear):
    """LLM.int8() (arXiv 2208.07339): int8 but for activation columns beyond ``threshold``.

    ``kept`` int64 [n] and ``kept_weight`` float32 [n, out_features]: columns whose float weights
    are used when they are outliers; other outliers meet the dequantised int8 column. ``outliers``
    fixes the set, so that a row's result does not depend on its batch.
    """

    keeps_type = ("scale", "kept_weight")

    def __init__(
        self,
        codes: Codes,
        scheme: Scheme,
        bias: Tensor | None = None,
        threshold: float = 6.0,
        outliers: Tensor | None = None,
        kept: Tensor | None = None,
        kept_weight: Tensor | None = None,
    ) -> None:
        super().__init__(codes, scheme, bias)
        if self.stored_bits != 8:
            raise UsageError(f"MixedInt8Linear needs weights of 8 bits, got {scheme.bits}")
        self.threshold = threshold
        self.register_buffer("outliers", outliers)
        self.register_buffer("kept", kept)
        self.register_buffer("kept_weight", kept_weight)

    def forward(self, x: Tensor) -> Tensor:
        flat = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        out = ops.int8_mixed_linear(
            flat,
            self.packed,
            self.scale,
            self.zero_point,
            self.bias,
            self.out_features,
            self.scheme.group_size,
            self.threshold,
            self.outliers,
            self.kept,
            self.kept_weight,
        )
        return out if x.dim() == 2 else out.reshape(*x.shape[:-1], self.out_features)
