"""Say what a quantised directory holds, and which engines load it."""

from __future__ import annotations

from collections import Counter

from ..errors import NotQuantizedError
from . import Result

USAGE = "DIR"
EXAMPLE = "fewbit inspect OUT"


def arguments(parser) -> None:
    parser.add_argument("model", metavar="DIR", help="quantised model directory")


def run(options) -> Result:
    from .. import formats
    from ..conversion import verdicts
    from ..shards import Shards
    from ..stored import find

    shards = Shards(options.model)
    if "quantization_config" not in shards.config:
        raise NotQuantizedError(f"{options.model} is not quantised")
    plan = formats.parse(shards.config["quantization_config"])
    stored = find(shards, plan)
    weights = sum(s.out_features * s.in_features for s in stored.values())
    names = {full for s in stored.values() for full in s.names.values()}
    packed = sum(shards.entries[n].nbytes for n in names)
    data = {
        "model": shards.config.get("model_type"),
        "format": plan.format.name,
        "schemes": dict(Counter(str(s.scheme) for s in stored.values())),
        "linears": len(stored),
        "weights": weights,
        "bytes_packed": packed,
        "bytes_total": sum(e.nbytes for e in shards.entries.values()),
        "bits_per_weight": 8 * packed / max(weights, 1),
    }
    found = verdicts(options.model)
    shown = {
        "model": data["model"],
        "format": data["format"],
        "schemes": ", ".join(f"{n} x {s}" for s, n in data["schemes"].items()),
        "weights": f"{weights:,} in {len(stored)} linears, {data['bits_per_weight']:.2f} bits each",
        "size": f"{packed / 2**20:,.2f} MiB of {data['bytes_total'] / 2**20:,.2f} MiB",
    }
    lines = [f"{key:<9} {value}" for key, value in shown.items()] + [str(v) for v in found]
    return Result({**data, "engines": engines(found)}, "\n".join(lines))


def engines(found) -> dict:
    """Verdicts by engine, as data."""
    return {v.engine: {"loads": v.loads, "reason": v.reason} for v in found}
