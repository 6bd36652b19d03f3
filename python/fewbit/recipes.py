"""A method is a recipe: transforms in order, then a solver, on a scheme.

``build("awq", "w4a16g128")`` makes one by name; ``build("awq+gptq", ...)`` stacks the transforms of
both and takes the last solver that is not plain rounding. In a stack "mixed" keeps its columns
float and leaves the rest to the other solver.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from .errors import UsageError
from .scheme import FLOAT_BITS, Scheme
from .solvers import Solver
from .solvers.auto import WIDTHS, Auto
from .solvers.clip import QUERY_KEY, Clip
from .solvers.gptq import GPTQ
from .solvers.llm_int8 import LLMInt8
from .solvers.mixed import Mixed
from .solvers.rtn import RTN
from .transforms import Transform
from .transforms.activations import QuantizeActivations
from .transforms.rotate import Rotate
from .transforms.scale import SearchScale
from .transforms.shift import Shift
from .transforms.smooth import Smooth
from .transforms.spinquant import SpinQuant
from .tune import Tune


@dataclass(frozen=True)
class Recipe:
    """What ``quantize_`` does. ``sequential``: later layers are calibrated on the outputs of the
    already quantised earlier ones (True), or of the float ones; ``true_sequential``: inside a layer
    too, later linears see the earlier ones quantised. ``schemes``: by full name, the linears whose
    scheme is not ``scheme``; ``tune``: what learns the quantised model as a whole afterwards."""

    name: str
    scheme: Scheme
    transforms: tuple[Transform, ...] = ()
    solver: Solver = RTN()  # noqa: RUF009  (stateless)
    sequential: bool = True
    true_sequential: bool = False
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    tune: Tune | None = None

    def scheme_of(self, name: str) -> Scheme:
        """The scheme of one linear."""
        return self.schemes.get(name, self.scheme)

    @property
    def possible_schemes(self) -> tuple[Scheme, ...]:
        """Every scheme that a linear may get."""
        widths = self.solver.widths if isinstance(self.solver, Auto) else ()
        wide = (replace(self.scheme, bits=bits) for bits in widths)
        return tuple(dict.fromkeys((self.scheme, *self.schemes.values(), *wide)))

    @property
    def needs_stats(self) -> bool:
        return (
            self.solver.needs_stats
            or self.tune is not None
            or any(t.needs_stats or t.needs_tokens for t in self.transforms)
            or (self.integer and self.scheme.activations == "static")
        )

    @property
    def quantizes_activations(self) -> bool:
        """A transform puts the activations on their grid."""
        return any(t.quantizes_activations for t in self.transforms)

    @property
    def integer(self) -> bool:
        """The packed linears run the scheme's quantised activations themselves."""
        return self.scheme.activation_bits < FLOAT_BITS and not self.quantizes_activations

    def to_dict(self) -> dict:
        return {
            "name": self.name,
            "scheme": self.scheme.to_dict(),
            "transforms": [t.to_dict() for t in self.transforms],
            "solver": self.solver.to_dict(),
            "sequential": self.sequential,
            "true_sequential": self.true_sequential,
            "schemes": {name: str(scheme) for name, scheme in self.schemes.items()},
            "tune": None if self.tune is None else self.tune.to_dict(),
        }


def rtn(scheme: Scheme | str = "w4a16g128") -> Recipe:
    """Round to nearest: no calibration."""
    return Recipe("rtn", Scheme.parse(scheme))


def awq(
    scheme: Scheme | str = "w4a16g128",
    points: int = 20,
    form: str = "duo",
    closed_alpha: float = 0.5,
    inner: bool = True,
    clip: bool = True,
    clip_qk: bool = True,
) -> Recipe:
    """Activation-aware scales (J. Lin et al., 2023), then rounding; ``clip``: on clipped ranges.

    ``closed_alpha`` is the exponent of the closed forms (transforms/scale.py). ``clip_qk=False``
    leaves queries and keys on their full range, and what a family fuses with them. The defaults
    have the least perplexity on held-out calibration text (tests/bench_methods.py).
    """
    solver = Clip(skip=() if clip_qk else QUERY_KEY) if clip else RTN()
    scales = SearchScale(points, form, closed_alpha, inner)
    return Recipe("awq", Scheme.parse(scheme), (scales,), solver)


SMOOTH_LEVELS = {"O1": "token", "O2": "tensor", "O3": "static"}


