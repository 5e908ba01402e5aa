"""Every Python line of the README runs, every command in it parses, every recipe and file it names exists."""

import re
import shlex
from pathlib import Path

import pytest

from hf_diffusionblocks.cli import build_parser
from hf_diffusionblocks.recipes import load_recipe, recipe_names

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    inline = [re.sub(r"\s+", " ", c) for c in re.findall(r"`(diffusionblocks [^`]+)`", TEXT)]
    return [c for c in [*lines, *inline] if c.startswith("diffusionblocks ")]


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in blocks("python"):
        exec(block, namespace)
    assert len(namespace["images"]) == 4
    assert namespace["block"].resident_blocks == (1,)


def test_there_are_commands():
    assert len(commands()) >= 5


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    words = shlex.split(command)[1:]
    if len(words) == 1:  # a command named in passing
        assert words[0] in build_parser().format_help()
        return
    args = build_parser().parse_args(words)
    if getattr(args, "recipe", None):
        assert args.recipe in recipe_names()
        load_recipe(args.recipe, args.overrides)


def test_make_targets_and_files_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make ([a-z-]+)", "".join(blocks("bash")), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for name in re.findall(r"\]\((docs/[^)]+)\)", TEXT) + re.findall(r"`(notebooks/[^`]+)`", TEXT):
        assert (ROOT / name).is_file(), name
    for script in re.findall(r"python (benchmarks/\w+\.py)", TEXT):
        assert (ROOT / script).is_file(), script
