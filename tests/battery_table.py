"""What each family passes, and how much code it is, as the page docs/families.md.

    python tests/battery_table.py write    # after a new family, a new check, or when families/ has grown or shrunk

Every check of the page is a test of test_modeling.py or test_battery.py that runs for each family each time the tests
run; one that cannot apply is skipped there with the reason that the page gives. test_families_page.py holds the page.
"""

import ast
import inspect
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "families.md"
PACKAGE = ROOT / "src" / "hf_diffusionblocks"

# A family's own files: of the package's families/ and objectives/. The others of families/ serve several families.
OWN = {
    "dit": ["families/dit*.py", "objectives/score_matching.py"],
    "pixart, sd3, flux": ["families/transformer_classes.py", "families/routed_transformer.py"],
    "image_classification": ["families/image_classification*.py", "objectives/label_prediction.py"],
    "causal_lm": ["families/causal_lm*.py", "families/two_stream.py", "families/stop_strings.py"]
    + ["objectives/next_token.py"],
    "masked_lm": ["families/masked_lm*.py", "objectives/masked.py"],
    "recurrent": ["families/recurrent*.py", "objectives/recurrent.py"],
}
_HEAD = """\
# Families, and what each passes

Written by `python tests/battery_table.py write`; the tests hold it.

Every family goes through the same battery: a family is one entry of `FAMILIES` in `tests/battery.py`, and what a check
expects (levels of noise, blocks, files) follows from the entry and its model. The checks run for each family each time
the tests run (`tests/test_modeling.py`, `tests/test_battery.py`). "+": passes; a letter: cannot apply, for the reason
below the table. Those with an asterisk run with the slow tests; every family has faster ones of the kind of its own.

A family of your own is one module: a config, a model, and a call of `register_family` at its end.
`tests/test_own_family.py` is one, an MLP-Mixer in about a hundred lines, and passes all of this from outside of the
package, with the commands. The families below are several files each because none of them may have more than 400 lines,
and because each has readouts, conversions and checks that a network written by hand has no need of.
"""


def checks() -> list[tuple[str, str]]:
    """Module and name of each check: a test that takes a family, or a fixture that is made of one."""
    import test_battery
    import test_modeling

    found = []
    for module in (test_modeling, test_battery):
        for name, function in vars(module).items():
            if name.startswith("test_") and {"family", "model", "saved"} & {*inspect.signature(function).parameters}:
                found.append((module.__name__, name))
    return found


def is_slow(module: str, name: str) -> bool:
    """Whether a check runs with the slow tests only."""
    marks = getattr(vars(sys.modules[module])[name], "pytestmark", [])
    return any(mark.name == "slow" for mark in marks)


def check_table() -> list[str]:
    """A row per check, a column per family; then the reasons."""
    from battery import FAMILIES

    reasons: dict[str, str] = {}
    lines = [f"| check | {' | '.join(FAMILIES)} |", "|---|" + ":-:|" * len(FAMILIES)]
    for module, name in checks():
        cells = []
        for family in FAMILIES.values():
            reason = family.not_applicable.get(name)
            cells.append(reasons.setdefault(reason, "abcdefghijkl"[len(reasons)]) if reason else "+")
        said = name.removeprefix("test_").replace("_", " ") + (" *" if is_slow(module, name) else "")
        lines.append(f"| {said} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        *(f"- {letter}: {reason}." for reason, letter in reasons.items()),
        "- \\*: with `make test-slow`.",
    ]


def code_lines(text: str) -> int:
    """Lines with code: no blank lines, comments or docstrings.

    Example:
        >>> code_lines('\"\"\"What it is.\"\"\"\\n\\n# why\\nx = (1,\\n     2)\\n')
        2
    """
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstrings |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            found |= {*range(token.start[0], token.end[0] + 1)}
    return len(found - docstrings)


def _files() -> Iterator[tuple[str, list[Path]]]:
    owned: set[Path] = set()
    for family, patterns in OWN.items():
        files = [path for pattern in patterns for path in sorted(PACKAGE.glob(pattern))]
        owned |= {*files}
        yield family, files
    yield "several families", sorted({*PACKAGE.glob("families/*.py")} - owned)


def code_table() -> list[str]:
    """A row per family: its own files, and their lines rounded to tens."""
    lines = ["| family | own files | lines | of code |", "|---|---|---|---|"]
    for family, files in _files():
        texts = [path.read_text(encoding="utf-8") for path in files]
        counts = (sum(len(text.splitlines()) for text in texts), sum(map(code_lines, texts)))
        names = ", ".join(f"`{path.relative_to(PACKAGE).as_posix()}`" for path in files)
        lines.append(f"| {family} | {names} | {' | '.join(str(round(count, -1)) for count in counts)} |")
    return lines


def page() -> str:
    """The whole page."""
    code = [
        "",
        "## Lines per family",
        "",
        "Of code: without blank lines, comments and docstrings. Rounded to tens.",
        "",
    ]
    return "\n".join([_HEAD, *check_table(), *code, *code_table()]) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["write"]:
        sys.exit(__doc__)
    sys.path.insert(0, str(Path(__file__).parent))
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
