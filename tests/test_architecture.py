"""The house: imports point only to modules above, samplers never import the trainer, metrics take samples."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import hf_diffusionblocks

ROOT = Path(hf_diffusionblocks.__file__).parent

# Top to bottom; docs/design.md explains the order. A module may import those above it, and its own package.
ORDER = [
    "auto_classes",
    "mixins",
    "suggest",
    "strict_json",
    "base_names",
    "units",
    "adapter_checks",
    "batches",
    "masking",
    "noise",
    "layer_counts",
    "partition",
    "preconditioning",
    "conditioning",
    "losses",
    "augmentation",
    "agreement",
    "config_checks",
    "configuration",
    "retrying",
    "run_names",
    "versions",
    "serialization",
    "weight_headers",
    "loading_checks",
    "repository",
    "streaming",
    "block_files",
    "modeling",
    "adapters",
    "families",
    "objectives",
    "likelihood",
    "sampling",
    "generation",
    "masked_generation",
    "pipelines",
    "hub",
    "merging",
    "training",
    "memory_counting",
    "memory_alternatives",
    "memory_fake_steps",
    "memory",
    "compute",
    "data",
    "metrics",
    "figures",
    "plots",
    "report",
    "demo",
    "recipes",
    "baselines",
    "evaluation",
    "jobs",
    "paper_tables",
    "cli",
]


def modules() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        top = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if top not in ("__init__", "__main__"):
            found.setdefault(top, []).append(path)
    return found


def imported_tops(path: Path) -> set[str]:
    package = ["hf_diffusionblocks", *path.relative_to(ROOT).parts[:-1]]
    tops = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parent, node.module] if node.module else parent)
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "hf_diffusionblocks" else [base]
        tops |= {n.split(".")[1] for n in names if n.startswith("hf_diffusionblocks.") and "." in n}
    return tops & set(ORDER)


def test_every_module_has_its_place():
    assert set(modules()) == set(ORDER)


def test_imports_point_only_to_modules_above():
    wrong = [
        f"{path.relative_to(ROOT)} imports {top}"
        for name, paths in modules().items()
        for path in paths
        for top in imported_tops(path)
        if top != name and ORDER.index(top) > ORDER.index(name)
    ]
    assert wrong == []


def test_the_probe_sees_relative_and_absolute_imports(tmp_path):
    source = ROOT / "jobs" / "images.py"
    assert {"recipes", "data", "pipelines", "training", "baselines", "memory"} <= imported_tops(source)


def test_samplers_and_metrics_do_not_import_the_trainer():
    for name in ("sampling", "pipelines", "metrics"):
        for path in modules()[name]:
            assert "training" not in imported_tops(path)


# What may be larger than the rest, each with its reason in docs/design-decisions.md. Nothing is.
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()


def test_files_are_short():
    long = {str(p.relative_to(ROOT)): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert set(long) <= LONG_FILES, long


def code_lines(function: ast.FunctionDef) -> int:
    first = function.body[0]
    doc = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) is not None else 0
    return function.end_lineno - function.lineno + 1 - doc


def test_functions_fit_a_screen():
    long = {
        f"{path.relative_to(ROOT)}: {node.name}": code_lines(node)
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and code_lines(node) > 60
    }
    assert set(long) <= LONG_FUNCTIONS, long


def design() -> str:
    return (Path(__file__).parents[1] / "docs" / "design.md").read_text(encoding="utf-8")


def test_the_design_is_a_page_and_has_the_order():
    assert len(design().split()) < 1000
    listed = design().split("## The order of modules")[1].split("\n\n")[2]
    assert re.findall(r"`(\w+)`", listed) == ORDER


def walked_names() -> list[str]:
    walks = design().split("## Three walks")[1].split("\n## ")[0]
    return sorted({name for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", walks) if not name.endswith(".py")})


@pytest.mark.parametrize("name", walked_names())
def test_the_walks_name_what_exists(name):
    parts, value = name.split("."), None
    for count in range(len(parts), 0, -1):  # the longest prefix that is a module, then attributes
        if (ROOT / Path(*parts[:count])).is_dir() or (ROOT / Path(*parts[:count])).with_suffix(".py").is_file():
            value = importlib.import_module(".".join(["hf_diffusionblocks", *parts[:count]]))
            break
    assert value is not None, f"docs/design.md names {name}, whose module does not exist"
    for attribute in parts[count:]:
        assert hasattr(value, attribute), f"docs/design.md names {name}, which does not exist"
        value = getattr(value, attribute)


def test_there_are_walks():
    assert len(walked_names()) > 30
