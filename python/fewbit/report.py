"""What a run did: every decision, error and fallback, as data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class LinearRecord:
    """One quantised linear.

    ``relative_error``: ||X (W' - W)^T||^2 / ||X W^T||^2 on the calibration inputs, or the same of
    the weights alone (``measured`` = "weight") when the method needs no calibration.
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


@dataclass
class Report:
    """The result of ``quantize_``: what was done to which linear, and how it went.

    ``certificates``: per transformed part of the float model, how far its output on a probe batch
    moved, and what rounding allows, both relative (certificate.py).
    """

    recipe: dict
    model: str
    calibration: dict = field(default_factory=dict)
    linears: list[LinearRecord] = field(default_factory=list)
    transforms: list[dict] = field(default_factory=list)
    certificates: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    environment: dict = field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        """Bytes of the quantised linears as float."""
        return sum(r.bytes_before for r in self.linears)

    @property
    def bytes_after(self) -> int:
        """Bytes of the same linears packed, scales and zero points included."""
        return sum(r.bytes_after for r in self.linears)

    def to_dict(self) -> dict:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

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
        lines.append(f"  time      {self.seconds:.1f} s")
        return "\n".join(lines)
