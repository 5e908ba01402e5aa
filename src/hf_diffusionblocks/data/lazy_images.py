"""Images of a ``datasets`` source that are decoded when they are asked for: for sets that do not fit into memory."""

import hashlib
import json
import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .image_dataset import ImageDataset, class_indices
from .image_files import KNOWN_DATASETS
from .image_pixels import decode_cell, square
from .image_tables import find_columns, open_hub
from .images import load_image_dataset
from .indexing import fixed_subset, row_index


class LazyImageDataset(Dataset):
    """Labelled images, decoded row by row; indexed as ``ImageDataset`` is.

    Args:
        dataset: a ``datasets.Dataset``.
        image_column: column of images; found as in ``load_image_dataset`` unless given.
        label_column: column of integer labels.
        image_size: crop to the central square and resize to this side, in pixels.
        channels: 1 (grey) or 3 (RGB).
        max_samples: keep this many rows, a fixed random subset.

    Raises:
        ValueError: for columns that are not there or labels that are no class indices; for an image that cannot be
            read when its row is asked for. The message names the row.
    """

    is_latent = False

    def __init__(
        self,
        dataset: Any,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        image_size: int,
        channels: int,
        max_samples: int | None = None,
    ) -> None:
        encoded, image_column, label_column, names = find_columns(dataset.with_format(None), image_column, label_column)
        labels = class_indices(encoded.select_columns(label_column)[:][label_column])
        if len(labels) == 0:
            raise ValueError("the data set is empty: at least one image is needed. Check the split and any filter.")
        self.class_names = list(names) if names is not None else [str(i) for i in range(int(labels.max()) + 1)]
        self.rows = fixed_subset(len(labels), max_samples or len(labels))
        self.labels = labels[torch.from_numpy(self.rows)]
        self.image_size, self.channels = image_size, channels
        self._cells, self._column = encoded.select(self.rows), image_column
        key = json.dumps([1, self._cells._fingerprint, image_column, label_column, image_size, channels])
        self.fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        index = row_index(index)
        if isinstance(index, Tensor):
            rows = index.tolist()
        else:
            rows = list(range(len(self)))[index] if isinstance(index, slice) else [int(index)]
        mode = {1: "L", 3: "RGB"}[self.channels]
        values = self._cells[rows][self._column]
        images = [
            square(decode_cell(value, int(self.rows[row]), mode, strict=False)[None], self.image_size)[0]
            for row, value in zip(rows, values, strict=True)
        ]
        pixels, labels = torch.stack(images).float().div_(127.5).sub_(1.0), self.labels[rows]
        if isinstance(index, int):
            pixels, labels = pixels[0], labels[0]
        return {"pixel_values": pixels, "class_labels": labels}


def open_image_dataset(
    name_or_path: str,
    split: str,
    *,
    image_size: int,
    channels: int,
    image_column: str | None = None,
    label_column: str | None = None,
    data_dir: str | os.PathLike | None = None,
    data_files: Any = None,
    max_samples: int | None = None,
) -> ImageDataset | LazyImageDataset:
    """Labelled images of one size, without holding them in memory where the source is one that ``datasets`` reads.

    Arguments and errors as in ``load_image_dataset``; small embedded sources are loaded as there.
    """
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    size: dict[str, Any] = {"image_size": image_size, "channels": channels, "max_samples": max_samples}
    if name_or_path in KNOWN_DATASETS:
        return load_image_dataset(name_or_path, split, data_dir=data_dir, **columns, **size)
    dataset = open_hub(os.path.expanduser(name_or_path), split, {"data_dir": data_dir, "data_files": data_files})
    return LazyImageDataset(dataset, **columns, **size)
