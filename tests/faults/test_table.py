"""The READMEs' reliability table is that of the tests, and no row of it is empty."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_fault_has_a_named_test_and_the_readme_says_so():
    path = ROOT / "scripts" / "reliability_table.py"
    spec = importlib.util.spec_from_file_location("reliability_table", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    table = script.table()
    assert "untested" not in table and set(script.tests()) == set(range(1, 27))
    assert len(script.READMES) == 3
    for readme in script.READMES:
        assert table in readme.read_text(encoding="utf-8"), readme
