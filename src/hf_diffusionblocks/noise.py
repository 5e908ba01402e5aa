r"""The noise distribution p(sigma) and the inference grids.

Training draws ``log sigma ~ N(p_mean, p_std^2)``, truncated to ``[sigma_min, sigma_max]`` (EDM, arXiv 2206.00364,
Table 1; DiffusionBlocks, arXiv 2506.14202, section 3.3). With ``Phi`` the standard normal distribution function and

.. math:: u(\sigma) = \Phi\big((\ln\sigma - P_{mean}) / P_{std}\big)

the truncated distribution has ``cdf(sigma) = (u(sigma) - u(sigma_min)) / (u(sigma_max) - u(sigma_min))``. A block that
owns ``[low, high]`` draws from the same density renormalised there: uniform in cdf space, then ``icdf``.

Everything is computed in float64: the upper tail of the default distribution holds 1.6e-6 of the mass.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LogNormalNoise:
    """Log-normal noise levels truncated to ``[sigma_min, sigma_max]`` (arXiv 2506.14202, section 3.3).

    Args:
        p_mean: mean of ``ln sigma``.
        p_std: standard deviation of ``ln sigma``, positive.
        sigma_min: smallest noise level, positive, in units of the data.
        sigma_max: largest noise level, above ``sigma_min``.

    Raises:
        ValueError: if a value is not finite, ``p_std`` is not positive or the range is empty.

    Example:
        >>> noise = LogNormalNoise()
        >>> round(float(noise.icdf(0.5)), 9)
        0.301200103
    """

    symbol: ClassVar[str] = "sigma"

    p_mean: float | int = -1.2
    p_std: float | int = 1.2
    sigma_min: float | int = 0.002
    sigma_max: float | int = 80.0

    def __post_init__(self) -> None:
        for name in ("p_mean", "p_std", "sigma_min", "sigma_max"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r} is not a finite number. Give a real number.")
        if self.p_std <= 0:
            raise ValueError(f"p_std={self.p_std} must be positive: it is the standard deviation of ln sigma.")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min={self.sigma_min} and sigma_max={self.sigma_max} must satisfy 0 < sigma_min < sigma_max."
            )
        u_low, u_high = self._u_range
        if not u_low < u_high:
            raise ValueError(
                f"no probability mass lies in [{self.sigma_min}, {self.sigma_max}] for p_mean={self.p_mean}, "
                f"p_std={self.p_std}: move p_mean towards ln of that range."
            )

    @property
    def _u_range(self) -> tuple[float, float]:
        return self._u(self.sigma_min), self._u(self.sigma_max)

    def _u(self, sigma: float | int) -> float:
        z = torch.tensor((math.log(sigma) - self.p_mean) / self.p_std, dtype=torch.float64, device="cpu")
        return float(torch.special.ndtr(z))

    def cdf(self, sigma: Float[Tensor, "..."] | float | int) -> Float[Tensor, "..."]:
        """Share of the truncated distribution at or below ``sigma``; 0 at ``sigma_min``, 1 at ``sigma_max``.

        Args:
            sigma: noise levels of any shape. Values outside the range are clamped to it.

        Returns:
            float64 tensor of the same shape, in [0, 1].
        """
        sigma = _float64(sigma).clamp(self.sigma_min, self.sigma_max)
        u_low, u_high = self._u_range
        q = (torch.special.ndtr((sigma.log() - self.p_mean) / self.p_std) - u_low) / (u_high - u_low)
        return q.clamp(0, 1)  # torch's and math's logarithms may differ in the last place

    def icdf(self, q: Float[Tensor, "..."] | float | int) -> Float[Tensor, "..."]:
        """Noise level below which the share ``q`` of the truncated distribution lies (inverse of ``cdf``).

        ``sigma = exp(p_mean + p_std * ndtri(u))``, ``u = u_min + (u_max - u_min) q`` (arXiv 2506.14202, section 3.3).

        Args:
            q: shares in [0, 1], any shape.

        Returns:
            float64 tensor of the same shape, in ``[sigma_min, sigma_max]``.

        Raises:
            ValueError: if a share lies outside [0, 1].
        """
        q = _float64(q)
        if not bool(((q >= 0) & (q <= 1)).all()):
            raise ValueError(f"q must lie in [0, 1], got values from {float(q.min())} to {float(q.max())}.")
        u_low, u_high = self._u_range
        sigma = (self.p_mean + self.p_std * torch.special.ndtri(u_low + (u_high - u_low) * q)).exp()
        return sigma.clamp(self.sigma_min, self.sigma_max)

    def widened(self, low: float, high: float, overlap: float | int) -> tuple[float, float]:
        """``[low / alpha, alpha high]``, ``alpha = (high / low)^gamma``, clamped to the whole range (App. C)."""
        alpha = (high / low) ** overlap
        return max(low / alpha, self.sigma_min), min(high * alpha, self.sigma_max)

    def sample(
        self,
        shape: tuple[int, ...] | int,
        low: float | int | None = None,
        high: float | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "..."]:
        """Draw noise levels from the density renormalised to ``[low, high]`` (arXiv 2506.14202, section 3.3).

        Args:
            shape: shape of the result.
            low: lower end of the range, default ``sigma_min``.
            high: upper end, default ``sigma_max``.
            generator: a CPU generator; the draw is made on the CPU so that it is the same on every device.

        Returns:
            float64 tensor of the given shape, every value in ``[low, high]``.

        Raises:
            ValueError: if the range is empty or leaves ``[sigma_min, sigma_max]``.
        """
        low = self.sigma_min if low is None else float(low)
        high = self.sigma_max if high is None else float(high)
        if not self.sigma_min <= low <= high <= self.sigma_max:
            raise ValueError(
                f"[low, high] = [{low}, {high}] must be a range inside [{self.sigma_min}, {self.sigma_max}]."
            )
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        q_low, q_high = self.cdf(low), self.cdf(high)
        q = q_low + (q_high - q_low) * torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
        return self.icdf(q.clamp(0, 1)).clamp(low, high)


def karras_grid(
    num_steps: int, sigma_min: float | int, sigma_max: float | int, rho: float | int = 7.0
) -> Float[Tensor, "num_steps"]:
    """The EDM inference grid (EDM, arXiv 2206.00364, Eq. 5), without the final zero.

    Args:
        num_steps: number of noise levels N >= 1; with one level the grid is ``[sigma_max]``.
        sigma_min: last noise level.
        sigma_max: first noise level.
        rho: warping exponent; 7 is EDM's choice.

    Returns:
        float64 tensor [N], descending from ``sigma_max`` to ``sigma_min``.

    Raises:
        ValueError: if ``num_steps`` is below 1.
    """
    _check_steps(num_steps)
    if num_steps == 1:
        return _float64([sigma_max])
    i = torch.linspace(0, 1, num_steps, dtype=torch.float64, device="cpu")
    start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (start + i * (end - start)) ** rho
    sigmas[0], sigmas[-1] = sigma_max, sigma_min  # rounding of the powers must not leave the range
    return sigmas


def equal_probability_grid(num_steps: int, noise: LogNormalNoise) -> Float[Tensor, "num_steps"]:
    """Noise levels with the same training mass between neighbours (arXiv 2506.14202, section 3.3).

    Args:
        num_steps: number of noise levels N >= 1.
        noise: the training distribution.

    Returns:
        float64 tensor [N], descending from ``sigma_max`` to ``sigma_min``; 3 points of the default distribution are
        80, 0.301200103, 0.002.
    """
    _check_steps(num_steps)
    if num_steps == 1:
        return _float64([noise.sigma_max])
    return noise.icdf(torch.linspace(1, 0, num_steps, dtype=torch.float64, device="cpu"))


def _float64(value: Tensor | float | int | list[float | int]) -> Tensor:
    # Numbers stay on the CPU whatever the default device is: models are built on the meta device.
    return value.double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")


def _check_steps(num_steps: int) -> None:
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_inference_steps={num_steps!r} must be a whole number of at least 1.")
