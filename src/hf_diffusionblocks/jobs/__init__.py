"""What each command does, as functions: the command line parses and calls these.

``plan``, ``train``, ``evaluate`` and ``convert`` are for all families; the other modules have each family's own.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..families.base_loading import LOADING, hub_settings
from ..recipes import Recipe, make_recipe
from ..recipes.families import FAMILIES
from ..run_names import FIGURES_DIR, FIGURES_NAME, MODEL_DIR, RECIPE_NAME
from ..serialization import read_json
from ..suggest import unknown_name
from . import classification, images, masked_text, text
from .bases import family_for, preview, refusals_name_the_families
from .cascade_jobs import check_planned_job
from .classification import ClassifierRun
from .common import (
    Say,
    check_model_path,
    check_output,
    ends_the_run,
    family_of,
    new_directory,
    pick_device,
    read_recipe_of,
    say_report,
)
from .dry_checks import check_data
from .images import ImageRun, build_trainer, load_data, sample
from .masked_text import MaskedTextRun, sample_masked
from .merged import merge as merge_jobs
from .run import Run
from .text import CausalTextRun, sample_text

JOBS: dict[str, ModuleType] = {
    "images": images,
    "classification": classification,
    "masked_text": masked_text,
    "text": text,
}
RUNS: dict[str, type[Run]] = {
    "images": ImageRun,
    "classification": ClassifierRun,
    "masked_text": MaskedTextRun,
    "text": CausalTextRun,
}


def _of(family: str) -> ModuleType:
    return JOBS[FAMILIES[family].job]


def plan(
    recipe: Recipe,
    say: Say = print,
    short: bool = False,
    *,
    blocks: list[int] | None = None,
    lower: str | None = None,
    report: bool = True,
) -> dict[str, Any]:
    """``diffusionblocks plan``: the partition, parameters by block and what a training step holds in memory.

    Args:
        recipe: of the run.
        say: prints.
        short: for a dry run: print what fits on a screen (the figures that are returned are all of them), and refuse
            what ``train`` would refuse. Of the data that is seen where they are small and on this machine.
        blocks: of a job that is to train these only.
        lower: of a cascade's job, the directory of a model that holds the trained blocks below.
        report: whether the run of a dry run is to draw and score at the end.

    Raises:
        ValueError: for a job, or data, that ``train`` refuses.
    """
    _check_lower(recipe, lower, blocks)
    planned = _of(recipe.family).plan(recipe)
    if short or blocks is not None or lower is not None:
        check_planned_job(planned.model, planned.recipe.training_arguments(), blocks, lower)
    lines = planned.short_lines() if short else planned.lines()
    if short:
        run = RUNS[recipe.kind.job](recipe, blocks=blocks, lower=lower, report=report, say=say)
        lines += check_data(run, planned.model)
    for line in lines:
        say(line)
    return planned.to_dict()


def train(
    recipe: Recipe,
    *,
    blocks: list[int] | None = None,
    lower: str | None = None,
    resume: bool = True,
    report: bool = True,
    say: Say = print,
    command: str | None = None,
) -> Path:
    """``diffusionblocks train``: train, save the model, and (unless told otherwise) draw and score it.

    Args:
        recipe: of the run.
        blocks: hold and train these only.
        lower: for a block of a cascade, the directory of a model that holds the trained blocks below it.
        resume: go on from the last checkpoint.
        report: draw and score at the end, and write a report.
        say: prints.
        command: that began the run, for the model's card.

    Returns:
        The directory of the saved model.
    """
    _check_lower(recipe, lower, blocks)
    run = RUNS[recipe.kind.job](recipe, blocks=blocks, lower=lower, report=report, say=say, command=command)
    model_dir = run.train(resume)
    if report and ends_the_run(model_dir, Path(recipe.training_arguments().output_dir)):
        say_report(model_dir.parent, say)
    return model_dir


def _check_lower(recipe: Recipe, lower: str | None, blocks: list[int] | None) -> None:
    if lower is not None and not recipe.kind.cascades:
        raise ValueError(
            f"--lower {lower} is for a cascade: the blocks of family {recipe.family!r} stand alone. Leave it out."
        )
    if lower is not None and blocks:
        check_model_path(lower)


def card(run_dir: str, output: str | None = None, say: Say = print) -> Path:
    """``diffusionblocks card``: write the model card of a finished run anew, from the run's own files.

    Args:
        run_dir: the run's directory.
        output: a Markdown file; by default the model's own card.
        say: prints.

    Raises:
        ValueError: for a directory that holds no finished run.
    """
    run, model_dir = Path(run_dir), Path(run_dir) / MODEL_DIR
    values = read_recipe_of(str(model_dir)) if (model_dir / "config.json").is_file() else None
    if values is None:
        raise ValueError(f"{run} holds no finished run ({RECIPE_NAME}, {MODEL_DIR}/): name the directory of one.")
    recipe = make_recipe(values, [f"training.output_dir={json.dumps(str(run))}"])
    path = Path(output or model_dir / "README.md")
    if path.suffix != ".md":
        raise ValueError(f"--output {path} must end in .md: a card is Markdown.")
    check_output(output)
    figures = run / FIGURES_DIR / FIGURES_NAME
    model = recipe.kind.model_class.from_pretrained(model_dir)
    known = read_json(figures) if figures.is_file() else {}
    RUNS[recipe.kind.job](recipe).write_card(model, model_dir, known, path)
    say(f"model card: {path}")
    return path


def merge(
    directories: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    *,
    wait: float | int = 0,
    dry_run: bool = False,
    say: Say = print,
) -> Path:
    """``diffusionblocks merge``: ``merge_blocks``; the merged model keeps the jobs' recipe and gets a card.

    Args:
        directories: of the jobs, or of the models that they saved.
        output_dir: a new or empty directory.
        wait: seconds to wait for directories or blocks that are not there yet.
        dry_run: check everything and write nothing.
        say: prints.
    """
    return merge_jobs(directories, output_dir, RUNS, wait=wait, dry_run=dry_run, say=say)


def next_command(recipe: Recipe, model_dir: Path) -> str:
    """What to try with a model that a recipe has just trained."""
    if recipe.kind.job == "classification":
        return f"diffusionblocks evaluate {model_dir}"
    if recipe.kind.has_text:
        return f'diffusionblocks sample {model_dir} --prompt "{recipe.sampling.prompts[0]}"'
    return f"diffusionblocks sample {model_dir} --per-class 4"


def evaluate(
    model_dir: str, recipe: Recipe, output: str | None = None, seed: int = 0, say: Say = print
) -> dict[str, Any]:
    """``diffusionblocks evaluate``: the table of figures of a saved model on a recipe's data."""
    check_model_path(model_dir)
    family = family_of(model_dir)
    if FAMILIES[family].job != recipe.kind.job:
        raise ValueError(
            f"{model_dir} is a model of family {family!r}, recipe {recipe.name!r} is for family {recipe.family!r}: "
            f"name the recipe that it was trained with, such as --recipe {FAMILIES[family].example}."
        )
    return _of(recipe.family).evaluate(model_dir, recipe, output, seed, say)


