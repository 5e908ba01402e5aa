"""Pictures made of images, laid out in whole pixels: a pixel of a sample is a square of pixels in the file."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..partition import BlockPartition
from .style import DPI, FONT, block_color, name_block, text_color

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL = 96  # an image is enlarged by a whole factor to at least so many pixels
_LINE = 24  # pixels that a line of text takes
_MARGIN = 14
_COLUMNS = 10  # steps that plot_denoising draws, unless the blocks need more
_MAX_PIXELS = 2**16 - 1  # of matplotlib's renderer, each way


def sample_grid_figure(
    images: Tensor,
    labels: Tensor | Sequence[int],
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    columns: int | None = None,
    title: str | None = None,
) -> "Figure":
    """Figure of ``save_sample_grid``."""
    _check_images(images, "images")
    low, high = float(images.min()), float(images.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"images run from {low:.3g} to {high:.3g}; they must lie in [0, 1] (x / 2 + 0.5 for [-1, 1]).")
    labels = torch.as_tensor(labels).flatten().tolist()
    if len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels were given for {len(images)} images: give one label per image.")
    if columns is not None and (isinstance(columns, bool) or not isinstance(columns, int) or columns < 1):
        raise ValueError(f"columns={columns!r} must be a whole number of at least 1, or None.")
    rows: list[tuple[str, list[int]]] = []
    for label in sorted(set(labels)):
        mine = [i for i, other in enumerate(labels) if other == label]
        step = columns or len(mine)
        for start in range(0, len(mine), step):
            rows.append(("" if start else _class_name(label, class_names), mine[start : start + step]))
    pixels, scale, gap = _to_rgb8(images), _enlargement(images), 4
    height, width = (scale * side for side in images.shape[-2:])
    left = _MARGIN + max(_text_width(name) for name, _ in rows) + 10
    top = _MARGIN + (_LINE + 6 if title else 0)
    count = max(len(row) for _, row in rows)
    sheet = _Sheet(
        max(left + count * (width + gap) - gap, _MARGIN + _text_width(title or "", FONT + 1)) + _MARGIN,
        top + len(rows) * (height + gap) - gap + _MARGIN,
    )
    if title:
        sheet.text(_MARGIN, _MARGIN + _LINE / 2 - 2, title, fontsize=FONT + 1)
    for r, (name, row) in enumerate(rows):
        y = top + r * (height + gap)
        if name:
            sheet.text(left - 10, y + height / 2, name, ha="right")
        for c, i in enumerate(row):
            sheet.image(left + c * (width + gap), y, pixels[i], scale)
    return sheet.figure


def _class_name(label: int, names: Sequence[str] | Mapping[int, str] | None) -> str:
    if names is None:
        return f"class {label}"
    if isinstance(names, Mapping) and label in names or not isinstance(names, Mapping) and 0 <= label < len(names):
        return str(names[label])
    if not isinstance(names, Mapping) and label == len(names):
        return "no class"
    raise ValueError(f"label {label} has no name: class_names names {len(names)} classes.")


def denoising_figure(
    steps: Sequence[Mapping[str, Any]], partition: BlockPartition, title: str | None = None, sigma_data: float = 0.5
) -> "Figure":
    """Figure of ``plot_denoising``."""
    if not steps:
        raise ValueError("steps is empty: record at least one step of a sampler (callback=…).")
    shape = steps[0]["z"].shape
    for i, step in enumerate(steps):
        partition.check_block(step["block"])
        for name in ("z", "denoised"):
            _check_images(step[name], f"steps[{i}][{name!r}]")
            if step[name].shape != shape:
                raise ValueError(
                    f"steps[{i}][{name!r}] has shape {list(step[name].shape)} and steps[0]['z'] {list(shape)}: record "
                    "one batch from the first step to the last."
                )
    chosen = [steps[i] for i in choose_steps([step["block"] for step in steps])]
    scale, gap = _enlargement(steps[0]["z"]), 4
    height, width = (scale * side for side in shape[-2:])
    row_names = ("noisy state z", "denoised")
    left = _MARGIN + max(_text_width(name) for name in row_names) + 10
    xs, x = [], left  # left edge of each column; blocks stand further apart than steps of one block
    for before, step in zip([chosen[0], *chosen], chosen, strict=False):
        x += 12 if before["block"] != step["block"] else 0
        xs.append(x)
        x += width + gap
    band = _MARGIN + (_LINE + 6 if title else 0)
    top = band + 2 * _LINE + 8
    pair = 2 * (height + gap) + 10  # the two rows of a sample
    note = "z is shown times σ_data / √(σ² + σ_data²): the data's variance at every σ"
    sheet = _Sheet(
        max(x - gap, *(_MARGIN + _text_width(text, FONT + 1) for text in (title or "", note))) + _MARGIN,
        top + int(shape[0]) * pair + _LINE + _MARGIN // 2,
    )
    if title:
        sheet.text(_MARGIN, _MARGIN + _LINE / 2 - 2, title, fontsize=FONT + 1)
    sheet.text(left - 10, band + 1.5 * _LINE, "noise level σ", ha="right")
    for block, members in groupby(range(len(chosen)), key=lambda i: chosen[i]["block"]):
        group = list(members)
        start, end = xs[group[0]], xs[group[-1]] + width
        color = block_color(block)
        sheet.band(start, band, end - start, 2 * _LINE, color)
        names = (name_block(partition, block), f"block {block}", str(block))
        name = next((n for n in names if _text_width(n) <= end - start - 6), names[-1])
        sheet.text((start + end) / 2, band + _LINE / 2 + 1, name, ha="center", color=text_color(color))
        for i in group:
            sigma = f"{chosen[i]['sigma']:.3g}"
            sheet.text(xs[i] + width / 2, band + 1.5 * _LINE - 1, sigma, ha="center", color=text_color(color))
    for i, step in enumerate(chosen):
        shown = step["z"].detach().float() * (sigma_data / (step["sigma"] ** 2 + sigma_data**2) ** 0.5)
        for r, pictures in enumerate((_to_rgb8(shown / 2 + 0.5), _to_rgb8(step["denoised"] / 2 + 0.5))):
            for n, picture in enumerate(pictures):
                sheet.image(xs[i], top + n * pair + r * (height + gap), picture, scale)
    for n in range(shape[0]):
        for r, name in enumerate(row_names):
            sheet.text(left - 10, top + n * pair + r * (height + gap) + height / 2, name, ha="right")
    sheet.text(_MARGIN, sheet.height - _MARGIN / 2 - _LINE / 2, note, color="#444444")
    return sheet.figure


def choose_steps(blocks: Sequence[int], wanted: int = _COLUMNS) -> list[int]:
    """Which of the steps to draw: the first and the last of every visit to a block, then others to fill wide gaps.

    Args:
        blocks: the block of each step, in order.
        wanted: how many steps to choose where that many and no more are needed.

    Returns:
        Indices of steps, ascending.
    """
    chosen, position = set(), 0
    for _, visit in groupby(blocks):
        length = len(list(visit))
        chosen |= {position, position + length - 1}
        position += length
    while len(chosen) < min(wanted, len(blocks)):
        order = sorted(chosen)
        before, after = max(zip(order, order[1:], strict=False), key=lambda pair: pair[1] - pair[0])
        chosen.add((before + after) // 2)
    return sorted(chosen)


def _text_width(text: str, size: float = FONT) -> int:
    """Width in pixels."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer = RendererAgg(1, 1, DPI)
    return math.ceil(renderer.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0])


