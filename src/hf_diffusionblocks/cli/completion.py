"""Completion for shells: what each argument of the parser completes to, beside options and commands.

A shell may run ``completion`` whenever it starts, so nothing heavy is imported: names of recipes are those of files.
"""

import argparse
from pathlib import Path
from typing import Any

import shtab

from ..paper_tables import tables

_RECIPES = Path(__file__).parents[1] / "recipes"
_FILES = ("data", "imports", "output")
_DIRECTORIES = ("base", "directories", "lower", "model", "output_dir", "run", "space")
# Words of options whose values the library checks itself; tests/test_completion.py holds them to the lists there.
WORDS = {
    "grid": ("karras", "equal_probability"),
    "solver": ("euler", "heun"),
    "bridge": ("posterior_mean", "argmax_row"),
    "order": ("random", "confidence"),
}


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """A script that makes a shell complete the commands, their options, and the names that these take.

    Args:
        parser: of all commands.
        shell: ``bash``, ``zsh`` or ``tcsh``.
    """
    names = _names()
    commands = next(action for action in parser._actions if action.dest == "command").choices
    for command in (parser, *dict(commands or {}).values()):
        for action in command._actions:
            complete = _completion_of(action.dest, names)
            if complete is not None and action.choices is None:
                action.complete = complete
    functions = {"bash": _bash(names), "zsh": _zsh(names)}
    return shtab.complete(parser, shell=shell, preamble=functions.get(shell, ""))


def _names() -> dict[str, tuple[str, ...]]:
    """The words of every argument that takes some."""
    files = [p for pattern in ("*.yaml", "*/*.yaml", "*/*.sh") for p in _RECIPES.glob(pattern)]
    recipes = sorted(p.stem for p in files if p.parent == _RECIPES)
    return WORDS | {
        "recipe": tuple(recipes),
        "path": ("list", *sorted(p.relative_to(_RECIPES).as_posix() for p in files)),
        "table": ("list", *(table.name for table in tables())),
    }


def _completion_of(dest: str, names: dict[str, tuple[str, ...]]) -> Any:
    if dest in names:
        words = [name for name in names[dest] if "/" not in name]  # tcsh's patterns have slashes of their own
        return {"bash": _function(dest), "zsh": _function(dest), "tcsh": f"({' '.join(words)})"}
    return shtab.FILE if dest in _FILES else shtab.DIRECTORY if dest in _DIRECTORIES else None


def _function(dest: str) -> str:
    """The name of the shell's function; by ``_file`` shtab's script for bash knows that it may give directories."""
    return f"_diffusionblocks_{dest}" + ("_or_file" if dest == "recipe" else "")


def _bash(names: dict[str, tuple[str, ...]]) -> str:
    """A function for each list of words, called with the word that is completed; a recipe may be a YAML file too."""
    made = []
    for dest, words in names.items():
        body = f"compgen -W '{' '.join(words)}' -- \"$1\""
        if dest == "recipe":
            body += ' || [[ -z $1 ]] || compgen -d -- "$1"\n  compgen -f -X \'!*.y*ml\' -- "$1"'
        made.append(f"{_function(dest)}() {{\n  {body}\n}}")
    return "\n".join(made)


def _zsh(names: dict[str, tuple[str, ...]]) -> str:
    """The same for zsh, called with options of ``compadd``."""
    made = []
    for dest, words in names.items():
        body = f'compadd "$@" -- {" ".join(words)}' + ("\n  _files -g '*.y*ml'" if dest == "recipe" else "")
        made.append(f"{_function(dest)}() {{\n  {body}\n}}")
    return "\n".join(made)


__all__ = ["WORDS", "completion_script"]
