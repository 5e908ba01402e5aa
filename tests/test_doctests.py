"""Every example in a docstring of the package is run.

The docstrings are read from the source files: doctest's own search skips functions that the type checks of the tests
have wrapped.
"""

import ast
import doctest
import importlib
from pathlib import Path

import pytest
import torch

import hf_diffusionblocks

PACKAGE = Path(hf_diffusionblocks.__file__).parent


def documented() -> list[tuple[str, str, str, int]]:
    """(module, object, docstring, line) of every docstring with an example."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        module = ".".join([PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")

        def visit(node: ast.AST, name: str, source: str = source, module: str = module) -> None:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    visit(child, f"{name}.{child.name}" if name else child.name)
            text = ast.get_docstring(node, clean=False)
            if text and doctest.DocTestParser().get_examples(text):
                found.append((module, name, text, node.body[0].lineno - 1))

        visit(ast.parse(source), "")
    return found


EXAMPLES = documented()


@pytest.mark.parametrize(("module", "name", "text", "line"), EXAMPLES, ids=[f"{m}:{n}" for m, n, *_ in EXAMPLES])
def test_docstring(module, name, text, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    imported = importlib.import_module(module)
    test = doctest.DocTestParser().get_doctest(text, dict(vars(imported)), f"{module}.{name}", imported.__file__, line)
    failures: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=failures.append)
    assert not failures, "".join(failures)


def test_examples_are_found():
    found = {name for _, name, *_ in EXAMPLES}
    assert {"LogNormalNoise", "BlockPartition.equal_probability", "unknown_name", "BlockedDiTModel"} <= found
