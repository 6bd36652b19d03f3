"""README.ko.md and README.zh.md say what README.md says, section by section.

They lie in the package (python/fewbit/docs), so that an installed fewbit has them as well. When a
test fails here, a translated section of README.md has changed: translate the change, then put the
hash that the message gives into TRANSLATED.
"""

import hashlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "python" / "fewbit" / "docs"
LANGUAGES = ["ko", "zh"]
TRANSLATED = {
    "": "1e34844191e739cb",
    "Two commands": "d0d71c6bc1f9a5c0",
    "Ten lines": "998bb77358af64f7",
    "Methods": "29faf840e332b0e7",
    "Results": "47fd90f3b02e37d9",
    "Models bigger than memory, and runs that stop": "ed20d408e00e464f",
    "How it is made": "015c3c7f14529e77",
    "Limits, said plainly": "164599f288335d3b",
}


def sections(text):
    """By heading: what follows it, without the line of links between languages."""
    parts = re.split(r"^## (.+)$", text, flags=re.M)
    parts[0] = re.sub(r"^\[.*README.*\n", "", parts[0], flags=re.M)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


def code(text):
    return re.findall(r"```.*?```", text, re.S)


def rows(text):
    """What the rows of a table have that no language changes: code, links and figures."""
    lines = (line for line in text.splitlines() if line.startswith("|"))
    return [re.findall(r"`[^`]+`|\]\([^)]+\)|\d[\d.]*", line) for line in lines]


@pytest.mark.parametrize("heading", TRANSLATED)
def test_no_translated_section_has_changed(heading):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    made = r"<!-- (\w+) table: begin -->.*?<!-- \1 table: end -->"  # by a script, in all languages
    found = sections(re.sub(made, "", text, flags=re.S))
    digest = hashlib.sha256(found[heading].strip().encode()).hexdigest()[:16]
    name = heading or "the introduction"
    assert digest == TRANSLATED[heading], f"translate {name!r} again; its hash is now {digest}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_code_links_and_tables_are_the_same(language):
    english = sections((ROOT / "README.md").read_text(encoding="utf-8"))
    other = sections((DOCS / f"README.{language}.md").read_text(encoding="utf-8"))
    assert list(english) == list(TRANSLATED), "a section has no translation"
    assert len(other) == len(TRANSLATED)
    for heading, text in zip(TRANSLATED, other.values(), strict=True):
        assert code(text) == code(english[heading]), heading
        assert rows(text) == rows(english[heading]), heading


@pytest.mark.parametrize("language", LANGUAGES)
def test_links_between_the_documents_lead_somewhere(language):
    path = DOCS / f"README.{language}.md"
    for target in re.findall(r"\]\(([^)#:]+\.md)", path.read_text(encoding="utf-8")):
        assert (DOCS / target).resolve().is_file(), target
    assert f"python/fewbit/docs/README.{language}.md" in (ROOT / "README.md").read_text("utf-8")
