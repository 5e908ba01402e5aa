"""The documentation's site builds without a warning; its Python runs and its commands parse."""

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_diffusionblocks.cli import parse
from hf_diffusionblocks.recipes import load_recipe, recipe_names
from needed import needed

ROOT = Path(__file__).parents[1]
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))
WRITTEN = [p for p in PAGES if p.startswith(("docs/how-to", "docs/index", "docs/concepts"))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: str) -> list[str]:
    joined = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in joined.splitlines()]
    return [line for line in lines if line.startswith("diffusionblocks ")]


def test_the_site_builds_without_a_warning_and_asks_nobody_else(tmp_path):
    needed("zensical")
    for name in ("docs", "src"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--clean", "--strict"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES:
        name = page.removeprefix("docs/").removesuffix(".md")
        file = tmp_path / "site" / ("index.html" if name == "index" else f"{name}/index.html")
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=.?https?://", text), page
    reference = (tmp_path / "site" / "reference" / "partition" / "index.html").read_text(encoding="utf-8")
    assert "equal_probability" in reference and ":meth:" not in reference


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_lines_of_prose_fit_a_screen(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert [line for line in text.splitlines() if len(line) > 135 and not line.startswith(("|", "!["))] == []


def test_a_broken_link_would_be_found(tmp_path):
    needed("zensical")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A page\n\n[nowhere](nowhere.md)\n")
    (tmp_path / "zensical.toml").write_text('[project]\nsite_name = "x"\n')
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    assert subprocess.run(build, cwd=tmp_path, capture_output=True).returncode != 0


def test_every_page_is_in_the_navigation():
    named = re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text())
    assert sorted(f"docs/{name}" for name in named) == PAGES


IN_ORDER = ("docs/how-to/images.md", "docs/how-to/text.md")  # whose blocks build on each other: test_readme runs them


@pytest.mark.parametrize("page", [p for p in WRITTEN if blocks(p, "python") and p not in IN_ORDER])
def test_python_runs(page, tmp_path):
    for block in blocks(page, "python"):
        if '"user/' in block:  # needs the Hub
            compile(block, page, "exec")
            continue
        with contextlib.chdir(tmp_path):
            exec(block, {})


@pytest.mark.parametrize("command", sorted({c for p in WRITTEN for c in commands(p)}))
def test_commands_parse(command):
    args = parse(shlex.split(command)[1:])
    if getattr(args, "recipe", None):
        assert args.recipe in recipe_names()
        if not args.imports:  # a family of the reader's own is known where its module is
            load_recipe(args.recipe, args.overrides)


def test_runs_of_the_pages_do_not_collide():
    """Two commands that train differently in one directory would end with "belongs to another run"."""
    pages = [p for p in WRITTEN if p.startswith("docs/how-to")]
    found: dict[str, set[tuple]] = {}
    for command in (c for p in ["README.md", *pages] for c in commands(p) if c.startswith("diffusionblocks train ")):
        args = parse(shlex.split(command)[1:])
        if args.dry_run:
            continue
        named = args.recipe or Path(args.data).stem
        target = args.output_dir or f"runs/{named}-{args.method}-{args.match}".removesuffix("-None-None")
        about = {s for s in args.overrides if not s.startswith("license=")}
        found.setdefault(target, set()).add(
            (args.recipe, args.data, args.method, tuple(args.block or ()), *sorted(about))
        )
    assert {target: runs for target, runs in found.items() if len(runs) > 1} == {} and len(found) > 15
