"""Charts of a partition, a memory plan, a run's losses, and any curves."""

import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..masking import MaskNoise
from ..partition import BlockPartition
from ..units import human_bytes
from .style import BLOCK_COLORS, axes_figure, block_color, line_style, name_block, text_color

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEMORY_KINDS = {  # from dark to light, so that the order shows without colour as well
    "weights": "#1B2A49",
    "gradients": "#4F77AA",
    "moments": "#8D8D8D",
    "ema": "#B08D3C",
    "activations": "#E8CF6A",
}


def partition_figure(partition: BlockPartition) -> "Figure":
    """Figure of ``plot_partition``."""
    noise: Any = partition.noise
    rows = partition.describe()
    linear = isinstance(noise, MaskNoise)
    name, log_name = ("mask rate m", "m") if linear else ("noise level σ", "ln σ")
    strip = 0.3 * len(rows) + 0.6
    figure, (top, bottom) = axes_figure(
        9.0, 2.6 + strip, nrows=2, sharex=True, gridspec_kw={"height_ratios": [2.6, strip]}
    )

    def density(sigma: Tensor) -> Tensor:
        if linear:
            return torch.ones_like(sigma)
        # of ln sigma, truncated: the normal density over the mass that lies in the range
        z = torch.stack([sigma, torch.full_like(sigma, noise.sigma_min), torch.full_like(sigma, noise.sigma_max)]).log()
        z = (z - noise.p_mean) / noise.p_std
        mass = torch.special.ndtr(z[2]) - torch.special.ndtr(z[1])
        return (-(z[0] ** 2) / 2).exp() / (noise.p_std * math.sqrt(2 * math.pi) * mass)

    def between(low: float, high: float) -> tuple[Any, Any]:
        if linear:
            sigma = torch.linspace(low, high, 200, dtype=torch.float64)
            return sigma.numpy(), density(sigma).numpy()
        sigma = torch.linspace(math.log(low), math.log(high), 200, dtype=torch.float64).exp().clamp(low, high)
        return sigma.numpy(), density(sigma).numpy()

    whole = between(noise.sigma_min, noise.sigma_max)
    for row in rows:
        block, color, (low, high), wide = row["block"], block_color(row["block"]), row["range"], row["training_range"]
        top.fill_between(*between(low, high), color=color, lw=0)
        middle = noise.icdf((noise.cdf(low) + noise.cdf(high)) / 2)
        peak, y = whole[1].max(), float(density(middle))
        inside = y > 0.15 * peak  # in the tails there is no room under the curve
        y, ink = (0.4 * y, text_color(color)) if inside else (y + 0.06 * peak, "black")
        top.text(float(middle), y, str(block), ha="center", va="center", color=ink, weight="bold")
        bottom.barh(block, wide[1] - wide[0], left=wide[0], color=color, alpha=0.35, height=0.62, lw=0)
        bottom.barh(block, high - low, left=low, color=color, height=0.62, lw=0)
        text = f"{name[-1]} {low:.3g}–{high:.3g}, {100 * row['mass']:.3g} % of the mass"
        bottom.text(1.01, block, text, transform=bottom.get_yaxis_transform(), va="center")
    top.plot(*whole, color="#333333", lw=1.2)
    top.set(ylabel=f"density of {log_name}", ylim=(0, None), title=f"training {name[:-2]}s of each block")
    bottom.set(
        xscale="linear" if linear else "log", xlim=(noise.sigma_min, noise.sigma_max), ylim=(len(rows) - 0.4, -0.6)
    )
    bottom.set_yticks(range(len(rows)), [name_block(partition, row["block"]) for row in rows])
    bottom.grid(axis="y", visible=False)
    bottom.set_xlabel(f"{name} (pale: training reaches over the edges, overlap γ = {partition.overlap:g})")
    if not linear:
        _plain_log_labels(bottom.xaxis, (noise.sigma_min, noise.sigma_max))
    return figure


