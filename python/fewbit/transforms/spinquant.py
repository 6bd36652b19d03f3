"""Rotations learned for a quantised network: R1 and R2 on the Stiefel manifold.

Z. Liu et al., SpinQuant, 2024, section 3. First the rotations are fitted to activations alone
(ranges.py), which is quick; then the network is trained. It has quantised activations (and weights,
if asked) and gradients pass straight through the rounding. The loss is the next-token cross-entropy
("ce"), as in the paper, or the KL divergence from the float model's predictions ("kl"), which is
only about what quantisation does and so shows it with far less noise. Optimisers: stiefel.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .. import ops
from ..errors import MissingCalibrationError, UsageError
from ..families import Family, decoder_layers
from ..kv import head_dim
from ..online import straight_through
from ..orthogonal import householder_to_mean, rotation
from ..scheme import FLOAT_BITS, MANY, Scheme, check_int
from . import LayerContext, ranges
from .activations import QuantizeActivations
from .edges import inner_channels
from .fold import FoldNorm, norm_readers
from .ranges import sample_inputs
from .rotate import Rotate
from .shift import shift_model
from .stiefel import OPTIMIZERS, Stiefel

LOSSES = ("kl", "ce")


class SpinQuant(Rotate):
    """Rotate with learned R1 and R2. R3 and R4 stay Hadamard.

    ``range_steps`` of fitting to activations, then ``steps`` of ``batch`` windows each through the
    network, learning rate falling linearly to 0; ``weights``: learn with quantised weights too, for
    rounding to nearest (without, for GPTQ, which repairs weights itself).
    ``activations``: the grids that are learned for; ``shift``: on inputs whose means will go into
    biases (shift.py).

    ``threads``: of the learning; a fixed number makes the result the same on any machine with the
    same libraries.
    """

    needs_tokens = True

    def __init__(
        self,
        steps: int = 20,
        lr: float | None = None,
        batch: int = 2,
        range_steps: int = 300,
        weights: bool = False,
        optimizer: str = "cayley-adam",
        loss: str = "kl",
        r1: str = "random-hadamard",
        r2: str = "random-hadamard",
        r3: str | None = None,
        r4: str | None = "random-hadamard",
        seed: int = 0,
        keeps_mean: bool = True,
        threads: int = 1,
        activations: QuantizeActivations | None = None,
        shift: bool = False,
    ) -> None:
        super().__init__(r1, r2, r3, r4, seed, keeps_mean)
        if optimizer not in OPTIMIZERS:
            raise UsageError(f"optimizer must be one of {OPTIMIZERS}, got {optimizer!r}")
        if loss not in LOSSES:
            raise UsageError(f"loss must be one of {LOSSES}, got {loss!r}")
        check_int("steps", steps, 0, 100 * MANY)
        check_int("range_steps", range_steps, 0, 100 * MANY)
        check_int("batch", batch, 1, MANY)
        check_int("threads", threads, 1, MANY)
        self.steps, self.batch, self.weights, self.threads = steps, batch, weights, threads
        self.lr = lr if lr is not None else (0.001 if optimizer == "cayley-adam" else 1.5)
        self.optimizer, self.loss, self.start = optimizer, loss, (r1, r2)
        self.activations = activations or QuantizeActivations()
        self.range_steps, self.shift, self.losses = range_steps, shift, []

    def to_dict(self) -> dict:
        keys = ("range_steps", "steps", "lr", "batch", "weights", "optimizer", "loss", "start",
                "shift")
        own = {key: getattr(self, key) for key in keys}
        return {**super().to_dict(), "name": "SpinQuant", **own}

    def prepare(
        self, model: nn.Module, family: Family, scheme: Scheme, batches: list[Tensor]
    ) -> None:
        """Learn R1 and R2 on token windows int64 [1, tokens]; afterwards this is a Rotate."""
        if not batches:
            raise MissingCalibrationError("spinquant learns from calibration, and there is none")
        super().prepare(model, family, scheme, batches)
        self.r1, self.r2 = self.start
        with _threads(self.threads), torch.enable_grad():
            self._learn(_Twin(model, family, scheme, self, batches), batches)

    def _learn(self, twin: _Twin, batches: list[Tensor]) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.losses = []
        for step in range(self.steps):
            pick = torch.randperm(len(batches), generator=generator)[: self.batch].tolist()
            loss = twin.loss([batches[i] for i in pick])
            loss.backward()
            self.losses.append(float(loss.detach()))
            for matrix in (twin.r1, *twin.r2):
                matrix.step(self.lr * (1 - step / self.steps))
        self.r1, self.r2 = twin.full_r1(twin.r1.result()), [r.result() for r in twin.r2]
        self._cache.clear()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Twin:
    """A folded float32 copy of the model whose weights are functions of R1 and R2."""

    def __init__(
        self, model: nn.Module, family: Family, scheme: Scheme, spin: SpinQuant,
        batches: list[Tensor],
    ) -> None:
        self.float, self.kl = model, spin.loss == "kl"
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.family, self.scheme, self.quantize_weights = family, scheme, spin.weights
        config = self.model.config
        keep = family.norm == "layer" and spin.keeps_mean
        fixed = spin.online_part()
        fold = FoldNorm(centre=not keep)
        with torch.no_grad():
            for transform in (fold, fixed, spin.activations):
                if transform is spin.activations:
                    if spin.shift:
                        shift_model(self.model, family, batches)
                    if spin.range_steps:
                        inputs = sample_inputs(self.model, family, batches)
                transform.outside(self.model, family)
                for index, layer in enumerate(decoder_layers(self.model, family)):
                    transform.layer(layer, LayerContext(index, family, config, scheme, {}))
        width, dim = config.hidden_size, head_dim(config)
        self.dim = dim
        device = self.model.get_submodule(family.embed).weight.device
        start = rotation(width, spin.start[0], spin.seed, keep).matrix()
        # With the mean kept, the free part is the n - 1 dimensions beside it.
        self.frame = householder_to_mean(width) if keep else None
        free = start if self.frame is None else (self.frame @ start @ self.frame)[1:, 1:]
        self.r1 = Stiefel(free.to(device), spin.optimizer)
        layers = len(decoder_layers(self.model, family))
        self.r2 = [
            Stiefel(
                rotation(dim, spin.start[1], spin.seed + 1 + i).matrix().to(device), spin.optimizer
            )
            for i in range(layers)
        ]
        if spin.range_steps:
            self.fit_ranges(*inputs, spin.range_steps, torch.Generator().manual_seed(spin.seed))

    def fit_ranges(
        self, hidden: Tensor, values: list[Tensor], steps: int, generator: torch.Generator
    ) -> None:
        lr = 0.003 if self.r1.optimizer == "cayley-adam" else 0.05
        ranges.learn(
            self.r1, lambda x, r: x @ self.full_r1(r), hidden, steps, lr, generator
        )
        for r2, x in zip(self.r2, values, strict=True):
            x = x.reshape(len(x), -1, self.dim)
            ranges.learn(r2, lambda x, r: (x @ r).flatten(1), x, steps, lr, generator)
        for matrix in (self.r1, *self.r2):  # the network's loss starts with a fresh memory
            matrix.momentum.zero_(), matrix.second.zero_()
            matrix.steps = 0

    def full_r1(self, free: Tensor) -> Tensor:
        if self.frame is None:
            return free
        frame = self.frame.to(free)
        return frame @ torch.block_diag(free.new_ones(1, 1), free) @ frame

    def parameters(self) -> dict[str, Tensor]:
        """Every rotated parameter by its path, differentiable in R1 and R2."""
        family, r1 = self.family, self.full_r1(self.r1.value)
        of = dict(self.model.named_parameters())
        new = {}
        for path in filter(None, (family.embed, family.positions, family.head)):
            new[f"{path}.weight"] = of[f"{path}.weight"] @ r1
        norms = [family.final_norm]
        for index in range(len(self.r2)):
            base, r2 = f"{family.layers}.{index}.", self.r2[index].value
            norms += [base + norm for norm in norm_readers(family)]
            for path in dict.fromkeys(r for reads in norm_readers(family).values() for r in reads):
                new[f"{base}{path}.weight"] = of[f"{base}{path}.weight"] @ r1
            for sub in family.sublayers:
                writer = f"{base}{sub.writes}"
                w = r1.T @ of[f"{writer}.weight"]
                if sub.heads:
                    layer = self.model.get_submodule(base[:-1])
                    rows, _ = inner_channels(layer, sub, self.model.config)
                    self._turn_values(new, of, base + sub.inner, r2, rows)
                    w = (w.reshape(len(w), -1, self.dim) @ r2).reshape(w.shape)
                new[f"{writer}.weight"] = w
                if f"{writer}.bias" in of:
                    new[f"{writer}.bias"] = of[f"{writer}.bias"] @ r1
            if self.quantize_weights and self.scheme.bits < FLOAT_BITS:
                for path in family.linears():
                    name = f"{base}{path}.weight"
                    new[name] = self._on_grid(new.get(name, of[name]))
        for norm in norms:
            if f"{norm}.bias" in of:
                new[f"{norm}.bias"] = of[f"{norm}.bias"] @ r1
        return new

    def _turn_values(
        self, new: dict, of: dict, path: str, r2: Tensor, rows: Tensor | None
    ) -> None:
        w = new[f"{path}.weight"]
        rows = (torch.arange(len(w)) if rows is None else rows).to(w.device)
        turned = torch.einsum("ij,hik->hjk", r2, w[rows].reshape(-1, self.dim, w.shape[1]))
        new[f"{path}.weight"] = w.index_copy(0, rows, turned.reshape(-1, w.shape[1]))
        if f"{path}.bias" in of:
            bias = of[f"{path}.bias"]
            turned = (bias[rows].reshape(-1, self.dim) @ r2).reshape(-1)
            new[f"{path}.bias"] = bias.index_copy(0, rows, turned)

    def _on_grid(self, w: Tensor) -> Tensor:
        s = self.scheme
        return straight_through(
            lambda t: ops.pseudo_quantize(t, s.bits, s.group_size, s.symmetric, s.scale_dtype), w
        )

    def loss(self, windows: list[Tensor]) -> Tensor:
        """Mean loss over the predictions of windows int64 [batch, tokens], each counted alike."""
        parameters, losses = self.parameters(), []
        for ids in windows:
            kwargs = {"input_ids": ids, "use_cache": False}
            logits = functional_call(self.model, parameters, (), kwargs).logits[:, :-1]
            logits = logits.flatten(0, 1).float()
            if self.kl:
                with torch.no_grad():
                    aim = self.float(**kwargs).logits[:, :-1].flatten(0, 1).float()
                aim, logits = aim.log_softmax(-1), logits.log_softmax(-1)
                losses.append(F.kl_div(logits, aim, reduction="batchmean", log_target=True))
            else:
                losses.append(F.cross_entropy(logits, ids[:, 1:].flatten()))
        return torch.stack(losses).mean()