def smoothquant(
    scheme: Scheme | str = "w8a8",
    alpha: float | str = 0.5,
    inner: bool = True,
    level: str | None = None,
) -> Recipe:
    """SmoothQuant (G. Xiao et al., 2023): smooth, then round weights and activations.

    ``alpha``: 0..1, or "auto" for each edge. ``level``: how activations are scaled, "O1" per token,
    "O2" per tensor, "O3" static from calibration; by default as the scheme says.
    """
    scheme = Scheme.parse(scheme)
    if level is not None:
        if level not in SMOOTH_LEVELS:
            raise UsageError(f"level must be one of {', '.join(SMOOTH_LEVELS)}, got {level!r}")
        scheme = Scheme.parse(scheme, activations=SMOOTH_LEVELS[level])
    return Recipe("smoothquant", scheme, (Smooth(alpha, inner),))


def mixed(
    scheme: Scheme | str = "w4a16g128", fraction: float = 0.01, by: str = "activation",
    seed: int = 0,
) -> Recipe:
    """Round to nearest, but ``fraction`` of the input columns stay float (solvers/mixed.py)."""
    return Recipe("mixed", Scheme.parse(scheme), solver=Mixed(fraction, by, seed))


def llm_int8(scheme: Scheme | str = "w8a8", threshold: float = 6.0) -> Recipe:
    """LLM.int8() (T. Dettmers et al., 2022): no calibration; ``threshold`` of an outlier column."""
    return Recipe("llm-int8", Scheme.parse(scheme), solver=LLMInt8(threshold))


def gptq(
    scheme: Scheme | str = "w4a16g128",
    sequential: bool = True,
    true_sequential: bool = False,
    **options,
) -> Recipe:
    """Error-compensating rounding (E. Frantar et al., 2022); ``options`` as solvers.gptq.GPTQ."""
    solver = GPTQ(**options)
    return Recipe("gptq", Scheme.parse(scheme), (), solver, sequential, true_sequential)


def qronos(
    scheme: Scheme | str = "w4a16g128",
    sequential: bool = True,
    true_sequential: bool = True,
    **options,
) -> Recipe:
    """GPTQ towards the float model's outputs (S. Zhang et al., Qronos, 2025), then coordinate
    descent: the best of solvers.gptq.GPTQ's options together, at twice the calibration passes."""
    solver = GPTQ(**{"target": "qronos", "sweeps": 3, **options})
    return Recipe("qronos", Scheme.parse(scheme), (), solver, sequential, true_sequential)


def auto(
    scheme: Scheme | str = "w4a16g128",
    bits: float | None = None,
    kl: float | None = None,
    widths: tuple[int, ...] = WIDTHS,
) -> Recipe:
    """Mixed widths and the stack that suits (auto.choose), within the size of ``scheme`` or of
    ``bits`` a weight, or to a quality ``kl``; it stands in no stack, but "auto+tune"."""
    return Recipe("auto", Scheme.parse(scheme), solver=Auto(bits, kl, widths))


def quarot(
    scheme: Scheme | str = "w4a4",
    kind: str = "random-hadamard",
    seed: int = 0,
    keeps_mean: bool = True,
    online: bool | None = None,
    fit_activations: bool = False,
) -> Recipe:
    """Rotations (S. Ashkboos et al., QuaRot, 2024), then rounding; "quarot+gptq" for GPTQ.

    R1 and R2 are fused. ``online`` transforms, R4 and (for KV bits) R3, serve quantised
    activations; by default they are used exactly there, so that weight-only results load as
    ordinary models. ``fit_activations``: means of inputs go into biases, and every input gets the
    grid, and every MLP R4 or none, with the least output error on calibration; otherwise they are
    the paper's.
    """
    scheme = Scheme.parse(scheme)
    options = {"seed": seed, "keeps_mean": keeps_mean}
    return _rotated("quarot", scheme, online, fit_activations, Rotate, (kind, kind), **options)


def spinquant(
    scheme: Scheme | str = "w4a4",
    steps: int = 20,
    lr: float | None = None,
    range_steps: int = 300,
    weights: bool = False,
    optimizer: str = "cayley-adam",
    loss: str = "kl",
    seed: int = 0,
    keeps_mean: bool = True,
    online: bool | None = None,
    fit_activations: bool = False,
) -> Recipe:
    """Learned rotations (Z. Liu et al., SpinQuant, 2024), then rounding; "spinquant+gptq" for GPTQ.

    ``weights``: learn with rounded weights too, which is what rounding to nearest needs.
    """
    def make(*args, **kwargs) -> SpinQuant:
        return SpinQuant(
            steps=steps, lr=lr, range_steps=range_steps, weights=weights, optimizer=optimizer,
            loss=loss, **kwargs,
        )

    scheme = Scheme.parse(scheme)
    options = {"seed": seed, "keeps_mean": keeps_mean}
    if fit_activations:  # most grids will be asymmetric
        options |= {"activations": QuantizeActivations(symmetric=False), "shift": True}
    return _rotated("spinquant", scheme, online, fit_activations, make, (), **options)


