"""Colours, fonts and sizes that all figures share."""

import contextlib
from typing import TYPE_CHECKING, Any

from ..partition import BlockPartition

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours for all kinds of colour vision, without the yellow (too pale on white), and two of Paul Tol's.
BLOCK_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#999933")
_LINE_STYLES = ("-", "--", ":", "-.")
DPI = 128  # a power of two: pixels / dpi is exact, so no row of pixels is lost to rounding
FONT = 10.0  # points


def block_color(block: int) -> str:
    """Colour of a block, ``#rrggbb``, the same in every picture."""
    return BLOCK_COLORS[block % len(BLOCK_COLORS)]


def line_style(block: int) -> str:
    """Line style of a block; beyond eight blocks the colours repeat with another one."""
    return _LINE_STYLES[block // len(BLOCK_COLORS) % len(_LINE_STYLES)]


def plot_style() -> contextlib.AbstractContextManager:
    """matplotlib's defaults, whatever style the caller has chosen, and readable sizes; restored afterwards."""
    from matplotlib import style

    sizes = {"font.size": FONT, "axes.titlesize": FONT + 1, "legend.fontsize": FONT - 1, "legend.frameon": False}
    spines = {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    return style.context(["default", sizes | spines | {"grid.color": "#DDDDDD", "axes.grid": True}])


def axes_figure(width: float, height: float, **grid: Any) -> "tuple[Figure, Any]":
    """A white figure of so many inches and its axes, as ``Figure.subplots(**grid)`` gives them."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=DPI, facecolor="white", layout="constrained")
    return figure, figure.subplots(**grid)


def text_color(color: str) -> str:
    """Text colour that is readable on a colour: black or white."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def name_block(partition: BlockPartition, block: int) -> str:
    """A block with its layers: ``block 1, layers 4–7``."""
    layers = partition.layers(block)
    return f"block {block}, layer{f's {layers[0]}–{layers[-1]}' if len(layers) > 1 else f' {layers[0]}'}"
