"""The README's reliability table, from the names of the tests: python scripts/reliability_table.py

A test that is named test_fNN_what_it_shows belongs to row FNN. Without arguments the table is
printed; ``--write`` puts it into README.md and its translations, between its two marks.
"""

from __future__ import annotations

import re
import sys

from readmes import ROOT, write

FAULTS = (
    "Hessian not positive definite",
    "NaN, infinity, zero groups, dead channels",
    "overflow of half precision inside a product",
    "odd and empty shapes",
    "unwritten memory",
    "more than 2^31 elements",
    "a wrong argument ends the process",
    "memory errors",
    "CUDA errors blamed on the wrong line",
    "threads",
    "fork after threads",
    "Ctrl-C",
    "kill -9, out of memory",
    "disk full, failing, read-only, over quota",
    "saving over the source",
    "model bigger than memory",
    "calibration silently wrong",
    "not reproducible",
    "quantised twice",
    "wrong silent fold",
    "hostile names in an index",
    "pickle and remote code",
    "hostile configuration",
    "offline",
    "another torch than at build time",
    "notebook kernel dies",
)


def tests() -> dict[int, dict[str, None]]:
    """The names of the tests of each row, as words, in the order of the files."""
    rows: dict[int, dict[str, None]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for number, words in re.findall(r"^def test_f(\d\d)_(\w+)\(", path.read_text(), re.M):
            rows.setdefault(int(number), {})[words.replace("_", " ")] = None
    return rows


def table() -> str:
    rows = tests()
    lines = ["| | fault | what is tested |", "|---|---|---|"]
    for number, fault in enumerate(FAULTS, 1):
        named = "; ".join(rows.get(number, {})) or "untested"
        lines.append(f"| F{number} | {fault} | {named} |")
    return "\n".join(lines)


def main() -> None:
    if "--write" in sys.argv[1:]:
        write({"reliability": table()})
    else:
        print(table())


if __name__ == "__main__":
    main()
