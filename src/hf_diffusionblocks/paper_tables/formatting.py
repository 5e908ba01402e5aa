"""A table as text, and as plain values for JSON."""

import textwrap
from collections.abc import Sequence
from typing import Any

from . import PaperTable, Setting, Study, find_table, measured, tables
from .aggregation import paper_key

PAPER = "arXiv 2506.14202"
NOT_RUN = "not run"
NUMBERS = "Numbers are places in this list, not numbers of the paper's tables."


def format_list() -> str:
    """All tables: number, name, title, the paper's settings in them."""
    lines = [f"Tables of {PAPER} and of this library. {NUMBERS}", ""]
    for table in tables():
        names = "; ".join(setting.name for setting in table.settings)
        lines += [f"{table.number}  {table.name:<16}{table.title} ({names})"]
    return "\n".join([*lines, "", "diffusionblocks evaluate --table NAME|NUMBER prints one."])


def list_values() -> list[dict[str, Any]]:
    """What ``format_list`` says, as plain values."""
    return [
        {"number": table.number, "name": table.name, "title": table.title, "settings": [s.name for s in table.settings]}
        for table in tables()
    ]


def table_values(name_or_number: str) -> dict[str, Any]:
    """A table as plain values: ``paper`` (the paper's settings; ``ours`` is None where not run) and ``small``.

    Raises:
        ValueError: for an unknown table.
    """
    table = find_table(name_or_number)
    return {
        "number": table.number,
        "name": table.name,
        "title": table.title,
        "source": PAPER,
        "paper": [_setting_values(table, setting) for setting in table.settings],
        "small": [_study_values(study) for study in table.studies],
    }


def _setting_values(table: PaperTable, setting: Setting) -> dict[str, Any]:
    ours = measured()["paper"]
    return {
        "setting": setting.name,
        "what": setting.what,
        "recipe": setting.recipe,
        "columns": list(setting.columns),
        "score": setting.score,
        "rows": [
            {
                "label": row.label,
                "paper": list(row.figures),
                "ours": ours.get(paper_key(table.name, setting.name, row.label)),
                "command": row.command,
            }
            for row in setting.rows
        ],
    }


def _study_values(study: Study) -> dict[str, Any]:
    found = measured()["studies"].get(study.name)
    values: dict[str, Any] = {"study": study.name, "what": study.what, "command": study.command}
    values["columns"] = [column.heading for column in study.columns]
    if found is None:
        return values | {"rows": [], "machines": [], "dates": []}
    return values | found | {"machines": found["machines"] or [study.hardware or "machine not kept"]}


def format_table(name_or_number: str) -> str:
    """A table as text: what the paper reports, with ours at its setting; then what small settings gave here.

    Raises:
        ValueError: for an unknown table.
    """
    table = find_table(name_or_number)
    values = table_values(name_or_number)
    lines = [f"Table {table.number}, {table.name}: {table.title}. {NUMBERS}", ""]
    lines += [f"THE PAPER'S SETTING: its figures ({PAPER}), and ours at the same setting"]
    for setting in values["paper"]:
        lines += ["", *_format_setting(setting)]
    lines += ["", "", "SMALL SETTINGS, RUN FOR THIS LIBRARY: not to be compared with the figures above"]
    for study, found in zip(table.studies, values["small"], strict=True):
        lines += ["", *_format_study(study, found)]
    return "\n".join(lines)


def _format_setting(setting: dict[str, Any]) -> list[str]:
    columns = setting["columns"]
    rows = []
    for row in setting["rows"]:
        ours = [_with_error(f, 2) for f in row["ours"]["figures"]] if row["ours"] else [NOT_RUN] * len(columns)
        rows.append([row["label"], *(f"{figure:.2f}" for figure in row["paper"]), *ours])
    head = ["", *(f"{c}, paper" for c in columns), *(f"{c}, ours" for c in columns)]
    lines = [f"{setting['setting']}: {setting['what']}", *_aligned([head, *rows])]
    for row in setting["rows"]:
        if row["ours"]:
            lines.append(f"ours, {row['label']}: {_origin(row['ours'])}, seeds: {row['ours']['seeds']}")
    held = f", the setting of the recipe {setting['recipe']}" if setting["recipe"] else ""
    lines.append(f"To make ours{held}:")
    lines += _aligned([[f"  {row['label']}", row["command"]] for row in setting["rows"]], right=False)
    return [*lines, *_wrapped(f"To score: {setting['score']}")]


def _format_study(study: Study, found: dict[str, Any]) -> list[str]:
    lines = _wrapped(study.what + ".")
    if not found["rows"]:
        return [*lines, f"  {NOT_RUN} so far; {study.command}"]
    rows = [
        [
            row["arm"],
            str(row["seeds"]),
            *(_with_error(f, c.decimals) for f, c in zip(row["figures"], study.columns, strict=True)),
        ]
        for row in found["rows"]
    ]
    lines += _aligned([["arm", "seeds", *found["columns"]], *rows])
    return [*lines, f"{_origin(found)}; mean and standard error over seeds. {study.command}"]


def _origin(found: dict[str, Any]) -> str:
    return f"{'; '.join(found['machines'])}; {' to '.join(found['dates']) or 'date not kept'}"


def _with_error(figure: Sequence[float | None], decimals: int) -> str:
    mean, error = figure
    return f"{mean:.{decimals}f}" + (f" +- {error:.{decimals}f}" if error else "")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 118, subsequent_indent="  ")


def _aligned(rows: Sequence[Sequence[str]], right: bool = True) -> list[str]:
    """Columns under one another, the first to the left, the others to the right or left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(w) if right else cell.ljust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return lines
