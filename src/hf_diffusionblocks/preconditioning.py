r"""Preconditioning: from a raw network F to the denoiser D (EDM, arXiv 2206.00364, Table 1).

.. math:: D(z, \sigma) = c_{skip}(\sigma)\, z + c_{out}(\sigma)\, F\big(c_{in}(\sigma)\, z,\; c_{noise}(\sigma)\big)

with the loss weight :math:`w(\sigma) = 1 / c_{out}^2`, which makes the effective target of F of the same size at every
noise level. Three kinds:

``edm``
    for networks trained here; ``c_noise = ln(sigma) / 4``.
``vp_epsilon``
    for pretrained DDPM-style networks that predict the noise at discrete steps (EDM, Table 1, column VP):
    :math:`D = z - \sigma F(z / \sqrt{1 + \sigma^2}, t(\sigma))`, with t the training step whose noise-to-signal ratio
    :math:`\sqrt{(1 - \bar\alpha_t) / \bar\alpha_t}` is sigma.
``rectified_flow``
    for networks that predict the velocity of a straight path (SD3, arXiv 2403.03206, section 2; Flux). With
    :math:`x_t = (1 - t) y + t\,\epsilon` and :math:`v = \epsilon - y`,

    .. math:: z = x_t / (1 - t) = y + \sigma\epsilon, \qquad \sigma = t / (1 - t), \qquad D = x_t - t\,F(x_t, t)

    because :math:`x_t - t v = y`. So ``c_skip = c_in = 1 - t = 1 / (1 + sigma)`` and ``c_out = -t``.

What the network is told, c_noise, is in the units of its timestep embedding; ``sigma_of`` is the way back, by which a
call that names a timestep finds its block.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

PRECONDITIONINGS = ("edm", "vp_epsilon", "rectified_flow")


class Coefficients(NamedTuple):
    """c_skip, c_out, c_in [B] in float32 and c_noise [B], what the network is told about sigma."""

    c_skip: Float[Tensor, "batch"]
    c_out: Float[Tensor, "batch"]
    c_in: Float[Tensor, "batch"]
    c_noise: Float[Tensor, "batch"]


@dataclass(frozen=True)
class EDMPreconditioning:
    """EDM, arXiv 2206.00364, Table 1, last column.

    Args:
        sigma_data: standard deviation of the data (0.5 for images in [-1, 1]).
        noise_scale: factor on ``c_noise`` before the network's timestep embedding. 1 is EDM's; a larger one spreads
            ``ln(sigma) / 4``, which spans about [-1.6, 1.1], over the frequencies of a DDPM timestep embedding.
    """

    sigma_data: float | int = 0.5
    noise_scale: float | int = 1.0

    def __call__(self, sigma: Float[Tensor, "batch"]) -> Coefficients:
        """Coefficients for noise levels [B]."""
        sigma = sigma.to(torch.float32)
        total = sigma**2 + self.sigma_data**2
        return Coefficients(
            c_skip=self.sigma_data**2 / total,
            c_out=sigma * self.sigma_data / total.sqrt(),
            c_in=1 / total.sqrt(),
            c_noise=self.noise_scale * sigma.log() / 4,
        )

    def weight(self, sigma: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """Loss weight ``(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1 / c_out^2``, [B]."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def sigma_of(self, timestep: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """The noise level of ``c_noise / noise_scale``, float64: diffusers' EDM schedulers count ``ln(sigma) / 4``."""
        return (4 * timestep.double()).exp()


@dataclass(frozen=True)
class VPEpsilonPreconditioning:
    """A DDPM's noise prediction as a denoiser (EDM, arXiv 2206.00364, Table 1, column VP).

    Args:
        alphas_cumprod: the training schedule's cumulative signal power, one per step, descending.
    """

    alphas_cumprod: tuple[float, ...]

    @property
    def sigmas(self) -> Float[Tensor, "steps"]:
        """Noise-to-signal ratio of every training step, ascending, float64."""
        alphas = torch.tensor(self.alphas_cumprod, dtype=torch.float64, device="cpu")
        return ((1 - alphas) / alphas).sqrt()

    def timestep(self, sigma: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """t(sigma): the training step whose noise-to-signal ratio is sigma, interpolated in log sigma between steps.

        A sigma that is a step's own (up to float32 rounding) gives that whole step, so that a converted model sees
        the embeddings that it was trained with.
        """
        steps = self.sigmas.log().numpy()
        t = np.interp(sigma.double().log().cpu().numpy(), steps, np.arange(len(steps)))
        whole = np.round(t)
        t = np.where(np.abs(t - whole) < 1e-3, whole, t)
        return torch.from_numpy(np.atleast_1d(t)).to(sigma.device, torch.float32)

    def __call__(self, sigma: Float[Tensor, "batch"]) -> Coefficients:
        """Coefficients for noise levels [B]."""
        t = self.timestep(sigma)
        sigma = sigma.to(torch.float32)
        return Coefficients(c_skip=torch.ones_like(sigma), c_out=-sigma, c_in=1 / (1 + sigma**2).sqrt(), c_noise=t)

    def weight(self, sigma: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """Loss weight ``1 / sigma^2 = 1 / c_out^2``: the plain error of the predicted noise, [B]."""
        return 1 / sigma**2

    def sigma_of(self, timestep: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """The noise-to-signal ratio of training steps, between steps interpolated in log sigma, float64."""
        steps = self.sigmas.log().numpy()
        log_sigma = np.interp(timestep.double().cpu().numpy(), np.arange(len(steps)), steps)
        return torch.from_numpy(np.atleast_1d(np.exp(log_sigma))).to(timestep.device)


@dataclass(frozen=True)
class RectifiedFlowPreconditioning:
    """A velocity on the straight path from data to noise as a denoiser (SD3, arXiv 2403.03206, section 2).

    Args:
        num_train_timesteps: the network is told ``num_train_timesteps * t``, t in [0, 1].
    """

    num_train_timesteps: int = 1000

    def __call__(self, sigma: Float[Tensor, "batch"]) -> Coefficients:
        """Coefficients for noise levels [B]."""
        sigma = sigma.to(torch.float32)
        t = sigma / (1 + sigma)
        return Coefficients(
            c_skip=1 / (1 + sigma), c_out=-t, c_in=1 / (1 + sigma), c_noise=self.num_train_timesteps * t
        )

    def weight(self, sigma: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """Loss weight ``(1 + 1 / sigma)^2 = 1 / t^2 = 1 / c_out^2``: the plain error of the velocity, [B]."""
        return (1 + 1 / sigma) ** 2

    def sigma_of(self, timestep: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """``t / (1 - t)`` of timesteps ``num_train_timesteps * t``, float64; infinite at t = 1, pure noise."""
        t = (timestep.double() / self.num_train_timesteps).clamp(0, 1)
        return t / (1 - t)


Preconditioning = EDMPreconditioning | VPEpsilonPreconditioning | RectifiedFlowPreconditioning


def expand(coefficient: Float[Tensor, "batch"], like: Tensor) -> Tensor:
    """A per-sample coefficient [B] shaped [B, 1, ..., 1] for a batch of samples."""
    return coefficient.reshape(-1, *([1] * (like.ndim - 1)))
