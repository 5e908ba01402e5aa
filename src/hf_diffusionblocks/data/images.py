"""Images with class labels, held in memory: pixels, or latents of a VAE cached on disk.

Every source ends in one form, ``ImageDataset``, and indexing it gives the batch that a class-conditional denoiser
trains on: ``pixel_values`` [B, C, H, W] in [-1, 1] and ``class_labels`` [B]. Bad rows are found while loading, never in
the middle of a run.
"""

import numbers
import os
from pathlib import Path
from typing import Any

import torch

from ..suggest import unknown_name
from .image_dataset import ImageDataset
from .image_files import FASHION_MNIST_CLASSES, FASHION_MNIST_DIR, KNOWN_DATASETS, load_digits_split, load_idx
from .image_pixels import MODES, square
from .image_tables import load_table, open_hub
from .indexing import fixed_subset
from .latents import cache_latents, latent_files, load_latents


def load_image_dataset(
    name_or_path: Any,
    split: str = "train",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    data_dir: str | os.PathLike | None = None,
    data_files: Any = None,
    max_samples: int | None = None,
    streaming: bool = False,
    scaling_factor: float = 1.0,
    disable_progress: bool = False,
    **load_dataset_kwargs: Any,
) -> ImageDataset:
    """Load labelled images, or cached latents, into memory.

    Args:
        name_or_path: one of

            - ``"digits"``: scikit-learn's 8x8 digits; a fixed stratified split, 80 % train and 20 % test;
            - ``"fashion-mnist"``: IDX files in ``data_dir``, ``$FASHION_MNIST_DIR`` or where Debian's package
              ``dataset-fashion-mnist`` puts them;
            - a directory of IDX files with MNIST's names, or of ``cache_latents``' files (those of ``train``, or
              of any split in a folder of the split's name);
            - a ``.parquet`` or ``.arrow`` file, a directory that ``datasets.load_dataset`` or ``load_from_disk`` reads
              (``imagefolder``, parquet, ...), the name of one of its builders, or a data set's id on the Hub;
            - a ``datasets`` object.
        split: name of the split; for ``datasets`` sources also slices such as ``"train[:10%]"``.
        image_column: column of images; by default the only one of type ``Image``, or named like one. Sources without
            columns leave it and ``label_column`` aside.
        label_column: column of integer labels; by default the only one of type ``ClassLabel``, or named like one.
        image_size: crop to the central square and resize to this side (bicubic with antialiasing), in pixels.
        channels: 1 (grey) or 3 (RGB), converted if need be; by default those of the first image.
        data_dir: directory of the files, where ``name_or_path`` does not say it.
        data_files: as in ``datasets.load_dataset``.
        max_samples: keep this many rows: a fixed random subset in the order of the source, so that sorted classes all
            stay; the first rows when streaming.
        streaming: read rows one by one without downloading the whole set first.
        scaling_factor: factor on latents, see ``ImageDataset``.
        disable_progress: no progress bar (there is one only for work of more than two seconds).
        **load_dataset_kwargs: for ``datasets.load_dataset``, such as ``name``, ``revision``, ``token``.

    Raises:
        ValueError: for anything that cannot be loaded; the message names the value, row or file.
    """
    for name, value in (("image_size", image_size), ("max_samples", max_samples)):
        if value is not None and (not isinstance(value, numbers.Integral) or value < 1):
            raise ValueError(f"{name}={value!r} must be a positive integer.")
    if isinstance(name_or_path, (str, os.PathLike)):
        name_or_path = os.path.expanduser(name_or_path)
    known = isinstance(name_or_path, str) and name_or_path in KNOWN_DATASETS
    path = Path(name_or_path) if isinstance(name_or_path, str) and not known else None
    if name_or_path == "fashion-mnist":
        path = Path(data_dir or os.environ.get("FASHION_MNIST_DIR") or FASHION_MNIST_DIR)
        data_dir = None
    latents = latent_files(path, split) if path and not known else None
    if not latents and channels not in (None, *MODES):
        raise ValueError(f"channels={channels!r} is not possible for images: use 1 (grey) or 3 (RGB).")
    is_hub = not (latents or known or (path and any(path.glob("*-images-idx3-ubyte*"))))
    loading = {"data_dir": data_dir, "data_files": data_files, "streaming": streaming or None, **load_dataset_kwargs}
    if not (is_hub and path) and (given := [name for name, value in loading.items() if value is not None]):
        source = repr(name_or_path) if isinstance(name_or_path, str) else f"a {type(name_or_path).__name__}"
        raise ValueError(f"{', '.join(given)}: no setting for {source}, which `datasets.load_dataset` does not load.")
    if is_hub:
        dataset = open_hub(name_or_path, split, loading)
        images, labels, names = load_table(
            dataset, image_column, label_column, image_size, channels, max_samples, disable_progress
        )
        return ImageDataset(images, labels, names, scaling_factor=scaling_factor)
    if latents:
        images, labels, names = load_latents(latents)
        if image_size not in (None, images.shape[-1]) or channels not in (None, images.shape[1]):
            raise ValueError(
                f"image_size={image_size}, channels={channels} do not fit latents of shape {list(images.shape[1:])}, "
                "which cannot be converted: encode the images again."
            )
    else:
        if split not in ("train", "test"):
            raise ValueError(unknown_name("split", split, ("train", "test")))
        images, labels, names = load_digits_split(split) if path is None else load_idx(path, split)
        names = list(FASHION_MNIST_CLASSES) if name_or_path == "fashion-mnist" else names
    if max_samples is not None:
        rows = torch.from_numpy(fixed_subset(len(images), max_samples))
        images, labels = images[rows], torch.as_tensor(labels)[rows]
    if not latents:
        images = images if image_size is None else square(images, image_size)
        images = images.repeat(1, 3, 1, 1) if channels == 3 else images
    return ImageDataset(images, labels, names, scaling_factor=scaling_factor)


__all__ = ["ImageDataset", "cache_latents", "load_image_dataset"]
