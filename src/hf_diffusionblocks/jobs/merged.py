"""``diffusionblocks merge``: one model out of jobs, with the recipe and the card that belong to it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import serialization
from ..agreement import first_difference
from ..merging import Part, merge_blocks, whole_part
from ..recipes import make_recipe
from ..report.run_state import read_object
from ..repository.block_table import CARD_NAME
from ..run_names import FIGURES_DIR, FIGURES_NAME, RECIPE_NAME
from .common import Say, read_recipe_of
from .run import Run, described

_OF_THE_JOB = ("output_dir", "disable_tqdm", "residency")  # training settings in which the jobs of one model may differ


def merge(
    directories: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    runs: dict[str, type[Run]],
    *,
    wait: float | int = 0,
    dry_run: bool = False,
    say: Say = print,
) -> Path:
    """Merge blocks as ``merge_blocks`` does; the model keeps the recipe of its jobs, and has a card of its own.

    Args:
        directories: of the jobs, or of the models that they saved.
        output_dir: a new or empty directory.
        runs: the class of each kind of job, which writes the cards of its models.
        wait: seconds to wait for directories or blocks that are not there yet.
        dry_run: check everything and write nothing.
        say: prints.

    Returns:
        The output directory.

    Raises:
        ValueError: as ``merge_blocks`` does.
    """
    name = Path(output_dir).resolve().name

    def finish(directory: Path, parts: list[Part]) -> None:
        try:
            values = _recipe_of(parts, say)
            if values is None:
                say("no recipe lies beside the parts: name one with --recipe to evaluate the merged model.")
                return
            _write_card(directory, values, parts, runs, name)
            serialization.write_json(directory / RECIPE_NAME, values)
        except ValueError as error:  # the weights are whole; what describes them is not worth losing them
            say(f"the merged model gets no recipe: {error}")

    return merge_blocks(directories, output_dir, wait=wait, dry_run=dry_run, say=say, finish=finish)


def _recipe_of(parts: list[Part], say: Say) -> dict[str, Any] | None:
    """The recipe of the jobs, without what was of one job only; the first one's where they differ, which is said."""
    first: dict[str, Any] | None = None
    holder: Path | None = None
    for part in parts:
        values = read_recipe_of(str(part.directory))
        if values is None:
            continue
        training = values.get("training")
        if isinstance(training, dict):
            values["training"] = {key: value for key, value in training.items() if key not in _OF_THE_JOB}
        if first is None:
            first, holder = values, part.directory
        elif (difference := first_difference(first, values, sorted(first.keys() | values.keys()))) is not None:
            key, theirs, ours = difference
            say(
                f"the recipes of {holder} and {part.directory} differ: {key} is {theirs!r} and {ours!r}. "
                "The first one is kept."
            )
    return first


def _write_card(
    directory: Path, values: dict[str, Any], parts: list[Part], runs: dict[str, type[Run]], name: str
) -> None:
    """The card of the merged model, with the figures of a part that is the same model; that part's if it has none."""
    whole = whole_part(parts)
    figures = {} if whole is None else read_object(whole.directory.parent / FIGURES_DIR / FIGURES_NAME)
    if not figures and (directory / CARD_NAME).is_file():
        return  # of the part that is the same model
    recipe = make_recipe(values, [f"training.output_dir={json.dumps(name)}"])
    made_by = tuple(dict.fromkeys(part.directory.parent for part in parts))
    runs[recipe.kind.job](recipe).write_card(described(directory), directory, figures, runs=made_by)


__all__ = ["merge"]
