"""Say what an error's id means and how to mend it."""

from __future__ import annotations

from . import Result

USAGE = "[ID] [options]"
EXAMPLE = "fewbit explain FB103"


def arguments(parser) -> None:
    parser.add_argument("id", nargs="?", metavar="ID", help="such as FB103; all without it")


def run(options) -> Result:
    from ..errors import catalogue, explain

    if options.id is not None:
        return Result({options.id: explain(options.id)}, explain(options.id))
    found = {id: explain(id) for id in catalogue()}
    return Result(found, "\n".join(f"{id}  {text.splitlines()[1]}" for id, text in found.items()))
