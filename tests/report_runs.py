"""Directories of runs for the tests of reports and of ``watch``."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from hf_diffusionblocks.report import RunServer

NASTY = '<script>alert(1)</script><img src=x onerror="alert(2)">&"\'' + "w" * 90


def row(block: int, update: int, loss: float) -> str:
    return json.dumps({"block": block, "update": update, "loss": loss, "grad_norm": 1.0, "iteration": update}) + "\n"


def write_status(directory: Path, **values: Any) -> None:
    blocks = [
        {"block": b, "layers": [b], "range": [0.1 * b, 1.0 + b], "updates": 4, "of": 10, "place": place}
        for b, place in enumerate(("device", "host", "disk"))
    ]
    status = {"state": "training", "iteration": 12, "iterations": 30, "seconds": 24.0, "seconds_per_update": 2.0}
    status |= {"logging_steps": 1, "updated": 1000.0, "device": "cpu", "active": 0, "blocks": blocks}
    (directory / "status.json").write_text(json.dumps(status | values))


def make_run(directory: Path, name: str = "a-recipe", word: str = "plain") -> Path:
    """A finished run, with ``name`` and ``word`` wherever a run's files hold what someone else wrote."""
    (directory / "figures").mkdir(parents=True)
    (directory / "samples").mkdir()
    (directory / "model").mkdir()
    (directory / "updates.jsonl").write_text("".join(row(i % 2, i // 2 + 1, 2.0 - i / 50) for i in range(80)))
    figures = {"bound_bits_per_character_per_block": [1.0, 3.0], "accuracy": 0.5, word: word, "nested": {word: word}}
    (directory / "figures" / "figures.json").write_text(json.dumps(figures))
    recipe = {"name": name, "family": "dit", "training": {"max_steps": 40, word: word}}
    (directory / "recipe.json").write_text(json.dumps(recipe))
    (directory / "figures" / "samples.txt").write_text(f"Once {word}")
    (directory / "model" / "README.md").write_text(f"# Card\n\n```python\nload({word!r})\n```\n")
    for path in ("figures/losses.png", "samples/iteration-01.png", f"figures/{word.replace('/', '_')}.png"):
        Image.new("RGB", (900, 40), (0, 90, 180)).save(directory / path)
    return directory


@contextmanager
def serving(directory: Path) -> Iterator[RunServer]:
    with RunServer(directory) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
