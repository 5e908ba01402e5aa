"""The table of figures as text."""

import math
from typing import Any


def format_figures(figures: dict[str, Any]) -> str:
    """The table of figures as text."""
    lines = []
    width = max([34, *map(len, figures)]) + 2
    for name, value in figures.items():
        if isinstance(value, (list, tuple)):
            text = ", ".join(_short(v) for v in value)
        elif isinstance(value, dict):
            text = ", ".join(f"{k}: {_short(v)}" for k, v in value.items())
        else:
            text = f"{value:.3e}" if isinstance(value, float) and 1e5 <= abs(value) < math.inf else _short(value)
        lines.append(f"{name.replace('_', ' '):<{width}}{text}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "not known"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
