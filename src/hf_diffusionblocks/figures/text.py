"""Pictures of language models: what each block scores, and samples as text."""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .style import DPI, FONT, axes_figure, block_color

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 96  # characters per line of a sample
_LINES = 40  # lines of a sample that are drawn


def block_bits_figure(bits: Sequence[float], whole: float | None, labels: Sequence[str], xlabel: str) -> "Figure":
    """Figure of ``plot_block_bits``."""
    if not bits or len(bits) != len(labels):
        raise ValueError(f"{len(bits)} figures and {len(labels)} labels were given: give one of each per block.")
    values = [*bits] + ([] if whole is None else [whole])
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"bits={list(bits)}, whole={whole}: figures must be finite.")
    figure, axes = axes_figure(8.0, 1.2 + 0.45 * len(bits))
    for block, value in enumerate(bits):
        axes.barh(block, value, color=block_color(block), height=0.66)
        axes.text(value, block, f" {value:.3f}", va="center")
    axes.set_yticks(range(len(bits)), labels)
    axes.set(ylim=(len(bits) - 0.4, -0.6), xlim=(0, 1.15 * max(max(values), 1e-9)), xlabel=xlabel)
    axes.grid(axis="y", visible=False)
    if whole is not None:
        axes.axvline(whole, color="black", lw=1.3, ls="--", label=f"whole model {whole:.3f}")
        figure.legend(loc="outside upper right")
    return figure


def text_samples_figure(samples: Sequence[tuple[str, str]], title: str | None) -> "Figure":
    """Figure of ``plot_text_samples``."""
    from matplotlib.figure import Figure

    if not samples:
        raise ValueError("there are no samples to draw: give at least one pair of a prompt and its text.")
    lines: list[tuple[str, dict]] = []
    for prompt, text in samples:
        lines.append((f"prompt: {_visible(prompt)}", {"color": block_color(0), "weight": "bold"}))
        wrapped = [part for line in text.splitlines() for part in textwrap.wrap(_visible(line), _COLUMNS) or [""]]
        lines += [(line, {"family": "monospace"}) for line in wrapped[:_LINES]]
        lines += [("[cut]", {"color": "#666666"})] if len(wrapped) > _LINES else []
        lines.append(("", {}))
    spacing, head = 1.35 * FONT / 72, 0.45 if title else 0.15  # inches
    height = head + spacing * len(lines) + 0.1
    figure = Figure((9.0, height), dpi=DPI, facecolor="white")
    plain: dict[str, Any] = {"fontsize": FONT - 1, "parse_math": False, "va": "top"}
    if title:
        figure.text(0.02, 1 - 0.1 / height, title, **plain | {"fontsize": FONT + 1})
    for i, (line, style) in enumerate(lines):
        figure.text(0.02, 1 - (head + spacing * i) / height, line, **plain | style)
    return figure


def _visible(text: str) -> str:
    """Control characters would be drawn as boxes."""
    return "".join(c if c.isprintable() else " " for c in text)
