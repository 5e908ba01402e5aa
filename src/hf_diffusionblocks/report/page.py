"""The HTML of a run: the sections that its state fills, as a live page or as one file that needs nothing else."""

import base64
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..run_names import REPORT_NAME
from ..versions import versions
from .charts import block_class, loss_chart
from .run_state import Picture, RunReader, RunState

TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = ("progress", "losses", "blocks", "shares", "samples", "pictures", "figures", "settings", "usage")
STATES = {
    "waiting": "waiting for the run to begin",
    "training": "training",
    "quiet": "no news for a while: the run may have been killed; started again, it goes on from its last checkpoint",
    "stopped": "stopped early; the same command goes on from the last checkpoint",
    "finished": "finished",
    "unknown": "there are logs, but no word of the run's state",
}
PLACES = {"device": "On the device", "host": "In host memory", "disk": "On disk"}
Source = Callable[[Picture], str]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"value": format_value, "duration": format_duration, "number": lambda v: f"{v:.4g}"}
    environment.globals |= {"block_class": block_class, "STATES": STATES, "PLACES": PLACES, "loss_chart": loss_chart}
    return environment


def format_value(value: Any) -> str:
    """A figure or a setting as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(format_value(v) for v in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {format_value(v)}" for k, v in value.items()) or "none"
    return str(value)


def format_duration(seconds: float) -> str:
    """Seconds in the two largest units: ``42 s``, ``3 min 20 s``, ``5 h 07 min``, ``2 d 3 h``."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def announcement(run: RunState) -> str:
    """The state in words that change seldom, for those who have the page read to them: tenths of the run."""
    if run.state == "training" and run.done is not None and run.done >= 0.1:
        return f"training, past {percent_in_tens(run.done)} %"
    return STATES[run.state]


def percent_in_tens(done: float) -> int:
    """A share from 0 to 1 as percent, rounded down to tens."""
    return int(10 * done + 1e-9) * 10


def page_title(run: RunState, live: bool) -> str:
    """The document's title: how far a live run is, and its name."""
    if live and run.state == "training" and run.done is not None:
        return f"{100 * run.done:.0f} % - {run.name}"
    return f"{run.name} - {'waiting' if run.state == 'waiting' else run.state if live else 'report'}"


def sections(run: RunState, source: Source, live: bool) -> dict[str, str]:
    """The HTML of every section, empty where there is nothing to show."""
    template = _environment().get_template("sections.html")
    made = template.make_module({"run": run, "source": source, "live": live, "versions": versions()})
    return {name: str(getattr(made, name)()).strip() for name in SECTIONS}


def live_page(run: RunState, source: Source) -> str:
    """The page that ``watch`` serves; its script asks for the sections again and again."""
    return _page(run, source, live=True)


def report_page(run: RunState) -> str:
    """A report as one file: pictures and style inside, no script, nothing fetched from anywhere."""
    return _page(run, _inlined, live=False)


def _page(run: RunState, source: Source, live: bool) -> str:
    return (
        _environment()
        .get_template("page.html")
        .render(
            run=run,
            live=live,
            title=page_title(run, live),
            announcement=announcement(run),
            sections={name: Markup(html) for name, html in sections(run, source, live).items()},  # escaped when made
            style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
            written=time.strftime("%Y-%m-%d %H:%M %Z"),
        )
    )


def _inlined(picture: Picture) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.path.read_bytes()).decode("ascii")


def served_at(picture: Picture) -> str:
    """Where a live page finds a picture; changes when the picture does."""
    return f"file/{quote(picture.name)}?{picture.path.stat().st_mtime_ns}"


def write_report(directory: Path) -> Path:
    """Write ``report.html`` of a run in its directory, whole or not at all.

    Returns:
        Its path.

    Raises:
        OSError: if it cannot be written.
    """
    from .. import serialization  # imports torch, which a live page does without

    run = RunReader(directory).read()
    html, path = report_page(run), directory / REPORT_NAME
    serialization.atomic_write(path, lambda temporary: temporary.write_text(html, encoding="utf-8"))
    return path
