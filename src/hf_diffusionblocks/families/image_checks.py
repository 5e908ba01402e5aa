"""Checks of images and labels that a classifier is given."""

from typing import Any

import torch
from torch import Tensor

from .image_classification_config import BlockedImageClassificationConfig


def check_images(config: BlockedImageClassificationConfig, pixel_values: Any) -> Tensor:
    """The images as the model takes them; a ``ValueError`` for those that do not fit it.

    A model of gray images takes gray images in three equal channels too: transformers' pipelines open every image as
    RGB.
    """
    if not isinstance(pixel_values, Tensor):
        raise ValueError(
            f"pixel_values is of type {type(pixel_values).__name__}: give a tensor [batch, channels, height, width]."
        )
    wanted = (config.num_channels, *config.image_size)
    if pixel_values.ndim == 4 and wanted[0] == 1 and tuple(pixel_values.shape[1:]) == (3, *wanted[1:]):
        if not torch.equal(pixel_values[:, :1].expand_as(pixel_values), pixel_values):
            raise ValueError(
                "pixel_values have 3 channels that differ; this model takes gray images: give one channel."
            )
        pixel_values = pixel_values[:, :1]
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != wanted:
        raise ValueError(
            f"pixel_values has shape {list(pixel_values.shape)}; this model takes [batch, "
            f"{', '.join(map(str, wanted))}] (channels, height, width). Resize or convert the images, or change "
            "image_size / num_channels of the model."
        )
    if len(pixel_values) == 0:
        raise ValueError("the batch is empty: give at least one image.")
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values are {pixel_values.dtype}; the model takes floating point values: scale pixels of 0 to 255 "
            "to [-1, 1] with pixel_values.float() / 127.5 - 1."
        )
    if not bool(torch.isfinite(pixel_values).all()):
        row = int((~torch.isfinite(pixel_values)).flatten(1).any(1).int().argmax())
        raise ValueError(f"pixel_values are not finite (row {row} is the first): correct or remove the images.")
    return pixel_values


def check_labels(config: BlockedImageClassificationConfig, labels: Any, count: int | None = None) -> None:
    """Raise a ``ValueError`` for labels of another shape or type, or out of range."""
    if not isinstance(labels, Tensor):
        raise ValueError(f"the labels are of type {type(labels).__name__}: give a tensor of whole numbers [batch].")
    if labels.ndim != 1 or labels.is_floating_point() or (count is not None and len(labels) != count):
        expected = "batch" if count is None else count
        raise ValueError(
            f"the labels have shape {list(labels.shape)} and dtype {labels.dtype}: give whole numbers of shape "
            f"[{expected}]."
        )
    wrong = (labels < 0) | (labels >= config.num_classes)
    if len(labels) and bool(wrong.any()):
        raise ValueError(
            f"the labels run from {int(labels.min())} to {int(labels.max())} (row {int(wrong.int().argmax())} is the "
            f"first out of range); this model has labels of 0 to {config.num_classes - 1}. Correct the labels, or set "
            "num_labels (the number of classes) of the model."
        )


def check_image_batch(config: BlockedImageClassificationConfig, batch: dict[str, Any]) -> None:
    """Raise a ``ValueError`` for a training batch that does not fit the model."""
    if "pixel_values" not in batch or "class_labels" not in batch:
        raise ValueError(
            f"a batch holds {sorted(batch)}; the trainer needs 'pixel_values' and 'class_labels'. Load it with "
            "load_image_dataset(image_column=..., label_column=...) or rename its columns."
        )
    for name in ("pixel_values", "class_labels"):
        if not isinstance(batch[name], Tensor):
            raise ValueError(
                f"{name} of a batch is of type {type(batch[name]).__name__}, not a tensor: a `datasets.Dataset` gives "
                'tensors after dataset.with_format("torch").'
            )
    check_labels(config, batch["class_labels"], len(batch["pixel_values"]))
    finite = torch.nan_to_num(batch["pixel_values"])  # which rows are not, the trainer says
    largest = float(check_images(config, finite).abs().max())
    if 16 < largest < torch.finfo(finite.dtype).max:
        raise ValueError(
            f"pixel_values reach {largest:g}; pixels must lie in [-1, 1]: scale those of 0 to 255 with "
            "pixel_values / 127.5 - 1."
        )


def labels_of_dataset(dataset: Any) -> Tensor | None:
    """All labels of a data set, where they can be read without the images; else None."""
    labels = getattr(dataset, "labels", None)
    if labels is None and "class_labels" in (getattr(dataset, "column_names", None) or ()):
        labels = dataset.select_columns("class_labels").with_format("torch")[:]["class_labels"]
    return labels if isinstance(labels, Tensor) and labels.ndim == 1 and len(labels) else None
