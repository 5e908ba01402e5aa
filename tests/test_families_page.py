"""The page of families is what the battery runs and what the package holds."""

import re

import pytest

import battery_table
from battery import FAMILIES

AGAIN = "run: python tests/battery_table.py write"


def parts(page: str) -> tuple[str, list[int]]:
    """The page without the numbers of lines, and these numbers."""
    before, after = page.split("## Lines per family")
    return before + re.sub(r"\| \d+ ", "| n ", after), [int(n) for n in re.findall(r"\| (\d+) ", after)]


def test_the_page_is_that_of_the_battery_and_the_package():
    (kept, lines), (text, counted) = parts(battery_table.PAGE.read_text(encoding="utf-8")), parts(battery_table.page())
    assert kept == text, AGAIN
    assert len(lines) == 2 * (len(battery_table.OWN) + 1)
    assert lines == pytest.approx(counted, rel=0.1), AGAIN  # not a failure for every line that is written


def test_every_reason_names_a_check_of_the_battery():
    known = {name for _, name in battery_table.checks()}
    assert len(known) >= 34
    for name, family in FAMILIES.items():
        assert family.not_applicable.keys() <= known, name


def test_lines_of_code_leave_out_what_is_not_code():
    text = '"""Doc."""\n\nimport os  # why\n\n\ndef f():\n    """Doc\n\n    more."""\n    # a comment\n'
    text += '    return """a\nb"""\n'
    assert battery_table.code_lines(text) == 4
