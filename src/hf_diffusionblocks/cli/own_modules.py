"""``--import``: modules of the user that register families of their own, read before the arguments are."""

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def import_own_modules(argv: Sequence[str] | None) -> None:
    """Import what ``--import`` names, so that families, recipes and help know of it.

    Raises:
        ValueError: for a module or a file that is not there.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--import", dest="imports", action="append", default=[])
    try:
        names = parser.parse_known_args(argv)[0].imports
    except argparse.ArgumentError:  # without a name: the parser of all commands says so
        return
    for name in names:
        _import_file(Path(name)) if name.endswith(".py") else _import_module(name)


def _import_module(name: str) -> None:
    if os.getcwd() not in sys.path and "" not in sys.path:  # an installed command does not look there
        sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the module is there, and lacks one that it imports
        raise ValueError(
            f"--import {name}: there is no such module in this environment or in {os.getcwd()}. Give a module's name, "
            "or a file that ends in .py."
        ) from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"--import {path}: there is no such file.")
    known = getattr(sys.modules.get(path.stem), "__file__", None)
    if known is not None and Path(known).resolve() == path.resolve():
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if known is not None or spec is None or spec.loader is None:
        raise ValueError(f"--import {path}: a module of the name {path.stem} is there already. Rename the file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)


__all__ = ["import_own_modules"]
