"""Regular expressions out of a config.json, matched in bounded time.

Skip lists and per-module rules hold patterns that a stranger wrote. Python's own matcher
backtracks, so a pattern like ``(a+)+$`` can hang it; this one works out, once per node and start
position, the set of positions where the node can end: cubic in the name's length at worst.
"""

from __future__ import annotations

import re
import warnings

from ..errors import UnsafeFileError

try:
    from re import _constants as sre
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_constants as sre
    import sre_parse as parser

MAX_PATTERN = 1000  # characters
MAX_REPEATS = 16  # repeats in a pattern; together with the next one they bound its cost
MAX_NESTED = 4  # repeats inside one another


class Pattern:
    """A pattern that is matched from the start of a name, like ``re.match``.

    Supports what skip lists use: literals, classes, groups, alternatives, repeats, anchors and
    look-ahead. Raises CheckpointError for anything else (back-references, look-behind), for a
    syntax error, and beyond the limits above.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_PATTERN:
            raise UnsafeFileError(
                f"a pattern of {len(text)} characters is too long; at most {MAX_PATTERN} are read"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._tree = parser.parse(text)
            if _check(self._tree) > MAX_REPEATS:
                raise KeyError(f"more than {MAX_REPEATS} repeats")
        except (re.error, RecursionError, OverflowError, KeyError) as error:
            raise UnsafeFileError(f"pattern {text[:80]!r} cannot be used: {error}") from error

    def match(self, name: str) -> bool:
        """True when some prefix of ``name`` matches."""
        try:
            return bool(_Run(name).sequence(self._tree, 0))
        except RecursionError as error:
            raise UnsafeFileError("a pattern is nested too deeply") from error


class _Run:
    """One match. A set of positions is an int with those bits set.

    ``step`` is remembered per (node, position), so nested repeats cost no more than flat ones.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.memo: dict[tuple[int, int], int] = {}

    def sequence(self, nodes, at: int) -> int:
        """Every position at which ``nodes``, begun at position ``at``, can end."""
        ends = 1 << at
        for node in nodes:
            ends = self._each(ends, lambda p, node=node: self.step(node, p))
            if not ends:
                break
        return ends

    def step(self, node, at: int) -> int:
        key = (id(node), at)
        if key not in self.memo:
            self.memo[key] = self._step(*node, at)
        return self.memo[key]

    def _step(self, op, arg, at: int) -> int:
        if op in CHARACTERS:
            inside = at < len(self.name)
            return 2 << at if inside and _accepts(op, arg, self.name[at]) else 0
        if op is sre.SUBPATTERN:
            return self.sequence(arg[3], at)
        if op is sre.BRANCH:
            ends = 0
            for branch in arg[1]:
                ends |= self.sequence(branch, at)
            return ends
        if op in REPEATS:
            return self._repeat(*arg, at)
        if op is sre.AT:
            return 1 << at if _anchored(arg, self.name, at) else 0
        return 1 << at if bool(self.sequence(arg[1], at)) is (op is sre.ASSERT) else 0

    def _repeat(self, low: int, high: int, nodes, at: int) -> int:
        if len(nodes) == 1 and nodes[0][0] in CHARACTERS:  # x*: ends are a run of bits
            stop = ~(self._accepted(nodes[0]) >> at)
            run = min((stop & -stop).bit_length() - 1, high)
            return ((1 << (run - low + 1)) - 1) << (at + low) if run >= low else 0
        memo: dict[int, int] = {}

        def once(p: int) -> int:
            if p not in memo:
                memo[p] = self.sequence(nodes, p)
            return memo[p]

        now = 1 << at
        for _ in range(low):
            after = self._each(now, once)
            if after == now:  # a fixed point: further rounds change nothing
                break
            now = after
        seen, rounds = now, low
        while now and rounds < high:
            now = self._each(now, once) & ~seen
            seen |= now
            rounds += 1
        return seen

    def _accepted(self, node) -> int:
        """The positions of the characters that a single-character node accepts."""
        key = (id(node), -1)
        if key not in self.memo:
            flags = (_accepts(*node, char) << p for p, char in enumerate(self.name))
            self.memo[key] = sum(flags)
        return self.memo[key]

    def _each(self, positions: int, ends_of) -> int:
        ends = 0
        while positions:
            low = positions & -positions
            ends |= ends_of(low.bit_length() - 1)
            positions ^= low
        return ends


CHARACTERS = (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN)
REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT)


def _check(nodes, nested: int = 0) -> int:
    """How many repeats there are; KeyError for anything the matcher above does not know."""
    if nested > MAX_NESTED:
        raise KeyError(f"repeats are nested more than {MAX_NESTED} deep")
    repeats = 0
    for op, arg in nodes:
        if op in CHARACTERS:
            _accepts(op, arg, "a")
        elif op is sre.SUBPATTERN:
            repeats += _check(arg[3], nested)
        elif op is sre.BRANCH:
            repeats += sum(_check(branch, nested) for branch in arg[1])
        elif op in REPEATS:
            repeats += 1 + _check(arg[2], nested + 1)
        elif op is sre.AT:
            _anchored(arg, "", 0)
        elif op in (sre.ASSERT, sre.ASSERT_NOT) and arg[0] == 1:
            repeats += _check(arg[1], nested)
        else:
            raise KeyError(f"{str(op).lower()} is not supported")
    return repeats


def _accepts(op, arg, char: str) -> bool:
    if op is sre.ANY:
        return char != "\n"
    if op is sre.LITERAL:
        return ord(char) == arg
    if op is sre.NOT_LITERAL:
        return ord(char) != arg
    found = False
    for kind, value in arg:
        if kind is sre.LITERAL:
            found |= ord(char) == value
        elif kind is sre.RANGE:
            found |= value[0] <= ord(char) <= value[1]
        elif kind is not sre.NEGATE:
            found |= _category(value, char)
    return found is not (arg[0][0] is sre.NEGATE)


def _category(value, char: str) -> bool:
    digit, word, space = char.isdecimal(), char.isalnum() or char == "_", char.isspace()
    table = {
        sre.CATEGORY_DIGIT: digit,
        sre.CATEGORY_NOT_DIGIT: not digit,
        sre.CATEGORY_WORD: word,
        sre.CATEGORY_NOT_WORD: not word,
        sre.CATEGORY_SPACE: space,
        sre.CATEGORY_NOT_SPACE: not space,
    }
    return table[value]


def _anchored(kind, name: str, p: int) -> bool:
    if kind in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
        return p == 0
    if kind in (sre.AT_END, sre.AT_END_STRING):
        return p == len(name)
    if kind in (sre.AT_BOUNDARY, sre.AT_NON_BOUNDARY):
        before = p > 0 and _category(sre.CATEGORY_WORD, name[p - 1])
        after = p < len(name) and _category(sre.CATEGORY_WORD, name[p])
        return (before is not after) is (kind is sre.AT_BOUNDARY)
    raise KeyError(f"{str(kind).lower()} is not supported")