def memory_figure(plan: Any) -> "Figure":
    """Figure of ``plot_memory``."""
    rows = list(getattr(plan, "rows", plan))
    if not rows:
        raise ValueError("the memory plan has no rows: nothing to draw.")
    parts = [{kind: float(getattr(row, kind)) for kind in MEMORY_KINDS} for row in rows]
    for row, kinds in zip(rows, parts, strict=True):
        if any(not (math.isfinite(value) and value >= 0) for value in kinds.values()):
            raise ValueError(f"row {_name_row(row)!r} has {kinds}: bytes must be finite and not negative.")
    whole = next((row.total for row in rows if row.method == "end to end"), 0)
    longest = max(sum(kinds.values()) for kinds in parts) or 1
    figure, axes = axes_figure(9.5, 1.3 + 0.42 * len(rows))
    for y, (row, kinds) in enumerate(zip(rows, parts, strict=True)):
        left = 0.0
        for kind, value in kinds.items():
            color = MEMORY_KINDS[kind]
            axes.barh(y, value, left=left, color=color, height=0.66, edgecolor="white", lw=0.8)
            if value > 0.12 * longest:
                settings = {"ha": "center", "va": "center", "color": text_color(color), "size": 9}
                axes.text(left + value / 2, y, human_bytes(value), **settings)
            left += value
        text = human_bytes(row.total)
        if whole:
            text += f", {row.total / whole:.2f}×"
        axes.text(left + 0.01 * longest, y, text, va="center")
    axes.set_yticks(range(len(rows)), [textwrap.fill(_name_row(row), 30) for row in rows])
    axes.set(xlim=(0, 1.22 * longest), ylim=(len(rows) - 0.4, -0.6))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=False)
    axes.set_xlabel("memory of a training step" + (", and its ratio to end-to-end training" if whole else ""))
    from matplotlib.patches import Patch

    names = {kind: "EMA" if kind == "ema" else kind for kind in MEMORY_KINDS if any(p[kind] for p in parts)}
    patches = [Patch(color=MEMORY_KINDS[kind]) for kind in names]
    figure.legend(patches, names.values(), loc="outside upper center", ncols=max(1, len(names)))
    return figure


def _name_row(row: Any) -> str:
    return str(row.method) if row.block is None else f"{row.method}, block\N{NO-BREAK SPACE}{row.block}"


