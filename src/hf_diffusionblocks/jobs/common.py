"""What the commands of all families share."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import CONFIG_MAPPING

from .. import serialization
from ..config_checks import check_model_type
from ..configuration import read_config
from ..evaluation import format_figures
from ..merging import merge_run
from ..recipes.families import FAMILIES
from ..report import write_report
from ..retrying import chain, why_unreachable
from ..run_names import RECIPE_NAME, UPDATES_NAME, find_jobs
from ..streaming import stream_blocks
from ..training import DiffusionBlocksTrainer
from ..training.arguments import DiffusionBlocksTrainingArguments

Say = Callable[[str], None]
_PIPELINE = ("model_index.json", "transformer/config.json", "unet/config.json")  # what a DiT's pipeline has instead


def pick_device() -> torch.device:
    """The accelerator's device if there is one, else the CPU: where a command samples, scores and encodes."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def loading(block_streaming: str | None) -> contextlib.AbstractContextManager:
    """A context in which saved models are loaded whole; or block by block, which then rest in ``host`` or ``disk``."""
    return contextlib.nullcontext() if block_streaming is None else stream_blocks(block_streaming, device=pick_device())


def trainer_says(trainer: DiffusionBlocksTrainer, say: Say) -> Say:
    """What a process of a run prints: a group's leader speaks, and says for which blocks if there are other groups."""
    if not trainer.group.is_leader:
        return lambda line: None
    if trainer.group.size > 1:
        samples = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
        say(
            f"{trainer.group.size} processes share each of blocks {list(trainer.group.blocks)}: an update takes "
            f"{trainer.group.size} x {samples} samples"
        )
    if not trainer.is_job:
        return say
    named = f"[{trainer.output_dir.name}] "
    return lambda line: say("\n".join(named + part for part in line.split("\n")))


def merge_jobs(output: Path, summary: dict[str, Any], say: Say) -> Path | None:
    """The merged model of a run whose processes own different blocks, if this was the last one to end.

    Their logs are put together as well, and ``summary`` gets to know the updates of all blocks.
    """
    merged = merge_run(output, say)
    if merged is not None:
        say(f"all blocks are trained; merged in {merged}")
        logs = [path for job in find_jobs(output) if (path := job / UPDATES_NAME).is_file()]
        text = "".join(path.read_text(encoding="utf-8") for path in logs)
        serialization.atomic_write(output / UPDATES_NAME, lambda path: path.write_text(text, encoding="utf-8"))
        rows = [json.loads(line) for line in text.splitlines()]
        summary["updates_per_block"] = {
            row["block"]: row["update"] for row in sorted(rows, key=itemgetter("block", "update"))
        }
    return merged


def ends_the_run(model_dir: Path, output: Path) -> bool:
    """Whether this process is the one that reports on a run: the first of a group, or the one that merged its jobs."""
    if find_jobs(output):
        return model_dir.parent == output
    return os.environ.get("RANK", "0") == "0"


def say_report(directory: Path, say: Say) -> None:
    """Write a run's report and print where it is. The model is saved by then: a full disk is said, and no more."""
    try:
        say(f"report: {write_report(directory)}")
    except OSError as error:
        say(f"no report was written: {error}")


def planned(args: DiffusionBlocksTrainingArguments) -> dict[str, Any]:
    """The settings of a run that a plan of its memory depends on."""
    return {
        "batch_size": args.per_device_train_batch_size,
        "mixed_precision": args.mixed_precision,
        "use_ema": args.use_ema,
        "optim": args.optim,
        "optim_args": args.optim_args,
        "gradient_release": args.gradient_release,
    }


def check_model_path(name: str) -> None:
    """Raise a ``ValueError`` for what looks like a path and is no directory, before the Hub is asked for it.

    A Hub id has exactly one slash, ``user/model``; everything else is a path.
    """
    is_path = name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/")
    if not name or (is_path and not Path(name).is_dir()):
        raise ValueError(
            f"there is no directory {name}: give a saved model's directory, such as runs/digits-dit/model, or a Hub "
            "id, user/model."
        )
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in ("config.json", *_PIPELINE)):
        below = Path(name) / "model"
        hint = f"did you mean {below}?" if below.is_dir() else "give the directory that the model was saved in."
        raise ValueError(f"{name} holds no model, there is no config.json in it: {hint}")


