"""What a trainer of local classifiers refuses before its first update: settings that it does not use, data that do not
fit the classifier."""

from dataclasses import fields
from typing import NamedTuple

from torch import Tensor

from ..training.arguments import DiffusionBlocksTrainingArguments

# What the trainer of blocks does with these, nobody does here; the others are used, or change no weight.
_UNUSED = (
    "blocks",
    "order",
    "hand_over",
    "lower_outputs",
    "residency",
    "gradient",
    "gradient_release",
    "mixed_precision",
    "gradient_checkpointing",
    "torch_compile",
    "hidden_weight",
    "distillation_weight",
    "horizontal_flip",
    "rand_augment",
)


class ImageShape(NamedTuple):
    """What a classifier takes: the number of classes, and channels, height and width of an image."""

    num_classes: int
    channels: int
    height: int
    width: int


def check_kind(what: str, value: object, kind: type) -> None:
    """Raise a ``ValueError`` for a config or network of another class."""
    if not isinstance(value, kind):
        raise ValueError(f"{what} is a {type(value).__name__}: give a {kind.__name__}.")


def check_settings(args: DiffusionBlocksTrainingArguments) -> None:
    """Raise a ``ValueError`` for a setting that would be ignored."""
    defaults = {field.name: field.default for field in fields(args)}
    for name in _UNUSED:
        value = getattr(args, name)
        if value != defaults[name]:
            raise ValueError(
                f"{name}={value!r} is not for local classifiers: leave it at its default, {defaults[name]!r}."
            )
    if args.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} is not for local classifiers, whose "
            "gradients are used at once: set it to 1 and give a larger per_device_train_batch_size."
        )


def check_samples(takes: ImageShape, images: Tensor, labels: Tensor | None) -> None:
    """Raise a ``ValueError`` for images of another shape than the classifier takes, or classes that it does not have.

    Args:
        takes: what it takes.
        images: [n, channels, height, width].
        labels: [any]; None if they are not known yet.
    """
    shape = [takes.channels, takes.height, takes.width]
    if list(images.shape[1:]) != shape:
        raise ValueError(
            f"the images have shape {list(images.shape[1:])} and the classifier takes {shape} (channels, height, "
            "width): make its config with the images' size and channels."
        )
    if labels is None or not len(labels):
        return
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < takes.num_classes:
            raise ValueError(
                f"label {label} is none of the classifier's classes, 0 to {takes.num_classes - 1}: make it with "
                f"num_classes={max(label + 1, takes.num_classes)}, or drop those samples."
                if label >= 0
                else f"label {label} is negative: classes count from 0."
            )


__all__ = ["ImageShape", "check_kind", "check_samples", "check_settings"]
