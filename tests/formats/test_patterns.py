import re
import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit.errors import CheckpointError
from fewbit.formats.patterns import Pattern

NAMES = [
    "",
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "visual.blocks.3.attn.qkv",
]
PATTERNS = [
    "lm_head",
    ".*lm_head",
    r".*\.(q|k|v)_proj$",
    r"model\.layers\.(?!0\.).*mlp",
    r"^model.*\.1\d\.",
    r"(?=visual).*qkv\b",
    r"[^v]\w+",
    r"(?:model|visual)\.\S{3,7}\.",
    r"(a|b|ab)*c?",
    r"\d{2,}",
    r"model\.layers\.[0-9]{1}\..+?_proj",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_re_match(pattern, name):
    assert Pattern(pattern).match(name) == bool(re.match(pattern, name))


@given(st.text("ab.*+?()|[]^$\\d{}0123,", max_size=12), st.text("ab0.", max_size=8))
def test_agrees_with_re_on_any_pattern(text, name):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = bool(re.match(text, name))
    except (re.error, OverflowError):
        with pytest.raises(CheckpointError):
            Pattern(text)
        return
    try:
        pattern = Pattern(text)
    except CheckpointError:
        return  # a construct that is refused by name
    assert pattern.match(name) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|aa)*b",
        "(((a*)*)*)*b",
        ".*" * 16 + "x",
        "(a{1,65535}){65535}b",
    ],
)
def test_hostile_patterns_end_soon(pattern):
    begin = time.perf_counter()
    assert not Pattern(pattern).match("a" * 200 + "!")
    assert time.perf_counter() - begin < 5  # Python's own matcher needs ages


@pytest.mark.parametrize(
    "pattern, why",
    [("(", "cannot be used"), (r"(a)\1", "not supported"), ("a" * 1001, "too long")]
    + [("a*" * 17, "more than 16"), ("(" * 9 + "a" + ")*" * 9, "nested more than 4")],
)
def test_refusals_say_why(pattern, why):
    with pytest.raises(CheckpointError, match=why):
        Pattern(pattern)
