"""Recipe files: TOML with the words of ``fewbit quantize``, written beside every output.

    model = "MODEL_DIR"
    method = "awq"
    scheme = "w4a16g128"          # or a table [scheme] with the fields of Scheme
    calibration = "text.txt"
    window = 512
    samples = 32
    format = "compressed-tensors"
    dtype = "source"

    [options]                     # of the method
    points = 20

Everything is optional; a flag of the command line overrides the file.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import __version__, recipes
from .errors import MissingExtraError, UsageError
from .recipes import Recipe
from .scheme import Scheme

RECIPE = "fewbit_recipe.toml"  # its name in a quantised directory
DEFAULTS: dict[str, Any] = {
    "model": None,
    "method": "awq",
    "scheme": "w4a16g128",
    "calibration": None,
    "window": 512,
    "samples": 32,
    "format": "compressed-tensors",
    "dtype": "source",
    "options": {},
}
KINDS = {"window": int, "samples": int, "options": dict, "scheme": (str, dict)}  # others: str
GRID = ("bits", "group_size", "symmetric")  # flags that change a field of the scheme


def read(path: str | Path) -> dict:
    """The settings of a recipe file; UsageError names a key or value that is not allowed."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib
        except ImportError:
            raise MissingExtraError(
                "recipe files need Python 3.11, or on 3.10 the package tomli: pip install tomli"
            ) from None
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the recipe {str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of TOML or of UTF-8
        raise UsageError(f"the recipe {str(path)!r} is not TOML: {error}") from error
    for key, value in found.items():
        if key not in DEFAULTS:
            raise UsageError(f"the recipe has {key!r}; allowed are {', '.join(DEFAULTS)}")
        kinds = KINDS.get(key, str)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UsageError(f"the recipe's {key} must not be {value!r:.60}")
    return found


def merge(flags: Mapping[str, Any]) -> dict:
    """Defaults, then the file that ``flags["recipe"]`` names, then the flags."""
    file = read(flags["recipe"]) if "recipe" in flags else {}
    named = {key: flags[key] for key in DEFAULTS if key in flags}
    given = {**DEFAULTS, **file, **named}
    given["options"] = {**given["options"], **_options(flags.get("set", ()))}
    grid = {key: flags[key] for key in GRID if key in flags}
    scheme = given["scheme"]
    if isinstance(scheme, dict):
        unknown = scheme.keys() - Scheme.__dataclass_fields__.keys()
        if unknown:
            raise UsageError(f"the recipe's scheme has no field {min(unknown)!r}")
        scheme = Scheme(**scheme)
    given["scheme"] = Scheme.parse(scheme, **grid)
    return given


def build(given: Mapping[str, Any]) -> Recipe:
    """The Recipe that merged settings describe."""
    return recipes.build(given["method"], given["scheme"], **given["options"])


def text(path: str | Path, given: Mapping[str, Any], scheme: Scheme) -> str:
    """Merged settings as the file ``path``, which ``read`` gives back: the run can be repeated."""
    flat = {k: v for k, v in given.items() if v is not None and k not in ("scheme", "options")}
    command = f"fewbit quantize --recipe {shlex.quote(str(path))} -o OUT"
    lines = [f"# fewbit {__version__}; to repeat: {command}", *_lines(flat)]
    lines += ["", "[scheme]", *_lines(scheme.to_dict())]
    if given["options"]:
        lines += ["", "[options]", *_lines(given["options"])]
    return "\n".join(lines) + "\n"


def _options(pairs) -> dict:
    """NAME=VALUE, with a JSON value or else a text."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name.isidentifier() or not equals:
            raise UsageError(f"--set needs NAME=VALUE, got {pair!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _lines(table: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in table.items() if value is not None]


def _toml(value: Any) -> str:
    # JSON's strings, numbers, booleans and lists of them are TOML's too, but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
