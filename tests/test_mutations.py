"""Each bug of `mutations.py` is caught by some test."""

from pathlib import Path

import pytest

from mutations import MUTATIONS, ROOT, caught_by


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what.replace(" ", "-"))
def test_a_bug_is_caught(mutation):
    assert caught_by(mutation) is not None


def test_the_page_lists_them_all_with_tests_that_exist():
    page = Path(ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    for mutation in MUTATIONS:
        row = next(line for line in page.splitlines() if f"| {mutation.what} |" in line)
        file, test = row.split("`")[-2].split("::")
        assert f"def {test.split('[')[0]}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")
