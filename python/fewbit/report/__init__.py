"""What a run did: every decision, error and fallback, as data, as text, as plots, as a page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from .. import durable
from ..errors import DamagedFileError

REPORT = "fewbit_report.json"  # its name in a quantised directory
KINDS = {"str": str, "float": (int, float), "dict": dict}  # of Report's fields; others are lists


@dataclass
class LinearRecord:
    """One quantised linear.

    ``relative_error``: ||X (W' - W)^T||^2 / ||X W^T||^2 on the calibration inputs, or the same of
    the weights alone (``measured`` = "weight") when the method needs no calibration. ``weights``:
    how many; bytes count scales, zero points and bias as well.
    """

    name: str
    scheme: str
    relative_error: float
    measured: str
    tokens: int
    bytes_before: int
    bytes_after: int
    seconds: float
    info: dict = field(default_factory=dict)
    weights: int = 0

    @property
    def rung(self) -> int:
        """0, or which fallback of its solver's ladder the linear needed."""
        return int(self.info.get("rung", 0))


@dataclass
class Report:
    """The result of ``quantize_``: what was done to which linear, and how it went.

    ``certificates``: per transformed part of the float model, how far its output on a probe batch
    moved, and what rounding allows, both relative. ``outliers``: per linear, the channel maxima of
    its probe input before and after the transforms (both certificate.py). ``tune``: what learning
    did after these figures (tune.py). ``source``: name or path of the float model. ``sweep``: the
    curve that an option was chosen from (sweep.py). ``evaluations``: what ``fewbit eval --save``
    has added, with the protocol of each figure, and its format where the weights have been
    converted since. ``converted``: the formats that the weights were in before, oldest first.
    """

    recipe: dict
    model: str
    calibration: dict = field(default_factory=dict)
    linears: list[LinearRecord] = field(default_factory=list)
    transforms: list[dict] = field(default_factory=list)
    certificates: list[dict] = field(default_factory=list)
    sweep: dict = field(default_factory=dict)
    tune: dict = field(default_factory=dict)
    seconds: float = 0.0
    environment: dict = field(default_factory=dict)
    outliers: list[dict] = field(default_factory=list)
    source: str = ""
    evaluations: list[dict] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        """Bytes of the quantised linears as float."""
        return sum(r.bytes_before for r in self.linears)

    @property
    def bytes_after(self) -> int:
        """Bytes of the same linears packed, scales and zero points included."""
        return sum(r.bytes_after for r in self.linears)

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, scales and zero points included."""
        return 8 * self.bytes_after / max(sum(r.weights for r in self.linears), 1)

    @property
    def fallbacks(self) -> list[LinearRecord]:
        """Linears whose solver could not go its first way."""
        return [r for r in self.linears if r.rung > 0]

    def to_dict(self) -> dict:
        return asdict(self)

    def converted_from(self, format: str) -> Report:
        """The report of the same weights after a conversion from ``format``."""
        evaluations = [{"format": format, **entry} for entry in self.evaluations]
        return replace(self, evaluations=evaluations, converted=[*self.converted, format])

    def text(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        durable.write(Path(path), self.text().encode())

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """The report that ``save`` wrote; CheckpointError when the file is not one."""
        try:
            return cls.parse(Path(path).read_bytes(), path)
        except OSError as error:
            raise DamagedFileError(f"{path} cannot be read: {error.strerror}") from error

    @classmethod
    def parse(cls, text: bytes, path: str | Path = REPORT) -> Report:
        """The report in the content of the file ``path``; CheckpointError when it holds none."""
        try:
            data = json.loads(text)
            linears = [LinearRecord(**record) for record in data.pop("linears")]
            report = cls(**data, linears=linears)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedFileError(f"{path} is not a report of fewbit: {error!r}") from error
        for f in fields(cls):
            if not isinstance(getattr(report, f.name), KINDS.get(f.type, list)):
                raise DamagedFileError(f"{path} is not a report of fewbit: {f.name} is no {f.type}")
        return report

    def save_html(self, path: str | Path) -> None:
        """Write the report as one HTML file that needs no network; plots need matplotlib."""
        from .page import page

        durable.write(Path(path), page(self).encode())

    def plot_outliers(self):
        """A matplotlib figure: how far outlier channels stand out, before and after."""
        return self._plot("outliers")

    def plot_channels(self):
        """A matplotlib figure: sorted channel maxima of the worst inputs, before and after."""
        return self._plot("channels")

    def plot_errors(self):
        """A matplotlib figure: relative output error of every linear."""
        return self._plot("errors")

    def plot_search(self):
        """A matplotlib figure: the curves from which scales or alphas were chosen."""
        return self._plot("search")

    def plot_sweep(self):
        """A matplotlib figure: perplexity over the values of the option that was swept."""
        return self._plot("sweep")

    def plot_sizes(self):
        """A matplotlib figure: MiB of the linears before and after, by kind."""
        return self._plot("sizes")

    def _plot(self, name: str):
        from . import plots

        return plots.PLOTS[name].draw(self)

    def __str__(self) -> str:
        errors = [r.relative_error for r in self.linears]
        worst = max(self.linears, key=lambda r: r.relative_error, default=None)
        lines = [f"{self.recipe['name']} on {self.model}: {len(self.linears)} linears"]
        if worst is not None:
            lines += [
                f"  size      {self.bytes_before / 2**20:.2f} -> "
                f"{self.bytes_after / 2**20:.2f} MiB",
                f"  error     mean {sum(errors) / len(errors):.2e}, worst "
                f"{worst.relative_error:.2e} ({worst.name})",
            ]
        if self.fallbacks:
            lines.append(f"  fallbacks {len(self.fallbacks)}, first {self.fallbacks[0].name}")
        if self.sweep:
            least = min(self.sweep["perplexity"])
            lines.append(
                f"  sweep     {self.sweep['option']} {self.sweep['best']} of "
                f"{', '.join(map(str, self.sweep['values']))}: held-out perplexity {least:.4g}, "
                f"float {self.sweep['float']:.4g}"
            )
        if self.converted:
            lines.append(f"  converted from {', '.join(self.converted)}")
        lines.append(f"  time      {self.seconds:.1f} s")
        return "\n".join(lines)


def kind_of(name: str) -> str:
    """The last part of a linear's path: q_proj, fc1, ..."""
    return name.rpartition(".")[2]


def layer_of(name: str) -> int:
    """The number of the decoder layer in a linear's path."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)
