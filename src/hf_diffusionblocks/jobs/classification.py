"""What each command does with image classifiers."""

import os
import tempfile
from pathlib import Path, PurePath
from typing import Any

from transformers import AutoModelForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ..baselines.end_to_end import resolve_method
from ..data import ImageDataset
from ..evaluation import score_classifier
from ..families.image_classification import BlockedForImageClassification, BlockedImageClassificationConfig
from ..memory import MemoryPlan
from ..recipes import Recipe
from ..recipes.families import FAMILIES
from ..training import DiffusionBlocksTrainer
from ..training.arguments import DiffusionBlocksTrainingArguments
from . import building
from .cascade_jobs import take_lower_blocks
from .common import Say, check_output, family_of, pick_device, say_figures
from .conversion import convert_base
from .image_advice import plan_images
from .image_pieces import data_line, load_data
from .planning import Plan
from .run import Pictures, Run


def plan(recipe: Recipe) -> Plan:
    """What ``diffusionblocks plan`` prints: parameters by block, memory and compute."""
    return plan_images(recipe)


def build_trainer(
    recipe: Recipe,
    train: ImageDataset,
    held_out: ImageDataset | None,
    *,
    blocks: list[int] | None = None,
    lower: str | None = None,
    callbacks: list[Any] | None = None,
) -> DiffusionBlocksTrainer:
    """The trainer of a classifier's recipe; see ``building.make_trainer``."""

    def prepare(model: BlockedForImageClassification) -> None:
        check_classes(train, model.config, recipe.kind.classes_key)
        building.name_classes(model, train)
        if lower is not None and blocks:
            take_lower_blocks(model, lower, min(blocks))

    def load_teacher(args: DiffusionBlocksTrainingArguments) -> Any:
        if args.distillation_weight <= 0:
            return None
        return AutoModelForImageClassification.from_pretrained(building.base_to_distil(recipe))

    made: dict[str, Any] = {
        "prepare": prepare,
        "load_teacher": load_teacher,
        "blocks": blocks,
        "lower": lower,
        "callbacks": callbacks,
    }
    return building.make_trainer(recipe, train, held_out, **made)


def check_classes(data: ImageDataset, config: BlockedImageClassificationConfig, key: str = "num_labels") -> None:
    """Raise a ``ValueError`` for data with more classes than the model has, by ``key`` of the section ``model``."""
    building.check_classes(data, config.num_classes, "labels", f"model.{key}")


class ClassifierRun(Run):
    """A run of an image classifier."""

    def load(self) -> None:
        self.train_data, self.test_data = load_data(self.recipe)
        self.recipe = resolve_method(self.recipe, num_rows=len(self.train_data))

    def build_trainer(self) -> DiffusionBlocksTrainer:
        return build_trainer(self.recipe, self.train_data, self.test_data, blocks=self.blocks, lower=self.lower)

    def check(self, model: BlockedForImageClassification) -> None:
        check_classes(self.train_data, model.config, self.recipe.kind.classes_key)

    def data_lines(self, model: BlockedForImageClassification) -> list[str]:
        return [data_line(self.recipe, self.train_data, self.test_data)]

    def save_beside(self, model: BlockedForImageClassification, directory: Path) -> None:
        save_processor(model.config, directory)

    def score(self, model: BlockedForImageClassification) -> dict[str, Any]:
        seed = self.recipe.training_arguments().seed
        return score_classifier(model, self.test_data, self.recipe.sampling, self.recipe.evaluation, seed=seed)

    def plot(
        self, model: BlockedForImageClassification, figures: dict[str, Any], memory: MemoryPlan, folder: Path
    ) -> Pictures:
        from .. import plots

        pictures = [
            ("losses", plots.plot_losses(self.output, folder / "losses.png", "nats per image", "whole model")),
            ("memory", plots.plot_memory(memory, folder / "memory.png")),
        ]
        if model.config.two_stream:
            pictures.append(("the partition", plots.plot_partition(model.partition, folder / "partition.png")))
        return pictures

    def usage_lines(self, model: BlockedForImageClassification, model_dir: PurePath) -> list[str]:
        return [
            "import hf_diffusionblocks",
            "from transformers import pipeline",
            f"print(pipeline('image-classification', {str(model_dir)!r})('image.png'))",
        ]

    def card_settings(self) -> dict[str, Any]:
        return {"pipeline_tag": "image-classification", "base_model": self.recipe.model.get("base")}


def save_processor(config: BlockedImageClassificationConfig, directory: Path) -> None:
    """Save beside a model how an image file becomes its input, as the training data did: pixels in [-1, 1]."""
    height, width = config.image_size
    with tempfile.TemporaryDirectory(prefix=".processor.", dir=directory) as temporary:
        ViTImageProcessorPil(size={"height": height, "width": width}).save_pretrained(temporary)
        for path in Path(temporary).iterdir():
            os.replace(path, directory / path.name)


def convert(
    base: str, output_dir: str, settings: dict[str, Any], say: Say = print, kind: Any = BlockedForImageClassification
) -> Path:
    """``diffusionblocks convert``: cut a pretrained classifier into blocks and save it with its image processor."""

    def save_beside(base: str, directory: Path, **hub: Any) -> None:
        from transformers import AutoImageProcessor

        AutoImageProcessor.from_pretrained(base, **hub).save_pretrained(directory)

    return convert_base(
        kind,
        base,
        output_dir,
        settings,
        beside="image processor",
        save_beside=save_beside,
        say=say,
    )


def evaluate(
    model_dir: str, recipe: Recipe, output: str | None = None, seed: int = 0, say: Say = print
) -> dict[str, Any]:
    """``diffusionblocks evaluate``; see ``hf_diffusionblocks.jobs.evaluate``."""
    check_output(output)
    model = FAMILIES[family_of(model_dir)].model_class.from_pretrained(model_dir).to(pick_device())
    _, test_data = load_data(recipe)
    check_classes(test_data, model.config)
    model.check_batch(test_data[[0]])
    figures = score_classifier(model, test_data, recipe.sampling, recipe.evaluation, seed=seed)
    say_figures(figures, output, say)
    return figures
