"""The model card: README.md of a quantised directory, from what the directory holds."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template

from . import durable
from .conversion import verdicts
from .engines import Verdict
from .recipe_file import RECIPE
from .report import REPORT, Report
from .shards import Shards

MARK = "<!-- written by fewbit -->"  # a card without it is somebody's own and stays
COMMANDS = {  # how each engine is started on a directory
    "vLLM": "vllm serve DIR",
    "TGI": "text-generation-launcher --model-id DIR",
    "LMDeploy TurboMind": "lmdeploy serve api_server DIR",
    "LMDeploy PyTorch": "lmdeploy serve api_server DIR --backend pytorch",
    "transformers": 'AutoModelForCausalLM.from_pretrained("DIR")',
    "llama.cpp": "llama-server -m DIR/model.gguf",
}
LOAD = """\
```python
import fewbit
model = fewbit.load("DIR")
```

"""
CARD = Template("""\
---
${front}library_name: $library
pipeline_tag: text-generation
tags: [fewbit, quantized]
---
$mark
# $title

$facts

## How to load

$load| engine | loads | how |
|---|---|---|
$engines
$details""")


def write(path: str | Path, report: Report | None = None, source: str = "") -> None:
    """Write README.md into a quantised directory, unless somebody's own is there.

    ``source``: name or path of the float model; a name as the hub has them becomes base_model.
    """
    config = Shards(path).config
    stored = config["quantization_config"]["quant_method"]
    _write(path, config.get("model_type", "model"), stored, verdicts(path), report, source)


def write_gguf(
    path: str | Path, kind: str, found: list[Verdict], report: Report | None, source: str
) -> None:
    """The same beside a GGUF file, of a model of this ``kind``."""
    _write(path, kind, "gguf", found, report, source)


def clear(path: str | Path, files: list[str]) -> None:
    """Take away the report and recipe of an earlier model in ``path``, unless among ``files``."""
    for name in {REPORT, str(Path(REPORT).with_suffix(".html")), RECIPE} - set(files):
        (Path(path) / name).unlink(missing_ok=True)


def _write(
    path: str | Path, kind: str, stored: str, found: list[Verdict], report: Report | None,
    source: str,
) -> None:
    target = Path(path) / "README.md"
    if target.exists() and MARK not in target.read_text(encoding="utf-8", errors="replace"):
        return
    source = source or (report.source if report else "")
    method = report.recipe["name"] if report else stored
    hub = source.count("/") == 1 and not Path(source).exists() and not source.startswith((".", "/"))
    front = f"base_model: {source}\nbase_model_relation: quantized\n" if hub else ""
    text = CARD.substitute(
        front=front, mark=MARK, title=f"{Path(source).name or kind}, {method}",
        facts=facts(report, stored), engines="\n".join(map(_engine, found)),
        details=_details(report), load="" if stored == "gguf" else LOAD,
        library="gguf" if stored == "gguf" else "transformers",
    )  # fmt: skip
    durable.write(target, text.encode())


def facts(report: Report | None, stored: str = "") -> str:
    """What was done, and the figures of the report."""
    if report is None:
        return f"Quantised after training with `{stored}`, stored as {stored}."
    head = f"Quantised after training with `{report.recipe['name']}`, stored as {stored}"
    if report.converted:
        head += f", converted from {', '.join(report.converted)}"
    scheme = report.linears[0].scheme if report.linears else ""
    mean = sum(r.relative_error for r in report.linears) / max(len(report.linears), 1)
    rows = [
        ("scheme", f"`{scheme}`, {report.bits_per_weight:.2f} bits a weight"),
        ("linears", f"{len(report.linears)}, {report.bytes_after / 2**20:,.1f} MiB "
                    f"(float: {report.bytes_before / 2**20:,.1f} MiB)"),
        ("mean relative error", f"{mean:.2e} ({len(report.fallbacks)} fallbacks)"),
    ]  # fmt: skip
    if report.calibration:
        rows.append((
            "calibration", f"{report.calibration['tokens']:,} tokens of "
            f"{report.calibration['source']}, SHA-256 `{report.calibration['sha256']}`",
        ))  # fmt: skip
    for entry in report.evaluations:
        of = f", as {entry['format']}" if "format" in entry else ""
        if "perplexity" in entry:
            p = entry["perplexity"]
            rows.append((
                f"perplexity, {entry['text']}{of}", f"{p['value']:.4f} ({p['windows']} windows of "
                f"{p['window']} tokens, stride {p['stride']}, no BOS)",
            ))  # fmt: skip
        if "against" in entry:
            a = entry["against"]
            agreement = f"KL {a['kl']:.2e} nats, top-1 agreement {100 * a['top1']:.2f} %"
            rows.append((f"against the float model, {entry['text']}{of}", agreement))
        for task, values in entry.get("tasks", {}).items():
            shown = ", ".join(f"{key} {value:.4f}" for key, value in values.items())
            rows.append((f"lm-eval {task}{of}", shown))
    table = (f"| {key} | {value} |" for key, value in rows)
    return "\n".join([f"{head}.", "", "| | |", "|---|---|", *table])


def _engine(verdict: Verdict) -> str:
    if not verdict.loads:
        return f"| {verdict.engine} | no | {verdict.reason} |"
    note = f" ({verdict.reason})" if verdict.reason else ""
    return f"| {verdict.engine} | yes | `{COMMANDS[verdict.engine]}`{note} |"


def _details(report: Report | None) -> str:
    if report is None:
        return ""
    blocks = {"recipe": report.recipe, "environment": report.environment}
    return f"\n## Recipe\n\n```json\n{json.dumps(blocks, indent=1)}\n```\n"