def tune(
    scheme: Scheme | str = "w4a16g128",
    epochs: float = 1.0,
    batch: int = 4,
    codes: float = 3e-2,
    scales: float = 8e-3,
    norms: float = 4e-3,
    holdout: float = 0.0625,
    solved: int = 64,
    seed: int = 0,
) -> Recipe:
    """Learn the quantised model against the float one (tune.py), after any solver: "gptq+tune".

    ``options`` as tune.Tune; alone, it starts from round to nearest.
    """
    options = Tune(epochs, batch, codes, scales, norms, holdout, solved, seed)
    return Recipe("tune", Scheme.parse(scheme), tune=options)


def _rotated(
    name: str, scheme: Scheme, online: bool | None, fit: bool, make: Callable[..., Rotate],
    kinds: tuple, **options,
) -> Recipe:
    quantized = scheme.activation_bits < FLOAT_BITS
    online = quantized if online is None else online
    fit = fit and quantized
    r3 = "hadamard" if scheme.kv_bits < FLOAT_BITS else None
    r4 = ("fit" if fit else "random-hadamard") if online else None
    rotate = make(*kinds, r3=r3, r4=r4, **options)
    shift = (Shift(),) if fit else ()
    last = (QuantizeActivations(fit=fit),) if quantized or r3 else ()
    return Recipe(name, scheme, (rotate, *shift, *last))


METHODS: dict[str, Callable[..., Recipe]] = {
    "rtn": rtn, "awq": awq, "gptq": gptq, "qronos": qronos, "smoothquant": smoothquant,
    "mixed": mixed, "llm-int8": llm_int8, "quarot": quarot, "spinquant": spinquant, "auto": auto,
    "tune": tune,
}


def build(method: str | Recipe, scheme: Scheme | str | None = None, **options) -> Recipe:
    """A recipe by name, with the method's own options; a Recipe is returned as it is. In a stack an
    option goes to the methods that have it.

    Raises UsageError for a name that is not in METHODS, or an option that the method lacks.
    """
    if isinstance(method, Recipe):
        return method
    parts = method.split("+") if isinstance(method, str) else [method]
    for part in parts:
        if part not in METHODS:
            raise UsageError(f"method {part!r} is not known; {', '.join(METHODS)} are")
    if "auto" in parts and set(parts) - {"auto", "tune"}:
        raise UsageError(f"method 'auto' chooses the stack itself, got {method!r}")
    fixed = {} if scheme is None else {"scheme": Scheme.parse(scheme)}
    try:
        shares = _share(parts, options)
        recipes = [
            METHODS[part](**fixed, **share) for part, share in zip(parts, shares, strict=True)
        ]
    except TypeError as error:
        raise UsageError(f"method {method!r}: {error}") from error
    if len(recipes) == 1:
        return recipes[0]
    return Recipe(
        method,
        recipes[-1].scheme,
        tuple(t for r in recipes for t in r.transforms),
        _stacked([r.solver for r in recipes], method),
        all(r.sequential for r in recipes),
        any(r.true_sequential for r in recipes),
        tune=next((r.tune for r in reversed(recipes) if r.tune is not None), None),
    )


def _stacked(solvers: list[Solver], method: str) -> Solver:
    """The one solver of a stack."""
    solvers = [s for s in solvers if type(s) is not RTN]
    if len(solvers) > 1 and any(isinstance(s, LLMInt8) for s in solvers):
        raise UsageError(f"method {method!r}: llm-int8 rounds by itself, with no other solver")
    keep = [s for s in solvers if isinstance(s, Mixed)]
    rest = [s for s in solvers if not isinstance(s, Mixed)]
    last = rest[-1] if rest else RTN()
    return Mixed(keep[-1].fraction, keep[-1].by, keep[-1].seed, last) if keep else last


def _share(parts: list[str], options: dict) -> list[dict]:
    """The options of each method of a stack: by the names in their signatures; ``**options`` takes
    those that no signature names."""
    signatures = [inspect.signature(METHODS[part]).parameters for part in parts]
    named = {name for names in signatures for name in names}
    return [
        {k: v for k, v in options.items() if k in names or ("options" in names and k not in named)}
        if len(parts) > 1 else options
        for names in signatures
    ]
