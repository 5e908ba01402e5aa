"""What each command does with image classifiers."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification, PreTrainedConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from .. import serialization
from ..baselines.end_to_end import resolve_method
from ..data import ImageDataset
from ..evaluation import format_figures, score_classifier
from ..families.base_loading import hub_settings
from ..families.image_classification import BlockedForImageClassification, BlockedImageClassificationConfig
from ..hub import model_card, write_model_card
from ..memory import plan_memory
from ..modeling import format_block_parameters
from ..recipes import Recipe
from ..training import DiffusionBlocksTrainer
from ..training.checkpoint import find_checkpoints
from ..training.residency import construction
from .cascade_jobs import held_blocks, how_to_mend, take_lower_blocks
from .common import (
    FIGURES_DIR,
    FIGURES_NAME,
    MODEL_DIR,
    RECIPE_NAME,
    Say,
    check_output,
    merge_jobs,
    new_directory,
    pick_device,
    planned,
    say_figures,
    say_where,
    trainer_says,
)
from .image_advice import image_advice
from .image_pieces import load_data


def plan(recipe: Recipe, say: Say = print) -> dict[str, Any]:
    """``diffusionblocks plan``: parameters by block, memory and compute."""
    recipe = resolve_method(recipe)
    config, args = recipe.config(), recipe.training_arguments()
    table = plan_memory(config, **planned(args))
    lines, advised = image_advice(recipe, config, args)
    with torch.device("meta"):
        model = BlockedForImageClassification(config)
    for line in (format_block_parameters(model), "", str(table), "", *lines):
        say(line)
    return table.to_dict() | advised


def build_trainer(
    recipe: Recipe,
    train: ImageDataset,
    held_out: ImageDataset | None,
    *,
    blocks: list[int] | None = None,
    lower: str | None = None,
    callbacks: list[Any] | None = None,
) -> DiffusionBlocksTrainer:
    """The trainer of a classifier's recipe. The model's initial weights follow from the training seed.

    Args:
        recipe: with its method resolved.
        train: images.
        held_out: images, or None.
        blocks: train these only. A cascade's job also holds the blocks below them, which it runs forward.
        lower: directory of a saved model with the trained blocks below.
        callbacks: of the trainer.

    Raises:
        ValueError: for images that do not fit the model, or a job that cannot be.
    """
    args = recipe.training_arguments()
    held = held_blocks(recipe.config(), args, blocks, lower)
    with torch.random.fork_rng(devices=[]), construction(args):
        torch.manual_seed(args.seed)
        model = recipe.build_model(held)
    check_classes(train, model.config)
    if len(train.class_names) == model.config.num_classes:
        model.config.id2label = dict(enumerate(train.class_names))
        model.config.label2id = {name: i for i, name in enumerate(train.class_names)}
    if lower is not None:
        take_lower_blocks(model, lower, min(blocks))
    teacher = None
    if args.distillation_weight > 0:
        if "base" not in recipe.model:
            raise ValueError("training.distillation_weight needs model.base, the pretrained network to distil from.")
        teacher = AutoModelForImageClassification.from_pretrained(recipe.model["base"])
    try:
        return DiffusionBlocksTrainer(model, args, train, held_out, teacher=teacher, callbacks=callbacks)
    except ValueError as error:
        if blocks is not None:
            raise ValueError(f"{error}{how_to_mend(str(error), blocks)}") from error
        raise


def check_classes(data: ImageDataset, config: BlockedImageClassificationConfig) -> None:
    """Raise a ``ValueError`` for data with more classes than the model has."""
    if data.num_classes > config.num_classes:
        raise ValueError(
            f"the data have {data.num_classes} classes and the model {config.num_classes} (labels 0 to "
            f"{config.num_classes - 1}): set model.num_labels={data.num_classes}."
        )


def train(
    recipe: Recipe,
    *,
    blocks: list[int] | None = None,
    lower: str | None = None,
    resume: bool = True,
    report: bool = True,
    say: Say = print,
) -> Path:
    """``diffusionblocks train``; see ``hf_diffusionblocks.jobs.train``."""
    train_data, test_data = load_data(recipe)
    recipe = resolve_method(recipe, num_rows=len(train_data))
    output = Path(recipe.training_arguments().output_dir)
    trainer = build_trainer(recipe, train_data, test_data, blocks=blocks, lower=lower)
    say = trainer_says(trainer, say)
    output.mkdir(parents=True, exist_ok=True)
    resumed = resume and bool(find_checkpoints(trainer.output_dir))
    say(f"{'going on with' if resumed else 'training'} {recipe.name} ({recipe.method}) in {trainer.output_dir}")
    say(f"images: {len(train_data)}, in {train_data.num_classes} classes; held out: {len(test_data)}")
    say(format_block_parameters(trainer.model))
    if trainer.group.is_leader:
        serialization.write_json(output / RECIPE_NAME, recipe.to_dict())
    summary = trainer.train(resume_from_checkpoint=resume)
    model_dir = trainer.save_model(trainer.output_dir / MODEL_DIR)
    if not trainer.group.is_leader:
        return model_dir
    save_processor(trainer.model.config, model_dir)
    seconds = summary["training_seconds"]
    _write_card(trainer.model, recipe, model_dir, {"training_seconds": seconds})
    say(f"trained {summary['iterations']} updates in {seconds:.0f} s; model saved in {model_dir}")
    whole = len(trainer.model.resident_blocks) == trainer.model.partition.num_blocks
    reported = (recipe, test_data, output, summary, say)
    if trainer.is_job:
        merged = merge_jobs(output, summary, say)
        if merged is None:
            return model_dir
        model_dir, model = merged, BlockedForImageClassification.from_pretrained(merged).to(trainer.model.device)
        save_processor(model.config, model_dir)
        if report:
            write_report(model, *reported)
    elif report and whole and (blocks is None or lower is not None):
        if trainer.group.sharded:
            write_report(BlockedForImageClassification.from_pretrained(model_dir).to(trainer.model.device), *reported)
        else:
            with trainer.averaged_weights():
                write_report(trainer.model, *reported)
    return model_dir


def write_report(
    model: BlockedForImageClassification,
    recipe: Recipe,
    test_data: ImageDataset,
    output: Path,
    summary: dict[str, Any],
    say: Say = print,
) -> dict[str, Any]:
    """Pictures and a table of figures of a trained model, under ``output/figures``."""
    from .. import plots

    folder = output / FIGURES_DIR
    folder.mkdir(parents=True, exist_ok=True)
    args = recipe.training_arguments()
    figures = score_classifier(model, test_data, recipe.sampling, recipe.evaluation, seed=args.seed)
    figures |= {"training_seconds": summary["training_seconds"], "updates_per_block": summary["updates_per_block"]}
    serialization.write_figures(folder / FIGURES_NAME, figures)
    table = plan_memory(model.config, **planned(args), alternatives=False)
    pictures = [
        ("losses", plots.plot_losses(output, folder / "losses.png", "nats per image", "whole model")),
        ("memory", plots.plot_memory(table, folder / "memory.png")),
    ]
    if model.config.two_stream:
        pictures.append(("the partition", plots.plot_partition(model.partition, folder / "partition.png")))
    _write_card(model, recipe, output / MODEL_DIR, figures)
    for line in ("", str(table), "", format_figures(figures), ""):
        say(line)
    say_where(pictures, output / MODEL_DIR, usage_lines(output / MODEL_DIR), say)
    return figures


def usage_lines(model_dir: Path) -> list[str]:
    """The lines of Python that load a saved model and classify an image file."""
    return [
        "import hf_diffusionblocks",
        "from transformers import pipeline",
        f"print(pipeline('image-classification', {str(model_dir)!r})('image.png'))",
    ]


def save_processor(config: BlockedImageClassificationConfig, directory: Path) -> None:
    """Save beside a model how an image file becomes its input, as the training data did: pixels in [-1, 1]."""
    height, width = config.image_size
    with tempfile.TemporaryDirectory(prefix=".processor.", dir=directory) as temporary:
        ViTImageProcessorPil(size={"height": height, "width": width}).save_pretrained(temporary)
        for path in Path(temporary).iterdir():
            os.replace(path, directory / path.name)


def _write_card(model: BlockedForImageClassification, recipe: Recipe, model_dir: Path, figures: dict[str, Any]) -> None:
    card = model_card(
        model,
        title=recipe.name,
        usage="\n".join(usage_lines(model_dir)),
        training={"method": recipe.method, **{k: v for k, v in recipe.training.items() if k != "output_dir"}},
        figures=figures,
        dataset=recipe.data.name,
        pipeline_tag="image-classification",
        base_model=recipe.model.get("base"),
    )
    write_model_card(model_dir, card)


def convert(base: str, output_dir: str, settings: dict[str, Any], say: Say = print) -> Path:
    """``diffusionblocks convert``: cut a pretrained classifier into blocks and save it with its image processor."""
    from transformers import AutoImageProcessor

    target, hub = new_directory(output_dir), hub_settings(settings)
    kind = BlockedImageClassificationConfig.model_type
    if PreTrainedConfig.get_config_dict(base, **hub)[0].get("model_type") == kind:
        raise ValueError(f"{base} has been cut into blocks already: give the base that it was made from.")
    try:
        model = BlockedForImageClassification.from_base(base, **settings)
    except OSError as error:
        raise ValueError(f"{base} cannot be loaded: {error}") from error
    model.save_pretrained(target)
    try:
        AutoImageProcessor.from_pretrained(base, **hub).save_pretrained(target)
    except (OSError, ValueError, ImportError) as error:
        say(f"no image processor could be loaded from {base} ({' '.join(str(error).split())}): none was saved.")
    say(format_block_parameters(model))
    say(f"saved in {target}")
    return target


def evaluate(
    model_dir: str, recipe: Recipe, output: str | None = None, seed: int = 0, say: Say = print
) -> dict[str, Any]:
    """``diffusionblocks evaluate``; see ``hf_diffusionblocks.jobs.evaluate``."""
    check_output(output)
    model = BlockedForImageClassification.from_pretrained(model_dir).to(pick_device())
    _, test_data = load_data(recipe)
    check_classes(test_data, model.config)
    model.check_batch(test_data[[0]])
    figures = score_classifier(model, test_data, recipe.sampling, recipe.evaluation, seed=seed)
    say_figures(figures, output, say)
    return figures
