"""Move the gain and bias of every norm into the linears that read it.

For a norm with gain g and bias b before a linear W, c:  W <- W diag(g), c <- c + W b, g <- 1,
b <- 0. What is left of an RMSNorm commutes with every orthogonal matrix. A LayerNorm also
subtracts the mean over channels, which commutes only with a matrix that keeps the mean; to be
free of that, the mean is taken out of everything that writes to the residual stream (embedding,
positions, output projections and their biases) and the norm becomes ``RMSNorm`` (S. Ashkboos et
al., SliceGPT, 2024, section 3.1). All products are float64, rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import AlreadyQuantizedError, RotationLimitError
from ..families import Family
from . import LayerContext, Transform


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension: what remains of a norm after folding.

    Half-precision inputs are normalised in float32.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"


@contextmanager
def float64(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Hold the modules' float parameters in float64 inside the block; round them once after it."""
    found = {id(m): m for root in modules for m in root.modules()}.values()
    entered = []
    for module in found:
        dtypes = {n: p.dtype for n, p in module.named_parameters(recurse=False)}
        dtypes = {n: d for n, d in dtypes.items() if d.is_floating_point}
        if any(d != torch.float64 for d in dtypes.values()):
            entered.append((module, dtypes))
            _cast(module, dict.fromkeys(dtypes, torch.float64))
    try:
        yield
    finally:
        for module, dtypes in entered:
            added = {n for n, _ in module.named_parameters(recurse=False)} - dtypes.keys()
            _cast(module, dtypes | dict.fromkeys(added, next(iter(dtypes.values()))))


def _cast(module: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    for name, dtype in dtypes.items():
        p = getattr(module, name)
        p.data = p.data.to(dtype)


def linear_at(root: nn.Module, path: str) -> nn.Linear:
    """The nn.Linear (or router) at ``path``, or a refusal that names what is there instead."""
    module = root.get_submodule(path)
    router = type(module).__name__.endswith("Router") and module.weight.dim() == 2
    if not isinstance(module, nn.Linear) and not router:
        raise AlreadyQuantizedError(
            f"{path} is a {type(module).__name__}; folding and rotating need an nn.Linear with "
            "float weights, so they come before quantisation"
        )
    return module


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent) if parent else root, name, module)


def norm_readers(family: Family) -> dict[str, tuple[str, ...]]:
    """Each norm of a layer with all linears behind it (parallel blocks share one norm)."""
    readers: dict[str, tuple[str, ...]] = {}
    for sub in family.sublayers:
        known = readers.get(sub.norm, ())
        readers[sub.norm] = tuple(dict.fromkeys((*known, *sub.reads, *sub.also)))
    return readers


def untie_head(model: nn.Module, family: Family) -> bool:
    """Give the head its own weight when it shares the embedding's; True if it did."""
    embed, head = model.get_submodule(family.embed), linear_at(model, family.head)
    if head.weight is not embed.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    config = getattr(model, "config", None)
    if config is not None:
        config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):  # else saving would drop the head as a duplicate
        model.all_tied_weights_keys = {}
    return True


def fold_into(norm: nn.Module, readers: list[nn.Linear], unit_offset: bool, centre: bool) -> None:
    """Fold one norm into its readers, in the dtype the parameters have now.

    A reader without a bias gets one when the norm has a bias and will lose it (``centre``);
    otherwise the norm keeps b / g, so that the model's layout does not change.
    """
    gain = getattr(norm, "weight", None)
    bias = getattr(norm, "bias", None)
    keep_bias = False
    if bias is not None and bool(bias.any()):
        keep_bias = not centre and any(r.bias is None for r in readers)
        if keep_bias and gain is not None:
            if bool(((gain == 0) & (bias != 0)).any()):
                raise RotationLimitError(
                    "a norm with zero gain and nonzero bias on a channel cannot pass its bias to a "
                    "linear without bias; rotate with keeps_mean=False, which adds one"
                )
            bias.data = torch.where(gain == 0, 0.0, bias / gain).detach()
        elif not keep_bias:
            for reader in readers:
                add = reader.weight.detach() @ bias.detach()
                if reader.bias is None:
                    reader.bias = nn.Parameter(add, requires_grad=False)
                else:
                    reader.bias.data = reader.bias.data + add
    if gain is not None:
        g = gain.detach() + 1 if unit_offset else gain.detach()
        for reader in readers:
            reader.weight.data = reader.weight.data * g
        gain.data = torch.zeros_like(gain) if unit_offset else torch.ones_like(gain)
    if bias is not None and not keep_bias:
        bias.data = torch.zeros_like(bias)


def rms_of(norm: nn.Module) -> RMSNorm:
    """The parameter-free norm that equals a folded LayerNorm on centred inputs."""
    return RMSNorm(norm.normalized_shape[0], norm.eps)


def centre_writer(writer: nn.Linear) -> None:
    """Take the mean over output channels out of a linear: its outputs then sum to zero."""
    writer.weight.data = writer.weight.data - writer.weight.data.mean(0, keepdim=True)
    if writer.bias is not None:
        writer.bias.data = writer.bias.data - writer.bias.data.mean()


class FoldNorm(Transform):
    """Gains and biases of all norms into their readers, the final norm's into the head.

    ``centre``: LayerNorm models also lose their means to the writers, and each norm becomes
    ``RMSNorm``. Without it a LayerNorm stays one, with gain 1. RMSNorm models ignore it.
    """

    def __init__(self, centre: bool = True) -> None:
        self.centre = centre

    def outside(self, model: nn.Module, family: Family) -> list[dict]:
        untied = untie_head(model, family)
        tables = [model.get_submodule(p) for p in (family.embed, family.positions) if p]
        head, norm = linear_at(model, family.head), model.get_submodule(family.final_norm)
        centre = self.centre and family.norm == "layer" and isinstance(norm, nn.LayerNorm)
        with float64([*tables, head, norm]):
            fold_into(norm, [head], family.unit_offset, centre)
            if centre:
                for table in tables:
                    table.weight.data = table.weight.data - table.weight.data.mean(1, keepdim=True)
        if centre:
            set_submodule(model, family.final_norm, rms_of(norm))
        return [{"path": family.final_norm, "folded_into": [family.head], "untied": untied}]

    def carry(self, hidden: Tensor, family: Family) -> Tensor:
        if self.centre and family.norm == "layer":
            hidden = hidden - hidden.mean(-1, keepdim=True)
        return hidden

    def layer(self, layer: nn.Module, context: LayerContext) -> None:
        family = context.family
        for path, readers in norm_readers(family).items():
            norm = layer.get_submodule(path)
            centre = self.centre and family.norm == "layer" and isinstance(norm, nn.LayerNorm)
            linears = [linear_at(layer, r) for r in readers]
            with float64([norm, *linears]):
                fold_into(norm, linears, family.unit_offset, centre)
            if centre:
                set_submodule(layer, path, rms_of(norm))
            context.records.append({"path": path, "folded_into": list(readers)})
        if self.centre and family.norm == "layer":
            paths = dict.fromkeys(sub.writes for sub in family.sublayers)
            writers = [linear_at(layer, path) for path in paths]
            with float64(writers):
                for writer in writers:
                    centre_writer(writer)
