"""From the rows of finished jobs to the figures of the tables: mean and standard error over seeds."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import Setting, Study, tables

Figure = list[float | None]  # mean, standard error; the latter is None for one seed
_DIGITS = 7  # significant ones that are kept: more than are ever shown


def _look_up(row: Mapping[str, Any], key: str) -> float:
    """A value of a row; a dot goes into a section, unless the key itself has one."""
    section, dot, rest = key.partition(".")
    return row[key] if key in row or not dot else row[section][rest]


def _figure(values: Sequence[float]) -> Figure:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return [float(f"{v:.{_DIGITS}g}") if v is not None else None for v in (statistics.mean(values), error)]


def _origin(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    rows = list(rows)
    machines = sorted({row["machine"] for row in rows if "machine" in row})
    dates = sorted({row["date"] for row in rows if "date" in row})
    return {"machines": machines, "dates": dates[:1] + dates[-1:] if len(dates) > 1 else dates}


def measure_study(study: Study, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The figures of a study: ``rows`` with ``arm``, number of ``seeds`` and ``figures``; where and when it ran.

    Args:
        study: says which rows and figures count.
        rows: of the study's file of results.

    Returns:
        None if no row is of this study. Of several rows of one arm and seed the last one counts.
    """
    by_seed: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        arm = row.get("arm", row.get("name", ""))
        if arm.startswith(study.prefix) and all(row.get(key) == value for key, value in study.match.items()):
            by_seed.setdefault(arm, {})[row.get("seed", 0)] = row
    if not by_seed:
        return None
    mine = {arm: list(found.values()) for arm, found in by_seed.items()}
    order = [arm for arm in study.arms if arm in mine] + [arm for arm in mine if arm not in study.arms]
    found = [
        {
            "arm": arm,
            "seeds": len(mine[arm]),
            "figures": [_figure([_look_up(row, c.key) * c.factor for row in mine[arm]]) for c in study.columns],
        }
        for arm in order
    ]
    return {"rows": found, **_origin(row for arm in order for row in mine[arm])}


def measure_paper(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures at the paper's settings, by ``table/setting/label``.

    Args:
        rows: of ``paper-settings.jsonl``: ``table``, ``setting``, ``label`` as in the tables, ``figures`` one per
            column, ``seed``, ``machine``, ``date``.

    Raises:
        ValueError: for a row that is none of the paper's, or without a figure per column.
    """
    known: dict[str, Setting] = {
        paper_key(table.name, setting.name, row.label): setting
        for table in tables()
        for setting in table.settings
        for row in setting.rows
    }
    mine: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        key = paper_key(row["table"], row["setting"], row["label"])
        if key not in known:
            raise ValueError(f"{key!r} is no row of the tables: {', '.join(known)}.")
        if len(row["figures"]) != len(known[key].columns):
            raise ValueError(f"{key!r} has figures {row['figures']}, not one per column {list(known[key].columns)}.")
        mine.setdefault(key, []).append(row)
    return {
        key: {
            "seeds": len(own),
            "figures": [_figure(values) for values in zip(*(row["figures"] for row in own), strict=True)],
            **_origin(own),
        }
        for key, own in mine.items()
    }


def paper_key(table: str, setting: str, label: str) -> str:
    """The name of a row of the paper in ``measured()["paper"]``."""
    return f"{table}/{setting}/{label}"
