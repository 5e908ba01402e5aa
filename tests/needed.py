"""Packages that a test needs: of the development environment, where a missing one must not pass for a skip."""

import importlib
import importlib.util
import os
from types import ModuleType

import pytest

IN_DEV = "the development environment has it (pip install -c constraints.txt -e '.[dev]'; `make test` makes one)"


def is_development() -> bool:
    """Whether this is CI, or an environment with the linter of the extra ``[dev]``."""
    return bool(os.environ.get("CI")) or importlib.util.find_spec("ruff") is not None


def needed(module: str) -> ModuleType:
    """A module of the extra ``[dev]``. Where it is missing, a test fails if this is the development environment."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = f"{module} cannot be imported ({error}): {IN_DEV}"
    if is_development():
        pytest.fail(reason)
    pytest.skip(reason)
