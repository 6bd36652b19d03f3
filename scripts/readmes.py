"""README.md and its translations, and the tables that scripts put between marks in all of them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", *sorted((ROOT / "python/fewbit/docs").glob("README.*.md"))]


def put(text: str, name: str, table: str) -> str:
    """``text`` with ``table`` between its two marks, of which the first may translate whole cells:
    <!-- accuracy table: begin; float=FLOAT -->"""
    mark = re.search(rf"<!-- {name} table: begin(.*?) -->\n", text)
    end = text.index(f"<!-- {name} table: end -->")
    for pair in filter(None, mark[1].split("; ")):
        word, translated = pair.split("=")
        table = table.replace(f"| {word} |", f"| {translated} |")
    return f"{text[: mark.end()]}{table}\n{text[end:]}"


def write(tables: dict[str, str]) -> None:
    """Put every table, by name, into every README."""
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        for name, table in tables.items():
            text = put(text, name, table)
        path.write_text(text, encoding="utf-8")
