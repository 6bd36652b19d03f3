"""The text form of a scheme, and what it refuses."""

import pytest

from fewbit.errors import UsageError
from fewbit.scheme import Scheme


@pytest.mark.parametrize(
    "text, fields",
    [
        ("w4a16g128", (4, 128, False, 16, 16)),
        ("w3", (3, 128, False, 16, 16)),
        ("w2g64sym", (2, 64, True, 16, 16)),
        ("w4g-1", (4, -1, False, 16, 16)),
        ("w8a8", (8, -1, True, 8, 16)),
        ("w4a4kv4", (4, -1, True, 4, 4)),
        ("w4a8g128asym", (4, 128, False, 8, 16)),
    ],
)
def test_parses(text, fields):
    s = Scheme.parse(text)
    assert (s.bits, s.group_size, s.symmetric, s.activation_bits, s.kv_bits) == fields
    assert Scheme.parse(str(s)) == s


def test_overrides_and_groups():
    s = Scheme.parse("w4a16g128", bits=3, group_size=64)
    assert (s.bits, s.group_size) == (3, 64)
    assert s.groups(130) == 3 and Scheme.parse("w4g-1").groups(130) == 1 and s.groups(0) == 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Scheme.parse("4bit"), "scheme '4bit' is not of the form"),
        (lambda: Scheme.parse(4), "scheme 4 is not of the form"),
        (lambda: Scheme.parse("w9"), "bits must be in 2..8, got 9"),
        (lambda: Scheme(bits=True), "bits must be in 2..8, got True"),
        (lambda: Scheme(group_size=0), "group_size must be -1 .* got 0"),
        (lambda: Scheme(group_size=-7), "group_size must be -1 .* got -7"),
        (lambda: Scheme(group_size=2**70), "group_size must be .*, above 2147483647"),
        (lambda: Scheme(scale_dtype="int8"), "scale_dtype must be one of"),
        (lambda: Scheme(activations="row"), "activations must be one of"),
    ],
)
def test_says_what_is_wrong(make, message):
    with pytest.raises(UsageError, match=message):
        make()
