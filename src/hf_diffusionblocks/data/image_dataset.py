"""Labelled images, or latents, in memory: the one form that every source of images ends in."""

import hashlib
import json
import reprlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .indexing import row_index


class ImageDataset(Dataset):
    """Labelled images in memory, indexed as Hugging Face ``datasets`` are: ``ds[[3, 1]]`` is one batch.

    Args:
        images: uint8 pixels [N, C, H, W], or latents [N, C, H, W] in float16, bfloat16 or float32.
        labels: class indices [N], integers from 0.
        class_names: name of each class; ``"0"``, ``"1"``, ... up to the largest label unless given.
        scaling_factor: factor on latents as they are read. Latents written by ``cache_latents`` hold the VAE's
            own factor already and need 1.

    Indexing with an int gives ``{"pixel_values": float32 [C, H, W], "class_labels": int64 []}``; with a list, slice,
    array or tensor of indices the same with a leading batch dimension. Pixels are scaled to [-1, 1].

    Raises:
        ValueError: if there are no images, shapes or dtypes do not fit, a label is not an integer in
            [0, num_classes), or a latent is not finite.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | np.ndarray | Sequence[int],
        class_names: Sequence[str] | None = None,
        *,
        scaling_factor: float = 1.0,
    ) -> None:
        if images.ndim != 4 or images.dtype not in (torch.uint8, torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}: expected [N, C, H, W], uint8 for pixels or float16, "
                "bfloat16 or float32 for latents."
            )
        if len(images) == 0 or len(labels) == 0:
            raise ValueError("the data set is empty: at least one image is needed. Check the split and any filter.")
        self.images = images
        self.labels = class_indices(labels)
        if len(self.labels) != len(images):
            raise ValueError(f"{len(images)} images but {len(self.labels)} labels: each image needs one label.")
        largest = int(self.labels.max())
        self.class_names = [str(c) for c in (range(largest + 1) if class_names is None else class_names)]
        if largest >= self.num_classes:
            row = int(self.labels.argmax())
            raise ValueError(f"label {largest} of row {row} is not in [0, {self.num_classes}): {self.class_names}.")
        self.scaling_factor = float(scaling_factor)
        if not self.is_latent and self.scaling_factor != 1.0:
            raise ValueError(f"scaling_factor={scaling_factor} applies to latents; pixels are scaled to [-1, 1].")
        if self.is_latent and (broken := first_not_finite(images)) is not None:
            raise ValueError(f"the latent of row {broken} is not finite: encode again, with the VAE in float32.")

    def subset(self, rows: Tensor) -> "ImageDataset":
        """The images of these rows, with all class names."""
        return ImageDataset(self.images[rows], self.labels[rows], self.class_names, scaling_factor=self.scaling_factor)

    def hold_out(self, fraction: float) -> tuple["ImageDataset", "ImageDataset"]:
        """Training and held-out images: of each class the same share, evenly spaced among its images.

        Args:
            fraction: of a class that is held out, in (0, 1); at least one image of a class with five or more.

        Raises:
            ValueError: if nothing would be held out.
        """
        held = torch.zeros(len(self.images), dtype=torch.bool)
        for label in range(self.num_classes):
            rows = (self.labels == label).nonzero()[:, 0]
            count = max(int(len(rows) * fraction), int(len(rows) >= 5))
            held[rows[((torch.arange(count) + 0.5) * len(rows) / max(count, 1)).long()]] = True
        if not held.any():
            raise ValueError(
                f"test_fraction={fraction} of {len(held)} images in {self.num_classes} classes is none: give more "
                "images per class, or a larger fraction."
            )
        return self.subset((~held).nonzero()[:, 0]), self.subset(held.nonzero()[:, 0])

    @property
    def num_classes(self) -> int:
        """Number of classes, also those without an image."""
        return len(self.class_names)

    @property
    def is_latent(self) -> bool:
        """Whether the images are latents rather than pixels."""
        return self.images.dtype.is_floating_point

    @property
    def channels(self) -> int:
        """C."""
        return self.images.shape[1]

    @property
    def image_size(self) -> int:
        """Side of the square images (or latents). ValueError if they are not square."""
        height, width = self.images.shape[2:]
        if height != width:
            raise ValueError(f"images are {height}x{width} (height x width), not square: load them with image_size=.")
        return height

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of images, labels, class names and scaling factor."""
        head = [str(self.images.dtype), list(self.images.shape), self.class_names, self.scaling_factor]
        digest = hashlib.sha256(json.dumps(head).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def select(self, indices: Iterable[int]) -> "ImageDataset":
        """The data set of these rows, in this order, with the same classes."""
        index = row_index(indices)
        return ImageDataset(
            self.images[index], self.labels[index], self.class_names, scaling_factor=self.scaling_factor
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        index = row_index(index)
        images = self.images[index]
        # A new tensor in every case: in-place work on a batch must not reach the stored images.
        pixels = images.float() * self.scaling_factor if self.is_latent else images.float().div_(127.5).sub_(1.0)
        return {"pixel_values": pixels, "class_labels": self.labels[index].clone()}

    def __repr__(self) -> str:
        kind = "latents" if self.is_latent else "images"
        return f"ImageDataset({len(self)} {kind} {list(self.images.shape[1:])}, {self.num_classes} classes)"


def class_indices(labels: Any) -> Tensor:
    """int64 labels [N]; ValueError naming the first row whose label is not an integer >= 0."""
    array = np.asarray(labels)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        values = labels if isinstance(labels, list) else array.tolist()
        row = next((i for i, v in enumerate(values) if not np.issubdtype(np.asarray(v).dtype, np.integer)), 0)
        raise ValueError(
            f"the label of row {row}, {reprlib.repr(values[row])}, is not an integer class index; turn names or "
            "floats into one with `dataset.class_encode_column(...)` of the datasets library."
        )
    if (array < 0).any():
        row = int((array < 0).argmax())
        raise ValueError(
            f"the label of row {row}, {array[row]}, is negative: labels are class indices from 0. Negative ones often "
            "mark rows without a label; drop those."
        )
    return torch.from_numpy(array.astype(np.int64))


def first_not_finite(latents: Tensor) -> int | None:
    """First row with an inf or nan, a part at a time: the mask of a large set would not fit beside it."""
    for start in range(0, len(latents), 4096):
        finite = latents[start : start + 4096].isfinite().flatten(1).all(1)
        if not finite.all():
            return start + int(finite.int().argmin())
    return None
