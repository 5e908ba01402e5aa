"""RandAugment (Cubuk et al., arXiv 1909.13719): ``num_ops`` operations per image, drawn evenly, of one strength.

Operations and strengths are torchvision's (``num_ops=2``, ``magnitude=9`` of 0 to 30), which are AutoAugment's; what an
operation makes of an image is what PIL makes of it, in every pixel. All images of a batch that drew the same operation
pass it together, on their own device. With m = magnitude / 30:

=================  ==========================================  ======
operation          strength                                    signed
=================  ==========================================  ======
identity
shear x, y         0.3 m                                       yes
translate x, y     150 / 331 m of the width, height            yes
rotate             30 m degrees                                yes
brightness, ...    factor 1 + 0.9 m (brightness, colour,       yes
                   contrast, sharpness)
posterize          8 - round(4 m) bits
solarize           values from 255 (1 - m) on are inverted
autocontrast
equalize
=================  ==========================================  ======

A signed strength is positive or negative with probability 1/2 each. Pixels that come from outside are black.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

Pixels = UInt8[Tensor, "batch channels height width"]
_FIXED = 1 << 16  # PIL walks along an affine map in steps of 2^-16


@dataclass(frozen=True)
class RandAugment:
    """Random operations on a batch of images.

    Args:
        num_ops: operations per image, one after the other.
        magnitude: strength of all of them, 0 to ``num_magnitude_bins`` - 1.
        num_magnitude_bins: how many strengths there are.

    Raises:
        ValueError: for a number that is not whole or outside its range.

    Example:
        >>> images = torch.rand(4, 3, 32, 32) * 2 - 1
        >>> RandAugment()(images, torch.Generator().manual_seed(0)).shape
        torch.Size([4, 3, 32, 32])
    """

    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31

    def __post_init__(self) -> None:
        for name, low, high in (
            ("num_ops", 0, None),
            ("num_magnitude_bins", 2, None),
            ("magnitude", 0, self.num_magnitude_bins - 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low or (high and value > high):
                limits = f"of at least {low}" if high is None else f"from {low} to {high}"
                raise ValueError(f"{name}={value!r} must be a whole number {limits}.")

    def draw(
        self, batch: int, generator: torch.Generator | None = None
    ) -> tuple[Int64[Tensor, "batch num_ops"], Float[Tensor, "batch num_ops"]]:
        """The operations of each image, as indices into ``OPERATIONS``, and signs of their strengths; on the CPU."""
        shape = (batch, self.num_ops)
        chosen = torch.randint(len(OPERATIONS), shape, generator=generator)
        return chosen, 1.0 - 2.0 * torch.randint(2, shape, generator=generator)

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch channels height width"]:
        """Images in [-1, 1], of 1 channel or 3, after their operations; rounded to 256 values between.

        Args:
            images: in [-1, 1].
            generator: on the CPU; what is drawn depends on it alone, not on the images' device.

        Raises:
            ValueError: for images with another number of channels.
        """
        if images.shape[1] not in (1, 3):
            raise ValueError(f"images have {images.shape[1]} channels: RandAugment changes grey (1) or RGB (3) images.")
        pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        chosen, signs = self.draw(len(images), generator)
        m = self.magnitude / (self.num_magnitude_bins - 1)
        for i in range(self.num_ops):
            for index, operation in enumerate(OPERATIONS.values()):
                for sign in (1.0, -1.0):
                    rows = ((chosen[:, i] == index) & (signs[:, i] == sign)).nonzero()[:, 0].to(images.device)
                    if len(rows):
                        pixels[rows] = operation(pixels[rows], m, sign)
        return (pixels.to(images.dtype) / 127.5) - 1


Operation = Callable[[Pixels, float, float], Pixels]  # images, m, sign


def affine(images: Pixels, a: float, b: float, c: float, d: float, e: float, f: float) -> Pixels:
    """The pixel at (x, y) is the one at (a x + b y + c, d x + e y + f), centres counted; the nearest, or black."""
    height, width = images.shape[2:]
    fixed = [math.floor(v * _FIXED + 0.5) for v in (a, b, c + 0.5 * a + 0.5 * b, d, e, f + 0.5 * d + 0.5 * e)]
    y, x = (torch.arange(n, device=images.device) for n in (height, width))
    x, y = x[None, :], y[:, None]
    from_x, from_y = (fixed[k] * x + fixed[k + 1] * y + fixed[k + 2] for k in (0, 3))
    from_x, from_y = from_x >> 16, from_y >> 16
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    found = images[:, :, from_y.clamp(0, height - 1), from_x.clamp(0, width - 1)]
    return found * inside


def _rotate(images: Pixels, m: float, sign: float) -> Pixels:
    angle = -math.radians(sign * 30 * m % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = images.shape[3] / 2, images.shape[2] / 2  # about the centre
    return affine(images, cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


def _translate(images: Pixels, m: float, sign: float, axis: int) -> Pixels:
    by = int(150 / 331 * images.shape[2 + axis] * m)
    return affine(images, 1, 0, -sign * by * axis, 0, 1, -sign * by * (1 - axis))


def blend(degenerate: Pixels, images: Pixels, factor: float) -> Pixels:
    """degenerate + factor (images - degenerate), cut off to whole numbers in [0, 255]."""
    start = degenerate.float()
    return (start + factor * (images.float() - start)).clamp(0, 255).to(torch.uint8)


def grey(images: Pixels) -> Pixels:
    """ITU-R 601 luma [batch, 1, height, width]."""
    if images.shape[1] == 1:
        return images
    r, g, b = images.to(torch.int32).split(1, dim=1)
    return ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).to(torch.uint8)


def _black(images: Pixels) -> Pixels:
    return torch.zeros_like(images)


def _mean_grey(images: Pixels) -> Pixels:
    mean = grey(images).double().mean((1, 2, 3), keepdim=True)
    return (mean + 0.5).to(torch.uint8).expand_as(images)


def _grey_colour(images: Pixels) -> Pixels:
    return grey(images).expand_as(images)


def _smooth(images: Pixels) -> Pixels:
    """The mean of each pixel, five times, and its eight neighbours; pixels at the border stay."""
    if min(images.shape[2:]) < 3:
        return images
    kernel = torch.ones(1, 1, 3, 3, device=images.device)
    kernel[0, 0, 1, 1] = 5
    flat = images.flatten(0, 1)[:, None].float()
    total = F.conv2d(flat, kernel).round().to(torch.int32)  # sums of whole numbers
    smoothed = images.clone()
    smoothed[:, :, 1:-1, 1:-1] = ((2 * total + 13) // 26).to(torch.uint8).view(*images.shape[:2], *total.shape[2:])
    return smoothed


def _enhance(degenerate: Callable[[Pixels], Pixels]) -> Operation:
    return lambda images, m, sign: blend(degenerate(images), images, 1 + sign * 0.9 * m)


def _posterize(images: Pixels, m: float, sign: float) -> Pixels:
    dropped = round(4 * m)
    return images >> dropped << dropped


def _solarize(images: Pixels, m: float, sign: float) -> Pixels:
    return torch.where(images < 255 * (1 - m), images, 255 - images)


def _look_up(table: UInt8[Tensor, "batch channels 256"], images: Pixels) -> Pixels:
    return table.gather(2, images.flatten(2).long()).view_as(images)


def _autocontrast(images: Pixels, m: float, sign: float) -> Pixels:
    low, high = (v.double()[..., None] for v in images.flatten(2).aminmax(dim=2))
    scale = 255 / (high - low)
    values = torch.arange(256, device=images.device, dtype=torch.float64)
    stretched = torch.where(high > low, (values * scale - low * scale).clamp(0, 255), values)
    return _look_up(stretched.to(torch.uint8), images)


def _equalize(images: Pixels, m: float, sign: float) -> Pixels:
    flat = images.flatten(2).long()
    counts = flat.new_zeros(*flat.shape[:2], 256).scatter_add_(2, flat, torch.ones_like(flat))
    last = counts.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - last) // 255
    before = counts.cumsum(2) - counts
    table = (before + step // 2) // step.clamp(min=1)
    values = torch.arange(256, device=images.device)
    return _look_up(torch.where(step > 0, table.clamp(0, 255), values).to(torch.uint8), images)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda images, m, sign: images,
    "shear_x": lambda images, m, sign: affine(images, 1, sign * 0.3 * m, 0, 0, 1, 0),
    "shear_y": lambda images, m, sign: affine(images, 1, 0, 0, sign * 0.3 * m, 1, 0),
    "translate_x": lambda images, m, sign: _translate(images, m, sign, axis=1),
    "translate_y": lambda images, m, sign: _translate(images, m, sign, axis=0),
    "rotate": _rotate,
    "brightness": _enhance(_black),
    "colour": _enhance(_grey_colour),
    "contrast": _enhance(_mean_grey),
    "sharpness": _enhance(_smooth),
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
