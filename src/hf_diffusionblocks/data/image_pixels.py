"""From a cell of a table to pixels of one size: uint8 [C, H, W]."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MODES = {1: "L", 3: "RGB"}  # PIL's, by number of channels


class _OtherModeError(ValueError):
    """An image in order, of colours that do not fit the others."""


def square(images: Tensor, size: int) -> Tensor:
    """Central square of uint8 images [N, C, H, W], resized to [N, C, size, size]."""
    side = min(images.shape[-2:])
    top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
    images = images[..., top : top + side, left : left + side]
    return images if side == size else F.interpolate(images, (size, size), mode="bicubic", antialias=True)


def decode_cell(value: Any, row: int, mode: str | None, strict: bool) -> Tensor:
    """uint8 pixels [C, H, W] of one cell: encoded bytes, a path, an array [H, W] or [H, W, C], or a PIL image."""
    import datasets

    if isinstance(value, (bytes, str)):
        value = {"bytes": value, "path": None} if isinstance(value, bytes) else {"bytes": None, "path": value}
    path = f" ({value['path']})" if isinstance(value, dict) and value.get("path") else ""
    try:
        if value is None:
            raise ValueError("the cell is empty")
        if isinstance(value, (list, np.ndarray)):
            value = Image.fromarray(np.asarray(value, dtype=np.uint8))
        image = datasets.Image().decode_example(value)  # also turns it as its EXIF orientation says
        coloured = len(image.getbands()) >= 3 or image.mode in ("P", "PA")
        mode = mode or ("RGB" if coloured else "L")
        if image.mode[0] in "IF":
            raise _OtherModeError(f"mode {image.mode} has more than 8 bits per channel; convert it to 8 bits first")
        if strict and mode == "L" and coloured:
            raise _OtherModeError(
                f"it has mode {image.mode} but the first image is grey; give channels=1 or channels=3"
            )
        pixels = np.array(image.convert(mode))
    except _OtherModeError as err:
        raise ValueError(f"the image of row {row}{path} cannot be read: {err}.") from err
    except Exception as err:  # each of PIL's codecs has errors of its own
        raise ValueError(f"the image of row {row}{path} cannot be read: {err}. Remove or replace it.") from err
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
