"""Tables and the chart of rivals_memory.py, from its rows."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from _rivals_ways import BLOCKS, DTYPES, JOB, LAYERS, WAYS, WHOLE, make_config

from hf_diffusionblocks.figures.style import BLOCK_COLORS, axes_figure, plot_style, text_color
from hf_diffusionblocks.memory import plan_memory
from hf_diffusionblocks.memory_alternatives import WHOLE as WHOLE_MODEL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
MIB = 2**20
KINDS = {"weights": "weights", "gradients": "gradients", "moments": "moments", "activations": "activations"}
KINDS |= {"next": "next block", "home": "other blocks, at rest"}
NAMES = {"bfloat16": "bf16 weights", "float32": "float32 weights"}


def ordered(rows: Iterable[Row], dtype: str) -> list[Row]:
    """The rows of a type of weights, in the order of ``WAYS``."""
    places = [(way.name, scope) for way in WAYS.values() for scope in way.scopes]
    found = {(r["way"], r["scope"]): r for r in rows if r["dtype"] == dtype}
    return [found[place] for place in places if place in found]


def occupied(row: Row) -> int:
    """The peak without the blocks at rest in host memory, which a GPU would not hold."""
    return row["peak"] - row["home"]


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A markdown table."""
    head = list(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def table(rows: list[Row]) -> str:
    """One table per type of weights, in MiB, and what follows from it."""
    parts = []
    for dtype in reversed(DTYPES):
        mine = ordered(rows, dtype)
        if not mine:
            continue
        first = next((r for r in mine if (r["way"], r["scope"]) == ("AdamW", WHOLE)), None)
        lines = [
            [
                row["way"],
                row["scope"],
                *(f"{row[kind] / MIB:.1f}" for kind in ("weights", "gradients", "moments", "activations", "next")),
                f"{row['total'] / MIB:.1f}",
                f"{row['total'] / row['parameters']:.2f}",
                f"{occupied(row) / MIB:.1f}" + (f" (+ {row['home'] / MIB:.1f})" if row["home"] else ""),
                f"{occupied(row) / row['parameters']:.2f}",
                f"{occupied(row) / occupied(first):.3f}" if first else "",
                f"{row['seconds']:.2f}",
            ]
            for row in mine
        ]
        head = ["way", NAMES[dtype], "weights", "gradients", "moments", "activations", "next block", "counted"]
        head += ["bytes per parameter", "OS peak", "peak per parameter", "peak over AdamW end to end", "s per update"]
        parts += [markdown(head, lines), conclusion(mine)]
    return "\n\n".join(parts)


def conclusion(rows: list[Row]) -> str:
    """The least of all, and where another method needs less than blocks."""
    least = min(rows, key=occupied)
    sentences = [
        f"Least: {name_of(least)}, {least['total'] / least['parameters']:.2f} bytes per parameter of the whole model "
        f"counted, {occupied(least) / least['parameters']:.2f} by the operating system's peak."
    ]
    job = next((r for r in rows if (r["way"], r["scope"]) == ("AdamW", JOB)), None)
    if job is not None:
        below = [r["way"] for r in rows if r["scope"] == WHOLE and occupied(r) < occupied(job)]
        sentences.append(f"End to end, with less than a block's plain AdamW: {'; '.join(below) or 'none'}.")
    both = {r["way"]: occupied(r) for r in rows if r["scope"] == WHOLE}
    worse = [r["way"] for r in rows if r["scope"] == JOB and occupied(r) >= both.get(r["way"], float("inf"))]
    sentences.append(f"Ways that need no less with one block: {'; '.join(worse) or 'none'}.")
    return " ".join(sentences)


def name_of(row: Row) -> str:
    """A way and what it holds."""
    return f"{row['way']}, {row['scope']}"


def planned(rows: list[Row]) -> Iterator[tuple[Row, Any]]:
    """Each row with what ``plan_memory`` says of it among the alternatives, if it does."""
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        mine = ordered(rows, dtype)
        config = make_config(mine[0]["width"], LAYERS, BLOCKS)
        plan = plan_memory(config, batch_size=mine[0]["batch"], dtype=DTYPES[dtype], use_ema=False, device="cpu")
        known = {row.name: row for row in plan.alternatives.rows}
        for row in mine:
            way = WAYS[row["way"]]
            job = {WHOLE: WHOLE_MODEL, JOB: f"one of {BLOCKS} blocks"}.get(row["scope"])
            found = known.get(f"{way.planned}{', checkpointing' * way.checkpointing}, {job}")
            if found is not None:
                yield row, found


def against_plan(rows: list[Row]) -> str:
    """What a plan says of each way, over what was counted."""
    lines = [
        [
            NAMES[row["dtype"]],
            name_of(row),
            *(f"{getattr(plan, kind) / MIB:.1f} / {row[kind] / MIB:.1f}" for kind in list(KINDS)[:4]),
            f"{plan.total / MIB:.1f} / {row['total'] / MIB:.1f}",
            f"{plan.total / row['total']:.3f}",
        ]
        for row, plan in planned(rows)
    ]
    head = ["weights are", "way", *list(KINDS)[:4], "total", "planned over counted"]
    return "MiB, planned / counted.\n\n" + markdown(head, lines)


# -- chart -----------------------------------------------------------------------------------------------------------


def chart(rows: list[Row]) -> "Figure":
    """Stacked bars of what was counted, in bytes per parameter of the whole model; a diamond is the system's peak."""
    kinds = [name for name in DTYPES if any(row["dtype"] == name for row in rows)][::-1]
    most = max(len(ordered(rows, dtype)) for dtype in kinds)
    with plot_style():
        figure, axes = axes_figure(6.6 * len(kinds), 0.27 * most + 1.2, ncols=len(kinds), squeeze=False)
        for axis, dtype in zip(axes[0], kinds, strict=True):
            _panel(axis, ordered(rows, dtype), NAMES[dtype])
    return figure


def _panel(axis: Any, rows: list[Row], title: str) -> None:
    """One type of weights; the kinds are named above the first bar, and in the first bar that has the others."""
    colors = dict(zip(KINDS, (*(BLOCK_COLORS[i] for i in (0, 1, 2, 4)), "#8C8C8C", "#DDDDDD"), strict=True))
    place, places, unnamed = 0.0, [], {"next", "home"}
    for i, row in enumerate(rows):
        place += 1.0 if i == 0 or row["way"] == rows[i - 1]["way"] else 1.35
        places.append(place)
        left, count = 0.0, row["parameters"]
        for kind, label in KINDS.items():
            size = row[kind] / count
            axis.barh(place, size, left=left, height=0.82, color=colors[kind])
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
            if i == 0 and size:
                axis.text(left + size / 2, place - 0.75, label, **style)
            elif size and kind in unnamed:
                unnamed.remove(kind)
                axis.text(left + size / 2, place, label, color=text_color(colors[kind]), **style)
            left += size
        peak = row["peak"] / count
        axis.plot(peak, place, "D", color="black", markersize=3.5, zorder=3)
        axis.text(max(left, peak), place, f"  {row['total'] / count:.2f}", va="center", fontsize=7.5)
    names = [f"{row['way']}, {row['scope']}" if row["scope"] == WHOLE else row["scope"] for row in rows]
    axis.set_yticks(places, names, fontsize=7.5)
    axis.set_ylim(places[-1] + 0.8, places[0] - 1.2)
    axis.axvline(2, color="black", linewidth=0.8, linestyle=":")
    axis.grid(axis="y", visible=False)
    axis.set_xlim(0, 1.12 * max(max(row["peak"], row["total"] + row["home"]) / row["parameters"] for row in rows))
    axis.set_xlabel(
        "bytes per parameter of the whole model\nbars, number: counted; diamond: peak of the process", fontsize=8
    )
    axis.set_title(title)


__all__ = ["against_plan", "chart", "conclusion", "ordered", "planned", "table"]
