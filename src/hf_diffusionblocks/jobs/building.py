"""From a recipe and its data to a trainer: what is the same for all families."""

from collections.abc import Callable
from typing import Any

import torch

from ..data import ImageDataset
from ..modeling import BlockedPreTrainedModel
from ..recipes import Recipe
from ..training import DiffusionBlocksTrainer
from ..training.arguments import DiffusionBlocksTrainingArguments
from ..training.residency import construction
from .cascade_jobs import held_blocks, how_to_mend


def make_trainer(
    recipe: Recipe,
    train: Any,
    held_out: Any | None,
    *,
    prepare: Callable[[BlockedPreTrainedModel], None],
    load_teacher: Callable[[DiffusionBlocksTrainingArguments], Any],
    tokenizer: Any = None,
    blocks: list[int] | None = None,
    lower: str | None = None,
    callbacks: list[Any] | None = None,
) -> DiffusionBlocksTrainer:
    """The trainer of a recipe. The model's initial weights follow from the training seed.

    Args:
        recipe: with its method resolved.
        train: rows.
        held_out: rows, or None.
        prepare: checks the new model against the data, and completes it.
        load_teacher: the network to distil from, or None, by the training arguments.
        tokenizer: of a language model's rows.
        blocks: train these only. A cascade's job also holds the blocks below them, which it runs forward.
        lower: directory of a saved model with the trained blocks below.
        callbacks: of the trainer.

    Raises:
        ValueError: for data that do not fit the model, or a job that cannot be.
    """
    args = recipe.training_arguments()
    held = held_blocks(recipe.config(tokenizer=tokenizer), args, blocks, lower)
    with torch.random.fork_rng(devices=[]), construction(args):
        torch.manual_seed(args.seed)
        model = recipe.build_model(held, tokenizer)
    prepare(model)
    teacher = load_teacher(args)
    try:
        return DiffusionBlocksTrainer(model, args, train, held_out, teacher=teacher, callbacks=callbacks)
    except ValueError as error:
        if blocks is not None:
            raise ValueError(f"{error}{how_to_mend(str(error), blocks)}") from error
        raise


def base_to_distil(recipe: Recipe) -> Any:
    """``model.base`` of a recipe that distils from it; without one, a ``ValueError``."""
    if "base" not in recipe.model:
        raise ValueError("training.distillation_weight needs model.base, the pretrained network to distil from.")
    return recipe.model["base"]


def name_classes(model: BlockedPreTrainedModel, data: ImageDataset) -> None:
    """Give a model the names of the data's classes, if it has as many."""
    if data.class_names and len(data.class_names) == model.config.num_classes:
        model.config.id2label = dict(enumerate(data.class_names))
        model.config.label2id = {name: i for i, name in enumerate(data.class_names)}


def check_classes(data: ImageDataset, num_classes: int, labels: str, setting: str) -> None:
    """Raise a ``ValueError`` for data with more classes than the model has.

    Args:
        data: images.
        num_classes: of the model.
        labels: what the model calls them.
        setting: of the recipe, to mend it.
    """
    if data.num_classes > num_classes:
        raise ValueError(
            f"the data have {data.num_classes} classes and the model {num_classes} ({labels} 0 to {num_classes - 1}): "
            f"set {setting}={data.num_classes}."
        )
