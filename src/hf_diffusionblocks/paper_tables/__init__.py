"""The paper's tables: its figures, the commands that make ours at its settings, and what small settings gave here.

The paper's figures (arXiv 2506.14202) and ours never stand in one row. Its own table numbers are not used: tables have
a name, and a number that is their place in this list.
"""

import json
import re
import shlex
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml

from ..suggest import unknown_name

MEASURED_NAME = "measured.json"


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper.

    Attributes:
        label: the method.
        figures: the paper's, one per column of its setting.
        command: what makes ours.
    """

    label: str
    figures: tuple[float, ...]
    command: str


@dataclass(frozen=True)
class Setting:
    """A data set and a network of the paper.

    Attributes:
        name: the data set.
        what: the network and its training.
        columns: headings of the figures.
        rows: the paper's.
        score: how the commands' models are scored.
        recipe: which recipe holds the setting; None where a script does.
    """

    name: str
    what: str
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]
    score: str
    recipe: str | None = None


@dataclass(frozen=True)
class Column:
    """A figure of a study: heading, its key in a row of the results (a dot goes into a section), factor, decimals."""

    heading: str
    key: str
    factor: float
    decimals: int


@dataclass(frozen=True)
class Study:
    """A small setting that is run for this library; its figures are in ``measured()``.

    Attributes:
        name: unique.
        file: stem of the file of results.
        what: data, network, training.
        command: what runs it, in a copy of the source.
        columns: the figures shown.
        match: keys and values that its rows have.
        prefix: how the names of its arms begin.
        arms: the first ones in order; others follow as they stand in the file.
        hardware: where its rows do not say it.
    """

    name: str
    file: str
    what: str
    command: str
    columns: tuple[Column, ...]
    match: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""
    arms: tuple[str, ...] = ()
    hardware: str = ""


@dataclass(frozen=True)
class PaperTable:
    """A table: ``number`` is its place in this list."""

    number: int
    name: str
    title: str
    settings: tuple[Setting, ...]
    studies: tuple[Study, ...]


def _setting(values: dict[str, Any]) -> Setting:
    recipe: Any = values.get("recipe")
    rows = tuple(
        PaperRow(row["label"], tuple(row["figures"]), row.get("command") or _train(recipe, row["train"]))
        for row in values["rows"]
    )
    return Setting(values["name"], values["what"], tuple(values["columns"]), rows, values["score"], recipe)


def _train(recipe: str, given: str) -> str:
    """The command of a row. With settings of its own, a run does not go where the recipe's own run goes."""
    options = shlex.split(given)
    settings = [option.partition(".")[2] for option in options if "=" in option]
    if settings:
        names = [re.sub(r"\W+", "-", setting).strip("-") for setting in settings]
        options += ["--output-dir", f"runs/{'-'.join([recipe, *names])}"]
    return shlex.join(["diffusionblocks", "train", recipe, *options])


def _study(name: str, values: dict[str, Any]) -> Study:
    columns = tuple(Column(*column) for column in values["columns"])
    return Study(name, **{**values, "columns": columns, "arms": tuple(values["arms"])})


@cache
def tables() -> tuple[PaperTable, ...]:
    """All tables, in the order of their numbers."""
    text = (resources.files(__package__) / "tables.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    studies = {name: _study(name, study) for name, study in values["studies"].items()}
    return tuple(
        PaperTable(
            number,
            table["name"],
            table["title"],
            tuple(_setting(setting) for setting in table["settings"]),
            tuple(studies[name] for name in table["studies"]),
        )
        for number, table in enumerate(values["tables"], start=1)
    )


def studies() -> tuple[Study, ...]:
    """All small settings, each once."""
    return tuple({study.name: study for table in tables() for study in table.studies}.values())


def find_table(name_or_number: str) -> PaperTable:
    """A table by its name or its number in this list.

    Raises:
        ValueError: for another name or number.
    """
    for table in tables():
        if name_or_number in (table.name, str(table.number)):
            return table
    names = [table.name for table in tables()]
    unknown = unknown_name("table", name_or_number, [*names, "list"])
    raise ValueError(
        f"{unknown} Or a number from 1 to {len(names)}, of this list and not of the paper: `diffusionblocks evaluate "
        "--table list`."
    )


@cache
def measured() -> dict[str, Any]:
    """Our figures: ``studies`` by name, and ``paper`` for what was run at the paper's settings.

    Both hold rows with mean and standard error over seeds; see ``benchmarks/paper_tables.py``, which writes the file.
    """
    return json.loads((resources.files(__package__) / MEASURED_NAME).read_text(encoding="utf-8"))


__all__ = ["Column", "PaperRow", "PaperTable", "Setting", "Study", "find_table", "measured", "studies", "tables"]
