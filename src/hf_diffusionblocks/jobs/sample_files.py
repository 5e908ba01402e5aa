"""Samples as files, written as they are drawn."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..evaluation import sample_images
from ..pipelines import BlockedDiTPipeline

_AT_A_TIME = 50


def write_samples(
    pipe: BlockedDiTPipeline, labels: Tensor, folder: Path, generator: torch.Generator, **walk: Any
) -> tuple[Tensor, list[Path]]:
    """Draw an image per label, and write each part of them as a PNG file each as soon as it is drawn.

    Args:
        pipe: samples.
        labels: [N].
        folder: that is there.
        generator: of the noise.
        **walk: for ``sample_images``.

    Returns:
        The images in [0, 1], [N, channels, height, width], and their files.

    Raises:
        KeyboardInterrupt: saying how many were written, if the user stops it.
    """
    images: list[Tensor] = []
    paths: list[Path] = []
    try:
        for part in labels.split(_AT_A_TIME):
            images.append(sample_images(pipe, part, generator=generator, progress=len(labels) > _AT_A_TIME, **walk))
            for picture in pipe.numpy_to_pil(images[-1].permute(0, 2, 3, 1).numpy()):
                path = folder / f"{len(paths):05d}-class-{int(labels[len(paths)])}.png"
                picture.save(path)
                paths.append(path)
    except KeyboardInterrupt as error:
        drawn = f"{len(paths)} of {len(labels)} images are in {folder}." if paths else "No image was drawn yet."
        raise KeyboardInterrupt(drawn) from error
    return torch.cat(images), paths


__all__ = ["write_samples"]
