"""Figures by block that a page shows: each block's share of the likelihood, or what comes nearest to it."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..run_names import LOSS_NAME, SHARE_NAME

_MAX_BYTES = 4 << 20


class Shares(NamedTuple):
    """One number per block: a title, what the numbers are, whether they add up to a whole, and the numbers."""

    title: str
    unit: str
    whole: bool
    values: list[float]


def chosen_shares(figures: dict[str, Any], evaluations: Path) -> Shares | None:
    """What says most of the likelihood by block: the bound's shares, those of the last evaluation, then losses.

    Args:
        figures: of the trained model; empty before it is scored.
        evaluations: the log of held-out evaluations.
    """
    scored = _scored(figures)
    if scored is not None and scored.whole:
        return scored
    measured = _evaluated(evaluations)
    return measured if scored is None or (measured is not None and measured.whole) else scored


def finite(value: Any) -> float | None:
    """A finite number, or None."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def _scored(figures: dict[str, Any]) -> Shares | None:
    """Of the table of figures: the bound's shares, then what each block alone reaches."""
    names = [n for n, v in figures.items() if n.endswith(("_per_block", "_per_range")) and isinstance(v, list) and v]
    order = [n for start in ("bound_", "local_", "held_out_loss", "") for n in names if n.startswith(start)]
    for name in order:
        given = [finite(v) for v in figures[name]]
        values = [v for v in given if v is not None]
        if len(values) == len(given):
            unit = re.sub(r"_per_(block|range)$", "", name).replace("_", " ")
            if name.startswith("bound_"):
                return Shares("Share of the likelihood by block", unit, True, values)
            return Shares("Held-out figures by block", unit, False, values)
    return None


def _evaluated(path: Path) -> Shares | None:
    """Of the last evaluation that can be read: the shares of the likelihood, or the losses."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read(_MAX_BYTES).splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = json.loads(line)
            iteration, shares, losses = int(row["iteration"]), _by_block(row, SHARE_NAME), _by_block(row, LOSS_NAME)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            continue
        when = f"after iteration {iteration:,}"
        if shares:
            unit = f"bound on the negative log-likelihood, nats per token, {when}"
            return Shares("Share of the likelihood by block", unit, True, shares)
        if losses:
            return Shares("Held-out loss by block", f"held-out loss {when}", False, losses)
    return None


def _by_block(row: dict[str, Any], name: str) -> list[float]:
    """A figure of all blocks in a row of a log; none unless each has one."""
    given = {int(k.rpartition("_")[2]): finite(v) for k, v in row.items() if k.startswith(f"{name}/block_")}
    values = {block: v for block, v in given.items() if v is not None}
    return [values[b] for b in sorted(values)] if sorted(values) == list(range(len(given))) else []