def convert(
    base: str,
    output_dir: str,
    settings: dict[str, Any],
    say: Say = print,
    *,
    family: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """``diffusionblocks convert``: cut a pretrained model into blocks and save it; returns what ``--json`` prints.

    Args:
        base: directory or Hub id of a pretrained model.
        output_dir: a new directory.
        settings: fields of the blocked model's config, and how to load the base.
        say: prints.
        family: where the base may be cut in more than one way, as a decoder into a recurrent core.
        dry_run: say what would be written, and load no weight.
    """
    if (base.startswith((".", "/", "~")) or base.count("/") > 1) and not Path(base).is_dir():
        raise ValueError(f"there is no directory {base}: give a pretrained model's directory or its id on the Hub.")
    family = family_for(base, family, **hub_settings(settings))
    allowed = FAMILIES[family].block_fields | {*LOADING}
    for name in settings:
        if name not in allowed:
            raise ValueError(unknown_name("setting", name, allowed))
    new_directory(output_dir)
    with refusals_name_the_families():
        if dry_run:
            return preview(base, output_dir, family, settings, say)
        kind = FAMILIES[family].model_class
        return {"model": str(_of(family).convert(base, output_dir, settings, say, kind=kind)), "family": family}


def encode(recipe: Recipe, output_dir: str, split: str, batch_size: int = 32, say: Say = print) -> Path:
    """``diffusionblocks encode``: VAE latents of a recipe's images, for training on them."""
    if recipe.kind.job != "images":
        raise ValueError(f"recipe {recipe.name!r} is of family {recipe.family!r}: it has no images to encode.")
    return images.encode(recipe, output_dir, split, batch_size, say)


__all__ = [
    "build_trainer",
    "card",
    "check_model_path",
    "convert",
    "encode",
    "evaluate",
    "family_of",
    "load_data",
    "merge",
    "next_command",
    "pick_device",
    "plan",
    "read_recipe_of",
    "sample",
    "sample_masked",
    "sample_text",
    "train",
]
