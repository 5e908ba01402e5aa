"""A run's losses as inline SVG, coloured by the page's style sheet."""

import math
import statistics
from collections.abc import Mapping, Sequence

from markupsafe import Markup

_MAX_POINTS = 120  # of a line
_PER_DECADE = (1, 2, 5)
COLORS, DASHES = 8, 4  # classes of blocks in the style sheet: block-0 ..., dash-0 ...


def block_class(block: int) -> str:
    """The classes of a block's line: colours repeat after eight blocks, dashes after four."""
    return f"block-{block % COLORS} dash-{block % DASHES}"


def thinned(x: Sequence[int], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Medians of consecutive updates, at most ``_MAX_POINTS`` of them: what a line can show."""
    size = max(1, math.ceil(len(y) / _MAX_POINTS))
    starts = range(0, len(y), size)
    return [statistics.fmean(x[i : i + size]) for i in starts], [statistics.median(y[i : i + size]) for i in starts]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next((m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= count), 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Numbers 1, 2 and 5 times a power of ten, or powers of ten alone over more than three decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = _PER_DECADE if math.log10(high / low) <= 3 else (1,)
    return [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high] or [low, high]


def loss_chart(
    losses: Mapping[int, tuple[Sequence[int], Sequence[float]]], width: int, height: int, kind: str = ""
) -> Markup:
    """Loss over updates, a line per block, as an ``<svg>``.

    Args:
        losses: of each block, the numbers of its updates and its losses (finite).
        width: in user units, of which a line of text takes 13.
        height: in user units.
        kind: class of the element.
    """
    lines = {block: thinned(x, y) for block, (x, y) in sorted(losses.items()) if y}
    if not lines:
        return Markup("")
    values = [v for _, y in lines.values() for v in y]
    low, high, longest = min(values), max(values), max(max(x) for x, _ in lines.values())
    logarithmic = low > 0 and high / low > 10
    if low == high:
        low, high = low - 0.5, high + 0.5
    scale = math.log if logarithmic else float
    left, right, top, bottom = 52, width - 12, 10, height - 40

    def at(x: float, y: float) -> str:
        across = left + (right - left) * (x / longest if longest else 0)
        return f"{across:.1f},{bottom - (bottom - top) * (scale(y) - scale(low)) / (scale(high) - scale(low)):.1f}"

    parts = []
    for value in log_ticks(low, high) if logarithmic else ticks(low, high):
        y = float(at(0, value).split(",")[1])
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{value:.4g}</text>')
    for value in (v for v in ticks(0, longest, max(3, width // 110)) if v == int(v)):
        x = float(at(value, high).split(",")[0])
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{value:,.0f}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{height - 4}" text-anchor="middle">updates of the block</text>')
    for block, (xs, ys) in lines.items():
        points = " ".join(at(*point) for point in zip(xs, ys, strict=True))
        if len(xs) == 1:
            across, down = points.split(",")
            parts.append(f'<circle class="{block_class(block)}" cx="{across}" cy="{down}" r="3"/>')
        else:
            parts.append(f'<polyline class="{block_class(block)}" points="{points}"/>')
    how = "logarithmic scale" if logarithmic else "linear scale"
    label = f"Loss of {len(lines)} block{'s' * (len(lines) > 1)} over updates, {how}; the last values are in the table"
    head = f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
    return Markup(f"{head}{''.join(parts)}</svg>")  # numbers and words of this file only
