"""The table of figures as text."""

from typing import Any


def format_figures(figures: dict[str, Any]) -> str:
    """The table of figures as text."""
    lines = []
    for name, value in figures.items():
        if isinstance(value, float):
            value = f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"
        elif isinstance(value, list):
            value = ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value)
        elif isinstance(value, dict):
            value = ", ".join(f"{k}: {v}" for k, v in value.items())
        lines.append(f"{name.replace('_', ' '):<36}{value}")
    return "\n".join(lines)