def new_directory(path: str) -> Path:
    """A path that is no directory yet, or an empty one; otherwise a ``ValueError``."""
    target = Path(path)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty: give a new directory.")
    return target


def read_recipe_of(model_dir: str) -> dict[str, Any] | None:
    """The recipe that a saved model was trained with: in a merged model's directory, or beside a run's model.

    Raises:
        ValueError: if what lies there is no recipe.
    """
    places = (Path(model_dir), Path(model_dir).parent)
    path = next((place / RECIPE_NAME for place in places if (place / RECIPE_NAME).is_file()), None)
    if path is None:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        values = error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no recipe ({values!r:.80}): remove it, and name a recipe with --recipe.")
    return values


def family_of(name_or_path: str, **hub: Any) -> str:
    """The family of a model, blocked or not, by its ``config.json``; ``dit`` if it is none of transformers'.

    A directory or repository without a readable ``config.json`` counts as ``dit``, because a pipeline has none at its
    root; the loader says what is missing. What names no architecture counts as a causal language model.

    Raises:
        ValueError: for a ``model_type`` that is none, or a name of nothing.
        OSError: if the Hub cannot be reached, so that nothing is known of the model.
    """
    try:
        values, _ = read_config(name_or_path, **hub)
    except (OSError, ValueError) as error:
        if not Path(name_or_path).is_dir():
            _check_answer(name_or_path, error, hub)
        return "dit"
    if "model_type" not in values:
        return "dit"
    check_model_type(values["model_type"], f"config.json in {name_or_path}", CONFIG_MAPPING)
    for family, kind in FAMILIES.items():
        if values["model_type"] == kind.model_type:
            return family
    named = [name for name in values.get("architectures") or () if isinstance(name, str)]
    for family, kind in FAMILIES.items():
        if any(name.endswith(kind.bases) for name in named if kind.bases):
            return family
    return "causal_lm"


def _check_answer(name: str, error: Exception, hub: dict[str, Any]) -> None:
    """Return if the Hub, or what is cached of it, holds something of a name, though no ``config.json`` at its root."""
    causes = list(chain(error))
    nowhere = f"there is no directory {name}, and "
    if why_unreachable(error) or any(isinstance(e, LocalEntryNotFoundError) for e in causes):
        place = {key: hub[key] for key in ("cache_dir", "revision") if key in hub}
        if any(isinstance(try_to_load_from_cache(name, file, **place), str) for file in _PIPELINE):
            return
        if is_offline_mode():
            raise ValueError(f"{nowhere}no model of that name is cached; HF_HUB_OFFLINE is set, unset it.") from error
        raise OSError(f"{nowhere}the Hub cannot be reached to look for a model of that name.") from error
    if any(isinstance(e, (RepositoryNotFoundError, HFValidationError)) for e in causes):
        raise ValueError(
            f"{nowhere}no model of that name on the Hub that you may read: check the name; for a private or gated one "
            "log in with `hf auth login` or set HF_TOKEN."
        ) from error
    if any(isinstance(e, RevisionNotFoundError) for e in causes):
        raise ValueError(f"{name} has no revision {hub.get('revision')!r} on the Hub.") from error


def check_output(output: str | None) -> None:
    """Raise a ``ValueError`` for a file that cannot be written, before the work that it is for."""
    if output is not None and (Path(output).is_dir() or not Path(output).absolute().parent.is_dir()):
        raise ValueError(f"--output {output} is a directory, or in one that does not exist: give a new file.")


def say_figures(figures: dict[str, Any], output: str | None, say: Say) -> None:
    """Print a table of figures, and write them to a JSON file if one is named."""
    say(format_figures(figures))
    if output is not None:
        serialization.write_figures(Path(output), figures)
        say(f"written to {output}")


def say_where(pictures: Iterable[tuple[str, Path]], model_dir: Path, usage: Iterable[str], say: Say) -> None:
    """Print where a report's pictures and the model lie, and the lines that load it."""
    for what, path in pictures:
        say(f"{what + ':':<32}{path}")
    for line in ("", f"saved model: {model_dir}", "load it:", *(f"    {line}" for line in usage)):
        say(line)
