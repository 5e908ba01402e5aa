"""What a run's directory says: read while it grows, and whatever of it is there yet.

Nothing here is trusted: a log may end in half a line, a run may have been begun anew in between, and any JSON may hold
anything. What cannot be read counts as not there.
"""

import json
import math
import re
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..run_names import (
    EVALUATIONS_NAME,
    FIGURES_DIR,
    FIGURES_NAME,
    MODEL_DIR,
    RECIPE_NAME,
    REPORT_NAME,
    SAMPLES_DIR,
    STATUS_NAME,
    UPDATES_NAME,
    find_jobs,
)
from .shares import Shares, chosen_shares, finite

_MAX_JSON_BYTES = 4 << 20
_MAX_TEXT = 20_000  # characters of samples that a page shows
_MAX_PICTURE_BYTES = 8 << 20
_LAST = 50  # updates that a block's mean loss is of
PICTURES = {
    "samples": "Samples of the trained model",
    "denoising": "One batch on its way through the blocks",
    "partition": "The partition: training noise of each block",
    "memory": "Memory of a training step, by method",
    "losses": "Losses by block, and held-out losses",
    "bits": "Bits per character by block",
    "bound": "Share of each block in the likelihood bound",
}


@dataclass(frozen=True)
class Picture:
    """A picture of a run: its name in the run's directory, where it lies, and what it shows."""

    name: str
    path: Path
    alt: str


@dataclass
class Block:
    """A block of a run. ``place`` is ``device``, ``host``, ``disk``, or None where the run does not say."""

    block: int
    layers: list[int] = field(default_factory=list)
    noise: tuple[float, float] | None = None
    updates: int = 0
    of: int | None = None
    place: str | None = None
    device: str | None = None
    active: bool = False
    loss: float | None = None


@dataclass
class RunState:
    """A run as it is now. Times are seconds.

    Attributes:
        state: ``waiting`` (nothing is there yet), ``training``, ``quiet`` (it should have written by now), ``stopped``,
            ``finished``, or ``unknown`` (there are logs, but no status).
        losses: of each block, the number of each update and its loss.
        shares: the likelihood of the last evaluation by block, or what comes nearest; None before there is any.
        shared_out: whether the run's likelihood is a sum over blocks, which an evaluation measures.
    """

    directory: Path
    state: str = "waiting"
    iteration: int = 0
    iterations: int | None = None
    seconds: float | None = None
    left: float | None = None
    blocks: list[Block] = field(default_factory=list)
    losses: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict)
    shares: Shares | None = None
    shared_out: bool = False
    samples: list[Picture] = field(default_factory=list)
    text: str | None = None
    pictures: list[Picture] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    usage: str | None = None
    report: bool = False

    @property
    def name(self) -> str:
        """The recipe's name, and the directory's if it has another."""
        recipe, own = self.recipe.get("name"), self.directory.name
        return own if not isinstance(recipe, str) or recipe == own else f"{recipe} in {own}"

    @property
    def done(self) -> float | None:
        """How much of the run is done, from 0 to 1."""
        return min(1.0, self.iteration / self.iterations) if self.iterations else None


class UpdateLog:
    """The losses in an ``updates.jsonl``; reads only what was added since, or all again where it was replaced."""

    def __init__(self, path: Path):
        self.path = path
        self.losses: dict[int, tuple[list[int], list[float]]] = {}
        self._read: tuple[int, int] = (0, 0)  # inode, bytes

    def refresh(self) -> dict[int, tuple[list[int], list[float]]]:
        """The update numbers and losses of each block."""
        try:
            with open(self.path, "rb") as file:
                found = self.path.stat()
                inode, position = self._read
                if inode != found.st_ino or found.st_size < position:
                    self.losses, position = {}, 0
                file.seek(position)
                text = file.read()
        except OSError:
            self.losses, self._read = {}, (0, 0)
            return self.losses
        whole = text[: text.rfind(b"\n") + 1]
        self._read = (found.st_ino, position + len(whole))
        for line in whole.splitlines():
            self._add(line)
        return self.losses

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            block, update, loss = int(row["block"]), int(row["update"]), float(row["loss"])
        except (ValueError, TypeError, KeyError, OverflowError):
            return
        if block >= 0 and math.isfinite(loss):
            x, y = self.losses.setdefault(block, ([], []))
            x.append(update)
            y.append(loss)


