"""Checks of what blocked diffusers transformers are given: images, labels, prompts' embeddings and training batches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..suggest import unknown_name
from .transformer_classes import Column


def check_images(z: Any, channels: int, size: int | None, multiple: int = 1, largest: int | None = None) -> None:
    """Raise a ``ValueError`` for images that a model cannot take.

    Args:
        z: should be [batch, channels, height, width].
        channels: of the model.
        size: height and width, if the model takes one size only.
        multiple: height and width are multiples of this.
        largest: the largest height and width, if there is one.
    """
    if not isinstance(z, Tensor):
        raise ValueError(f"the input is of type {type(z).__name__}: give a tensor [batch, channels, height, width].")
    if size is not None:
        wanted = (channels, size, size)
        if z.ndim != 4 or tuple(z.shape[1:]) != wanted:
            raise ValueError(
                f"the input has shape {list(z.shape)}; this model takes [batch, {', '.join(map(str, wanted))}] "
                "(channels, height, width). Resize or convert the images, or change sample_size / in_channels."
            )
        return
    sides = z.shape[-2:]
    limit = f" and at most {largest}" if largest else ""
    if z.ndim != 4 or z.shape[1] != channels or any(n % multiple or n == 0 or n > (largest or n) for n in sides):
        raise ValueError(
            f"the input has shape {list(z.shape)}; this model takes [batch, {channels}, height, width] with height and "
            f"width multiples of {multiple}{limit}. Resize or convert the images or latents."
        )


def check_labels(labels: Any, count: int, num_classes: int) -> None:
    """Raise a ``ValueError`` for class labels of another form than [count], or outside 0 to num_classes (no class)."""
    if labels is None:
        raise ValueError(f"class_labels is missing: give one label of 0 to {num_classes} per sample.")
    if not isinstance(labels, Tensor):
        raise ValueError(f"class_labels is of type {type(labels).__name__}: give a tensor [{count}].")
    if labels.shape != (count,) or labels.is_floating_point():
        raise ValueError(
            f"class_labels has shape {list(labels.shape)} and dtype {labels.dtype}: "
            f"give whole numbers of shape [{count}]."
        )
    if count and not (0 <= int(labels.min()) and int(labels.max()) <= num_classes):
        raise ValueError(
            f"class_labels run from {int(labels.min())} to {int(labels.max())}; allowed are 0 to "
            f"{num_classes - 1}, and {num_classes} for no class."
        )


def check_training_labels(labels: Tensor, num_classes: int) -> None:
    """Raise a ``ValueError`` for labels of data out of range; the null class is drawn by label dropout alone."""
    wrong = (labels < 0) | (labels >= num_classes)
    if len(labels) and bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise ValueError(
            f"class_labels run from {int(labels.min())} to {int(labels.max())} (row {row} is the first out of "
            f"range); data of this model have labels of 0 to {num_classes - 1}. Correct the labels, or "
            "set num_embeds_ada_norm (the number of classes) of the model."
        )


def check_columns(given: Mapping[str, Any], count: int, columns: Mapping[str, Column]) -> None:
    """Raise a ``ValueError`` for conditioning that is missing, unknown, or of another form than the model's.

    Args:
        given: tensors by name.
        count: samples.
        columns: what the model takes.
    """
    for name in given:
        if name not in columns:
            raise ValueError(unknown_name("conditioning", name, columns))
    length = None
    for name, column in columns.items():
        value = given.get(name)
        form = f"[{', '.join(str(n) for n in (count, *('text length' if n is None else n for n in column.shape)))}]"
        if value is None:
            if column.optional:
                continue
            raise ValueError(f"{name} is missing: this model is conditioned on a tensor {form}.")
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is of type {type(value).__name__}: give a tensor {form}.")
        fits = value.ndim == 1 + len(column.shape) and len(value) == count
        fits = fits and all(w in (None, n) for n, w in zip(value.shape[1:], column.shape, strict=True))
        if not fits or (not column.integer and not value.is_floating_point()):
            raise ValueError(f"{name} has shape {list(value.shape)} and dtype {value.dtype}; give a tensor {form}.")
        if None in column.shape:
            if value.shape[1] == 0 or length not in (None, value.shape[1]):
                raise ValueError(
                    f"{name} has shape {list(value.shape)}: embeddings and mask of a prompt have the same length of at "
                    "least 1."
                )
            length = value.shape[1]


def check_pixels(pixels: Tensor, channels: int) -> None:
    """Raise a ``ValueError`` for training images that are whole numbers, or whose pixels are not in [-1, 1]."""
    if not pixels.is_floating_point():
        raise ValueError(
            f"pixel_values are {pixels.dtype}; the model learns from floating point values: scale pixels of 0 to "
            "255 to [-1, 1] with pixel_values.float() / 127.5 - 1."
        )
    largest = float(pixels.abs().max()) if len(pixels) else 0.0
    if channels in (1, 3) and 16 < largest < float("inf"):
        raise ValueError(
            f"pixel_values reach {largest:g}; pixels must lie in [-1, 1]: scale those of 0 to 255 with "
            "pixel_values / 127.5 - 1."
        )


def column_of(batch: Mapping[str, Any], name: str) -> Tensor:
    """A column of a training batch, which must be a tensor."""
    value = batch[name]
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} of a batch is of type {type(value).__name__}, not a tensor: a `datasets.Dataset` gives tensors "
            'after dataset.with_format("torch").'
        )
    return value


def drop_prompts(given: Mapping[str, Tensor], drop: Tensor, null: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Conditioning in which some samples have the empty prompt.

    Args:
        given: columns [batch, ...] by name.
        drop: which samples, booleans [batch].
        null: the empty prompt's columns, each of one sample [...].

    Raises:
        ValueError: for a column that is not there, or of another shape than the batch's.
    """
    given = dict(given)
    for name, empty in null.items():
        if name not in given:
            raise ValueError(unknown_name("null_conditioning column", name, given))
        value = given[name]
        if empty.shape != value.shape[1:]:
            raise ValueError(
                f"null_conditioning has {name} of shape {list(empty.shape)}, and a prompt's is "
                f"{list(value.shape[1:])}: encode the empty prompt as the others, padded to the same length."
            )
        given[name] = torch.where(drop.view(-1, *[1] * (value.ndim - 1)), empty.to(value), value)
    return given


def dummy_columns(columns: Mapping[str, Column], batch_size: int, text_length: int) -> dict[str, Tensor]:
    """Zeros of the right shapes for all columns, masks of ones."""
    shapes = {name: (batch_size, *(text_length if n is None else n for n in c.shape)) for name, c in columns.items()}
    return {
        name: torch.ones(shape, dtype=torch.int64) if columns[name].integer else torch.zeros(shape)
        for name, shape in shapes.items()
    }


__all__ = [
    "check_columns",
    "check_images",
    "check_labels",
    "check_pixels",
    "check_training_labels",
    "column_of",
    "drop_prompts",
    "dummy_columns",
]
