"""What the commands of all families share."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..streaming import stream_blocks
from ..training.arguments import DiffusionBlocksTrainingArguments

MODEL_DIR = "model"
FIGURES_DIR = "figures"
RECIPE_NAME = "recipe.json"
FIGURES_NAME = "figures.json"

Say = Callable[[str], None]


def pick_device() -> torch.device:
    """The accelerator's device if there is one, else the CPU: where a command samples, scores and encodes."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def loading(block_streaming: str | None) -> contextlib.AbstractContextManager:
    """A context in which saved models are loaded whole; or block by block, which then rest in ``host`` or ``disk``."""
    return contextlib.nullcontext() if block_streaming is None else stream_blocks(block_streaming, device=pick_device())


def planned(args: DiffusionBlocksTrainingArguments) -> dict[str, Any]:
    """The settings of a run that a plan of its memory depends on."""
    return {
        "batch_size": args.per_device_train_batch_size,
        "mixed_precision": args.mixed_precision,
        "use_ema": args.use_ema,
        "optim": args.optim,
        "gradient_release": args.gradient_release,
    }


def check_model_path(name: str) -> None:
    """Raise a ``ValueError`` for what looks like a path and is no directory, before the Hub is asked for it.

    A Hub id has exactly one slash, ``user/model``; everything else is a path.
    """
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/")):
        raise ValueError(
            f"there is no directory {name}: give a saved model's directory, such as runs/digits-dit/model, or a Hub "
            "id, user/model."
        )


def new_directory(path: str) -> Path:
    """A path that is no directory yet, or an empty one; otherwise a ``ValueError``."""
    target = Path(path)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty: give a new directory.")
    return target


def read_recipe_of(model_dir: str) -> dict[str, Any] | None:
    """The recipe that a saved model was trained with, if it lies beside it."""
    path = Path(model_dir).parent / RECIPE_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def family_of(name_or_path: str) -> str:
    """``causal_lm`` for a language model, blocked or not, by its ``config.json``; else ``dit``.

    What cannot be read counts as ``dit``, whose loader says what is missing.
    """
    try:
        values, _ = PreTrainedConfig.get_config_dict(name_or_path)
    except (OSError, ValueError):
        return "dit"
    kind = values.get("model_type")
    return "dit" if kind in (None, "blocked_dit") else "causal_lm"