class RunReader:
    """Reads a run's directory again and again; the directory need not be there yet."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._logs: dict[Path, UpdateLog] = {}

    def read(self, now: float | None = None) -> RunState:
        """The run as it is ``now`` (seconds since 1970; default: the clock)."""
        run, folder = RunState(self.directory), self.directory / FIGURES_DIR
        jobs = find_jobs(self.directory) if self.directory.is_dir() else []
        run.losses = self._losses(jobs)
        run.recipe = read_object(self.directory / RECIPE_NAME)
        run.figures = read_object(folder / FIGURES_NAME)
        _take_status(run, [self.directory, *jobs], time.time() if now is None else now)
        _complete_blocks(run)
        run.shares = chosen_shares(run.figures, self.directory / EVALUATIONS_NAME)
        pictures = _pictures(self.directory, FIGURES_DIR)
        final = [p for p in pictures if Path(p.name).stem == "samples"]
        run.samples = final or _pictures(self.directory, SAMPLES_DIR)[-1:]
        run.pictures = [p for p in pictures if p not in run.samples]
        run.text = _read_text(folder / "samples.txt", _MAX_TEXT)
        run.usage = _usage(self.directory / MODEL_DIR / "README.md")
        run.report = (self.directory / REPORT_NAME).is_file()
        return run

    def pictures(self) -> dict[str, Picture]:
        """The run's pictures by name."""
        return {p.name: p for folder in (SAMPLES_DIR, FIGURES_DIR) for p in _pictures(self.directory, folder)}

    def _losses(self, jobs: list[Path]) -> dict[int, tuple[list[int], list[float]]]:
        own = self._log(self.directory / UPDATES_NAME).refresh()
        if own or not jobs:
            return own
        return {b: points for job in jobs for b, points in self._log(job / UPDATES_NAME).refresh().items()}

    def _log(self, path: Path) -> UpdateLog:
        return self._logs.setdefault(path, UpdateLog(path))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= _MAX_JSON_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _take_status(run: RunState, directories: list[Path], now: float) -> None:
    """What the trainers say of themselves: one, or one per process of the run."""
    statuses = [status for path in directories if (status := read_object(path / STATUS_NAME))]
    if not statuses:
        run.iteration = sum(len(x) for x, _ in run.losses.values())
        run.state = "finished" if run.figures else ("unknown" if run.losses else "waiting")
        return
    states, lefts, seconds = [], [], []
    for status in statuses:
        pace = finite(status.get("seconds_per_update")) or 0.0
        todo = (finite(status.get("iterations")) or 0) - (finite(status.get("iteration")) or 0)
        run.iteration += int(finite(status.get("iteration")) or 0)
        run.iterations = (run.iterations or 0) + int(finite(status.get("iterations")) or 0)
        state = status.get("state")
        silent = now - (finite(status.get("updated")) or 0.0)
        if state == "training":
            if silent > max(120.0, 5 * pace * (finite(status.get("logging_steps")) or 1)):
                state = "quiet"
            elif pace:
                lefts.append(max(0.0, todo * pace - silent))
        states.append(state if state in ("training", "quiet", "stopped", "finished") else "unknown")
        seconds.append((finite(status.get("seconds")) or 0.0) + (silent if state == "training" else 0.0))
        run.blocks += _status_blocks(status, state == "training")
    run.shared_out = any(status.get("likelihood_shares") is True for status in statuses)
    run.state = next((s for s in ("training", "quiet", "stopped", "unknown") if s in states), "finished")
    run.seconds = max(seconds)
    run.left = max(lefts) if lefts and run.state == "training" else None


def _status_blocks(status: dict[str, Any], training: bool) -> list[Block]:
    found, rows = [], status.get("blocks")
    for row in rows if isinstance(rows, list) else []:
        try:
            low, high = (float(v) for v in row["range"])
            block = Block(int(row["block"]), [int(i) for i in row["layers"]], (low, high), int(row["updates"]))
            block.of = int(row["of"])
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
            continue
        if training:
            block.place = row.get("place") if row.get("place") in ("device", "host", "disk") else None
            block.device, block.active = str(status.get("device")), status.get("active") == block.block
        found.append(block)
    return found


def _complete_blocks(run: RunState) -> None:
    """Give each block its loss, and the blocks of a log without a status a row."""
    known = {block.block: block for block in run.blocks}
    for number, (x, y) in run.losses.items():
        block = known.setdefault(number, Block(number))
        block.updates, block.loss = max(block.updates, x[-1]), statistics.fmean(y[-_LAST:])
    run.blocks = [known[number] for number in sorted(known)]


def _pictures(directory: Path, folder: str) -> list[Picture]:
    """The PNG files in a folder of a run, by name; links out of the run are left alone."""
    found = []
    try:
        paths = sorted((directory / folder).glob("*.png"))
        inside = directory.resolve()
        for path in paths:
            if path.resolve().is_relative_to(inside) and path.stat().st_size <= _MAX_PICTURE_BYTES:
                alt = PICTURES.get(path.stem, path.stem.replace("-", " ").replace("_", " "))
                found.append(
                    Picture(f"{folder}/{path.name}", path, alt if folder == FIGURES_DIR else f"Samples, {alt}")
                )
    except OSError:
        return found
    return found


def _read_text(path: Path, limit: int) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read(limit + 1)
    except OSError:
        return None
    return text if len(text) <= limit else text[:limit] + "\n[...]"


def _usage(card: Path) -> str | None:
    """The lines that load the model: the first Python of its card."""
    found = re.search(r"```python\n(.*?)```", _read_text(card, 100_000) or "", flags=re.DOTALL)
    return found.group(1).strip() if found else None
