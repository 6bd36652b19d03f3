"""Check this installation, with one line of fix for each problem."""

from __future__ import annotations

from . import Result

USAGE = "[options]"
EXAMPLE = "fewbit doctor"


def arguments(parser) -> None:
    pass


def run(options) -> Result:
    from ..doctor import examine

    findings = examine()
    data = {f.what: {"state": f.state, "fix": f.fix} for f in findings}
    return Result(data, "\n".join(map(str, findings)))
