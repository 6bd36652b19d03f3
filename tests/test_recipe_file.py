"""Recipe files: what is written is read back, flags come first, mistakes are named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit import recipe_file
from fewbit.errors import UsageError
from fewbit.recipe_file import DEFAULTS, build, merge, read
from fewbit.scheme import Scheme

pytest.importorskip("tomllib", reason="Python 3.11")
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)


@given(TEXT, st.integers(2, 8), st.dictionaries(st.just("points"), st.integers(1, 40)), TEXT)
def test_written_is_read_back(tmp_path_factory, model, bits, options, text):
    path = tmp_path_factory.mktemp("r") / "r.toml"
    settings = {**DEFAULTS, "model": model, "calibration": text, "options": options}
    path.write_text(recipe_file.text(path, settings, Scheme(bits, 64)), encoding="utf-8")
    again = merge({"recipe": path})
    assert again == settings | {"scheme": Scheme(bits, 64)}


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('method = "gptq"\nscheme = "w3a16g64"\nwindow = 128\n[options]\ndamp = 0.1\n')
    found = merge({"recipe": path, "window": 256, "bits": 4, "set": ["damp=0.05", "order=none"]})
    assert found["window"] == 256 and found["method"] == "gptq" and found["samples"] == 32
    assert found["scheme"] == Scheme(4, 64)
    assert found["options"] == {"damp": 0.05, "order": "none"}
    assert build(merge({"recipe": path})).solver.damp == 0.1


@pytest.mark.parametrize(
    "text, message",
    [
        ("bits = 4", "the recipe has 'bits'; allowed are model, method"),
        ('window = "many"', "the recipe's window must not be 'many'"),
        ("window = true", "must not be True"),
        ("method = [", "is not TOML"),
        ("[scheme]\nbit = 4", "no field 'bit'"),
        ("[scheme]\nbits = 9", "bits must be in 2..8, got 9"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        merge({"recipe": tmp_path / "r.toml"})


def test_other_mistakes():
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read("missing.toml")
    with pytest.raises(UsageError, match="--set needs NAME=VALUE, got 'alpha'"):
        merge({"set": ["alpha"]})
    assert recipe_file.__doc__
