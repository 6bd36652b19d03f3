"""The READMEs' reliability table is that of the tests, and no row of it is empty."""

import reliability_table
from readmes import READMES


def test_every_fault_has_a_named_test_and_the_readme_says_so():
    table = reliability_table.table()
    assert "untested" not in table and set(reliability_table.tests()) == set(range(1, 27))
    assert len(READMES) == 3
    for readme in READMES:
        assert table in readme.read_text(encoding="utf-8"), readme
