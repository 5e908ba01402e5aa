"""The page of families is what the battery runs and what the package holds."""

import battery_table
from battery import FAMILIES


def test_the_page_is_that_of_the_battery_and_the_package():
    assert battery_table.PAGE.read_text(encoding="utf-8") == battery_table.page(), (
        "run: python tests/battery_table.py write"
    )


def test_every_reason_names_a_check_of_the_battery():
    known = {name for _, name in battery_table.checks()}
    assert len(known) >= 34
    for name, family in FAMILIES.items():
        assert family.not_applicable.keys() <= known, name


def test_lines_of_code_leave_out_what_is_not_code():
    text = '"""Doc."""\n\nimport os  # why\n\n\ndef f():\n    """Doc\n\n    more."""\n    # a comment\n'
    text += '    return """a\nb"""\n'
    assert battery_table.code_lines(text) == 4
