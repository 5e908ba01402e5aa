"""Checks of images and labels that a classifier is given."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config_checks import MAX_POSITIONS
from ..suggest import unknown_name
from .image_classification_config import BlockedImageClassificationConfig

# transformers' ignore_index: rows that a loss leaves out.
IGNORED = -100

_ARGUMENTS = (
    "pixel_values labels num_inference_steps num_draws generator block return_dict output_hidden_states "
    "interpolate_pos_encoding".split()
)
_NOT_GIVEN = {
    "output_attentions": "a blocked classifier gives logits and hidden states. Leave it out; of a cascade's layers, "
    "to_base() gives a classifier of transformers, which has them under attn_implementation='eager'.",
    "attention_mask": "every patch of an image sees every other. Leave it out.",
    "bool_masked_pos": "a classifier reads whole images. Leave it out.",
}


def check_keywords(given: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for what transformers' classifiers take and blocked ones do not, a ``TypeError`` for an
    unknown keyword of ``forward``."""
    for name, value in given.items():
        if name in _NOT_GIVEN:
            if value is not None and value is not False:
                raise ValueError(f"{name}: {_NOT_GIVEN[name]}")
        elif name != "num_items_in_batch" and value is not None:
            raise TypeError(unknown_name("keyword", name, _ARGUMENTS))


def check_images(config: BlockedImageClassificationConfig, pixel_values: Any, *, any_size: bool = False) -> Tensor:
    """The images as the model takes them; a ``ValueError`` for those that do not fit it.

    A model of gray images takes gray images in three equal channels too: transformers' pipelines open every image as
    RGB.

    Args:
        config: of the model.
        pixel_values: [batch, channels, height, width].
        any_size: let images be of another height and width than the model's, in whole patches.
    """
    if pixel_values is None:
        raise ValueError("pixel_values is missing: give images, a tensor [batch, channels, height, width].")
    if not isinstance(pixel_values, Tensor):
        raise ValueError(
            f"pixel_values is of type {type(pixel_values).__name__}: give a tensor [batch, channels, height, width]."
        )
    wanted = (config.num_channels, *config.image_size)
    if any_size and pixel_values.ndim == 4:
        wanted = (wanted[0], *_whole_patches(config, pixel_values))
    if pixel_values.ndim == 4 and wanted[0] == 1 and tuple(pixel_values.shape[1:]) == (3, *wanted[1:]):
        if not torch.equal(pixel_values[:, :1].expand_as(pixel_values), pixel_values):
            raise ValueError(
                "pixel_values have 3 channels that differ; this model takes gray images: give one channel."
            )
        pixel_values = pixel_values[:, :1]
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != wanted:
        raise ValueError(
            f"pixel_values has shape {list(pixel_values.shape)}; this model takes [batch, "
            f"{', '.join(map(str, wanted))}] (channels, height, width). Resize or convert the images, change "
            "image_size / num_channels of the model, or give interpolate_pos_encoding=True for another size."
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


def _whole_patches(config: BlockedImageClassificationConfig, pixel_values: Tensor) -> tuple[int, int]:
    """Height and width of images of another size; a ``ValueError`` for sizes that patches do not fill."""
    height, width = pixel_values.shape[-2:]
    rows, columns = config.patch_size
    if height % rows or width % columns or not height or not width:
        raise ValueError(
            f"images of {height} x {width} with interpolate_pos_encoding=True: height and width must be multiples of "
            f"the patch size, {rows} x {columns}. Resize the images."
        )
    if (height // rows) * (width // columns) > MAX_POSITIONS:
        raise ValueError(f"images of {height} x {width} have more than {MAX_POSITIONS} patches: give smaller ones.")
    return height, width


def check_labels(
    config: BlockedImageClassificationConfig, labels: Any, count: int | None = None, *, ignored: bool = False
) -> None:
    """Raise a ``ValueError`` for labels of another shape or type, or out of range.

    Args:
        config: of the model.
        labels: [batch].
        count: of the images, if known.
        ignored: allow ``IGNORED``, for rows without a label.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"the labels are of type {type(labels).__name__}: give a tensor of whole numbers [batch].")
    if labels.ndim != 1 or labels.is_floating_point() or (count is not None and len(labels) != count):
        expected = "batch" if count is None else count
        raise ValueError(
            f"the labels have shape {list(labels.shape)} and dtype {labels.dtype}: give whole numbers of shape "
            f"[{expected}]."
        )
    wrong = (labels < 0) | (labels >= config.num_classes)
    if ignored:
        wrong = wrong & (labels != IGNORED)
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
