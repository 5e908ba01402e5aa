r"""The mask rate of masked diffusion: its schedule alpha(t), the weight of its loss, and how training draws it.

Masked diffusion (MD4, Shi et al. 2024, arXiv 2406.04329; DiffusionBlocks, arXiv 2506.14202, App. D) hides each token
with probability ``1 - alpha(t)``, with alpha falling from 1 at t = 0 to 0 at t = 1. Its loss in continuous time

.. math:: \int_0^1 \frac{-\alpha'(t)}{1 - \alpha(t)}\, E\Big[\sum_{i\ masked} -\log p(x_i | z_t)\Big]\, dt

bounds ``-log p(x)``. Put ``m = 1 - alpha(t)``, the mask rate: ``-alpha' dt = dm``, so it is the integral over m from 0
to 1 of ``E[sum] / m``, whatever the schedule is. The schedule decides where along m a run looks, which is the
variance of the estimate and the grid of sampling. The mass of the loss is uniform in m: that is the noise level of this
family, and ``MaskNoise`` the distribution whose equal shares are the blocks' ranges.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .suggest import unknown_name


class LinearSchedule:
    """``alpha = 1 - t`` (MD4, arXiv 2406.04329, Table 1)."""

    def alpha(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Share of tokens that are not masked at time t in [0, 1]."""
        return 1 - t

    def time(self, alpha: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Inverse of ``alpha``."""
        return 1 - alpha

    def derivative(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """``alpha'(t)``, not positive."""
        return -torch.ones_like(t)

    def weight(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """``-alpha'(t) / (1 - alpha(t)) = 1 / t``, the weight of a masked token's cross-entropy."""
        return 1 / t


class CosineSchedule:
    """``alpha = 1 - cos(pi / 2 (1 - t))`` (MD4, arXiv 2406.04329, Table 1).

    Uniform t puts more draws at high mask rates than the linear schedule: their density there is
    ``1 / |alpha'| = 2 / (pi sin(pi / 2 (1 - t)))``.
    """

    def alpha(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Share of tokens that are not masked at time t in [0, 1]."""
        return 1 - torch.cos(math.pi / 2 * (1 - t))

    def time(self, alpha: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Inverse of ``alpha``."""
        return 1 - 2 / math.pi * torch.acos((1 - alpha).clamp(0, 1))

    def derivative(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """``alpha'(t)``, not positive."""
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))

    def weight(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """``-alpha'(t) / (1 - alpha(t)) = pi / 2 tan(pi / 2 (1 - t))``, as of the linear schedule."""
        return math.pi / 2 * torch.tan(math.pi / 2 * (1 - t))


MaskSchedule = LinearSchedule | CosineSchedule
_SCHEDULES: dict[str, type[MaskSchedule]] = {"linear": LinearSchedule, "cosine": CosineSchedule}
SCHEDULES = tuple(_SCHEDULES)


def make_schedule(name: str) -> MaskSchedule:
    """The schedule of a name: ``linear`` or ``cosine``.

    Raises:
        ValueError: for another name.
    """
    if name not in _SCHEDULES:
        raise ValueError(unknown_name("schedule", name, SCHEDULES))
    return _SCHEDULES[name]()


@dataclass(frozen=True)
class MaskNoise:
    """Mask rates, uniform in [0, 1]: the distribution that the loss weighs them by, whatever the schedule.

    It has the place of ``LogNormalNoise`` in a partition: the noise level of a row is
    the probability m = 1 - alpha with which each of its tokens is hidden. With B equal shares block b owns m between
    ``1 - (b + 1) / B`` and ``1 - b / B``, so block 0 sees the rows with most tokens hidden.

    Example:
        >>> MaskNoise().icdf(0.25).item()
        0.25
    """

    sigma_min: ClassVar[float] = 0.0
    sigma_max: ClassVar[float] = 1.0
    symbol: ClassVar[str] = "mask rate"

    def cdf(self, sigma: Float[Tensor, "..."] | float | int) -> Float[Tensor, "..."]:
        """Share at or below a mask rate: the mask rate itself, clamped to [0, 1]; float64."""
        return torch.as_tensor(sigma, dtype=torch.float64).clamp(0, 1)

    def icdf(self, q: Float[Tensor, "..."] | float | int) -> Float[Tensor, "..."]:
        """Mask rate below which the share q lies, float64.

        Raises:
            ValueError: if a share lies outside [0, 1].
        """
        q = torch.as_tensor(q, dtype=torch.float64)
        if not bool(((q >= 0) & (q <= 1)).all()):
            raise ValueError(f"q must lie in [0, 1], got values from {float(q.min())} to {float(q.max())}.")
        return q

    def sample(
        self,
        shape: tuple[int, ...] | int,
        low: float | int | None = None,
        high: float | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "..."]:
        """Mask rates, uniform in ``[low, high]``, float64 [shape]."""
        low, high = 0.0 if low is None else low, 1.0 if high is None else high
        shape = (shape,) if isinstance(shape, int) else shape
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")

    def widened(self, low: float, high: float, overlap: float | int) -> tuple[float, float]:
        """A range with ``overlap`` of its width added at both ends, clamped to [0, 1].

        The paper's factor (arXiv 2506.14202, App. C) adds that share of a range's width in log sigma; here the noise
        level is linear.
        """
        more = overlap * (high - low)
        return max(low - more, 0.0), min(high + more, 1.0)


def stratified_rates(
    schedule: MaskSchedule,
    low: float,
    high: float,
    rows: int,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    r"""Mask rates of a range for the rows of a batch, by a schedule and with low variance.

    t is spread evenly over the range ``[t(low), t(high)]``: row i has the offset ``(u + i / rows) mod 1``, with one
    uniform u for all (Kingma et al. 2021, arXiv 2107.00630, App. I.1), and by itself is uniform.

    Args:
        schedule: gives ``m = 1 - alpha(t)``.
        low: smallest mask rate.
        high: largest mask rate, above it.
        rows: how many to draw.
        generator: a CPU generator.

    Returns:
        Mask rates, and weights ``-alpha'(t) (t(high) - t(low)) / (high - low)``, with which a mean over rows is a mean
        over mask rates that are uniform in the range; all 1 for the linear schedule. float64.
    """
    ends = torch.tensor([low, high], dtype=torch.float64, device="cpu")
    first, last = schedule.time(1 - ends)
    offset = torch.rand((), generator=generator, dtype=torch.float64, device="cpu")
    places = (offset + torch.arange(rows, dtype=torch.float64, device="cpu") / rows) % 1
    t = first + (last - first) * places
    weights = -schedule.derivative(t) * (last - first) / (high - low)
    return (1 - schedule.alpha(t)).clamp(low, high), weights


def draw_masks(
    rates: Float[Tensor, "rows"],
    maskable: Bool[Tensor, "rows tokens"],
    generator: torch.Generator | None = None,
    *,
    at_least_one: bool = True,
) -> tuple[Bool[Tensor, "rows tokens"], Float[Tensor, "rows"]]:
    r"""Which tokens to hide, and what to multiply the sum of their cross-entropies with.

    With ``at_least_one=False`` each token is hidden alone with probability m, and the sum is divided by m, as the loss
    is written. At small m most rows then have no hidden token and a few count 1 / m times: the variance of the
    integral over m is infinite. With ``at_least_one`` one token, drawn uniformly, is hidden for sure and the others
    with probability m. That is the same expectation, because

    .. math:: \frac{1}{m} E\Big[\sum_i 1[i\ masked]\, c_i\Big] = \sum_i E[c_i \mid i\ masked]

    and, given which tokens are hidden, each of them is equally likely to be the sure one, so their mean times the
    number T of tokens estimates the right-hand side. Every row counts the same, whatever m.

    Args:
        rates: m of each row.
        maskable: tokens that may be hidden; the others stay.
        generator: a CPU generator.
        at_least_one: see above.

    Returns:
        Which are hidden; and factors whose product with the sum over a row's hidden tokens estimates ``E[sum] / m`` of
        that row, in nats: ``T / (number hidden)``, or ``1 / m``. A row without maskable tokens has none hidden and the
        factor 0. On the device of ``maskable``, float64.
    """
    (rows, tokens), device = maskable.shape, maskable.device
    u = torch.rand(rows, tokens, generator=generator, dtype=torch.float64, device="cpu").to(device)
    choice = torch.rand(rows, tokens, generator=generator, dtype=torch.float64, device="cpu").to(device)
    rates = rates.double().to(device)
    hidden = (u < rates[:, None]) & maskable
    if not at_least_one:
        return hidden, 1 / rates
    sure = choice.masked_fill(~maskable, -1.0).argmax(-1)[:, None] == torch.arange(tokens, device=device)
    hidden = (hidden | sure) & maskable
    return hidden, maskable.sum(-1) / hidden.sum(-1).clamp_min(1).double()


__all__ = [
    "SCHEDULES",
    "CosineSchedule",
    "LinearSchedule",
    "MaskNoise",
    "MaskSchedule",
    "draw_masks",
    "make_schedule",
    "stratified_rates",
]