class _Sheet:
    """A figure measured in pixels from the top left corner."""

    def __init__(self, width: int, height: int):
        from matplotlib.figure import Figure

        if max(width, height) > _MAX_PIXELS:
            raise ValueError(
                f"the picture would have {width} x {height} pixels, and {_MAX_PIXELS} each way are possible: "
                "draw fewer images."
            )
        self.width, self.height = width, height
        self.figure = Figure((width / DPI, height / DPI), dpi=DPI, facecolor="white")

    def text(self, x: float, y: float, text: str, **settings: Any) -> None:
        settings = {"ha": "left", "va": "center", "fontsize": FONT, "parse_math": False} | settings
        self.figure.text(x / self.width, 1 - y / self.height, text, **settings)  # type: ignore[arg-type]

    def image(self, x: int, y: int, image: Tensor, scale: int) -> None:
        """image: uint8 [height, width, 3]."""
        image = image.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        self.figure.figimage(image.numpy(), xo=x, yo=self.height - y - image.shape[0])

    def band(self, x: int, y: int, width: int, height: int, color: str) -> None:
        from matplotlib.patches import Rectangle

        corner = x / self.width, 1 - (y + height) / self.height
        self.figure.add_artist(Rectangle(corner, width / self.width, height / self.height, color=color, lw=0))


def _to_rgb8(images: Tensor) -> Tensor:
    """[n, channels, height, width] in [0, 1] -> uint8 [n, height, width, 3]."""
    images = images.detach().float().cpu().clamp(0, 1).expand(-1, 3, -1, -1)
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _check_images(images: Any, what: str) -> None:
    good = isinstance(images, Tensor) and images.is_floating_point() and images.ndim == 4 and images.shape[1] in (1, 3)
    if not good or images.numel() == 0:
        given = f"{list(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"{what} is {given}; it must be a float tensor [samples, channels, height, width] with at least one sample "
            "and 1 or 3 channels (decode latents first)."
        )
    if not bool(torch.isfinite(images).all()):
        raise ValueError(f"{what} holds values that are not finite.")


def _enlargement(images: Tensor) -> int:
    return math.ceil(_CELL / max(images.shape[-2:]))