def losses_figure(run_dir: Path, unit: str | None = None, whole: str = "all noise levels") -> "Figure":
    """Figure of ``plot_losses``."""
    updates, evaluations = (_read_log(run_dir / name) for name in ("updates.jsonl", "evaluations.jsonl"))
    if not updates:
        raise ValueError(f"{run_dir} has no updates.jsonl with losses: give a trainer's output directory.")
    figure, axes = axes_figure(11.0 if evaluations else 8.0, 4.2, ncols=2 if evaluations else 1, squeeze=False)
    left, all_losses = axes[0, 0], []
    by_block: dict[int, list[tuple[int, float]]] = {}
    for row in updates:
        by_block.setdefault(row["block"], []).append((row["update"], float(row["loss"])))
    window = max(1, max(len(points) for points in by_block.values()) // 40)
    for block, points in sorted(by_block.items()):
        x, y = (list(values) for values in zip(*points, strict=True))
        left.plot(x, y, ".", color=block_color(block), alpha=0.2, ms=3, mew=0)
        line = {"color": block_color(block), "ls": line_style(block), "lw": 1.8, "label": f"block {block}"}
        left.plot(*running_median(x, y, window), **line)
        all_losses += y
    title = f"line: running median of {window} updates" if window > 1 else None
    unit = f", {unit}" if unit else ""
    left.set(xlabel="updates of the block", ylabel=f"training loss{unit}", title=title)
    _log_if_wide(left, all_losses)
    if evaluations:
        right = axes[0, 1]
        x = [row["iteration"] for row in evaluations]
        marker = "o" if len(x) <= 30 else None
        names = sorted({name for row in evaluations for name in row if re.fullmatch(r"eval_loss/block_\d+", name)})
        drawn = []
        for name in sorted(names, key=lambda name: int(name.rsplit("_", 1)[1])) + ["eval_loss"]:
            y = [math.nan if row.get(name) is None else float(row[name]) for row in evaluations]
            drawn += y
            number = None if name == "eval_loss" else int(name.rsplit("_", 1)[1])
            line = {"color": "black", "label": whole}
            if number is not None:
                line = {"color": block_color(number), "ls": line_style(number), "label": f"block {number}"}
            right.plot(x, y, marker=marker, ms=4, lw=1.8, **line)
        right.set(xlabel="iterations of all blocks", ylabel=f"held-out loss{unit}")
        _log_if_wide(right, drawn)
    _legend(figure)
    return figure


def _read_log(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):  # a run that is being written or was killed may end in the middle of a line
                raise ValueError(f"line {number} of {path} is not JSON ({error}): remove it.") from error
    return rows


def running_median(x: Sequence[float], y: Sequence[float], window: int) -> tuple[list[float], list[float]]:
    """Medians of up to 400 windows along a curve, each at the middle of its window.

    Args:
        x: positions, ascending.
        y: values.
        window: points per window; at the ends the window is cut.

    Returns:
        Positions and medians.
    """
    values = torch.tensor(y, dtype=torch.float64)
    centres = torch.linspace(0, len(x) - 1, min(len(x), 400)).round().int().tolist()
    half = window // 2
    medians = [values[max(0, c - half) : c - half + max(window, 1)].quantile(0.5).item() for c in centres]
    return [x[c] for c in centres], medians


def curves_figure(
    series: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    title: str | None = None,
    logx: bool = False,
    logy: bool = False,
    reference: Mapping[str, float] | None = None,
) -> "Figure":
    """Figure of ``plot_curves``."""
    if not series:
        raise ValueError("series is empty: give at least one curve.")
    reference = reference or {}
    for name, points in [*series.items(), *((name, [(1.0, y)]) for name, y in reference.items())]:
        if len(points) == 0 or any(len(point) != 2 for point in points):
            raise ValueError(f"series {name!r} must hold at least one point, each a pair (x, y).")
        for x, y in points:
            if not (math.isfinite(x) and math.isfinite(y)) or logx and x <= 0 or logy and y <= 0:
                raise ValueError(
                    f"series {name!r} has the point ({x}, {y}): numbers must be finite, and positive on a "
                    "logarithmic axis."
                )
    figure, axes = axes_figure(8.5, 4.2)
    named = {name: re.search(r"\bblock[ _-]?(\d+)\b", name) for name in series}
    blocks = {name: int(match[1]) for name, match in named.items() if match}
    free = (i for i in range(len(series) + len(BLOCK_COLORS)) if i not in blocks.values())
    for name, points in series.items():
        xs, ys = zip(*points, strict=True)
        i = blocks[name] if name in blocks else next(free)
        marker = "o" if len(points) <= 30 else None
        axes.plot(xs, ys, color=block_color(i), ls=line_style(i), lw=1.8, marker=marker, ms=4.5, label=name)
    for i, (name, y) in enumerate(reference.items()):
        axes.axhline(y, color="#444444", lw=1.3, ls=("--", ":", "-.")[i % 3], label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title or "", parse_math=False)
    points = [point for curve in series.values() for point in curve]
    if logx:
        axes.set_xscale("log")
        _plain_log_labels(axes.xaxis, [x for x, _ in points])
    if logy:
        axes.set_yscale("log")
        _plain_log_labels(axes.yaxis, [y for _, y in points] + list(reference.values()))
    _legend(figure)
    return figure


def _legend(figure: "Figure") -> None:
    """One legend beside the axes, where it covers nothing; equal names appear once."""
    lines = [line for axes in figure.axes for line in axes.lines]
    named = {str(line.get_label()): line for line in lines if not str(line.get_label()).startswith("_")}
    legend = figure.legend(list(named.values()), list(named), loc="outside right upper")
    for text in legend.get_texts():
        text.set_parse_math(False)


def _log_if_wide(axes: "Axes", values: Sequence[float]) -> None:
    values = [value for value in values if math.isfinite(value)]
    if values and min(values) > 0 and max(values) > 4 * min(values):
        axes.set_yscale("log")
        _plain_log_labels(axes.yaxis, values)


def _plain_log_labels(axis: Any, values: Sequence[float]) -> None:
    """Label a logarithmic axis 0.2, 0.5, 1 instead of powers, at steps that suit the range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(max(values) / min(values))
    subs = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 1.2 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))  # below three ticks or so it places them linearly
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
