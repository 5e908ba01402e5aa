r"""NoProp's noise schedules (Li, Teh, Pascanu, arXiv 2503.24322), in the paper's symbols and the paper's direction.

Time runs from noise (t = 0) to the label embedding (t = T, or 1):

.. math:: q(z_t | y) = N\big(z_t;\; \sqrt{\bar\alpha_t}\, u_y,\; (1 - \bar\alpha_t) I\big), \qquad
          SNR(t) = \bar\alpha_t / (1 - \bar\alpha_t),

so alpha_bar and the SNR grow with t. The backward process q(z_{t-1} | z_t) = N(sqrt(alpha_{t-1}) z_t, 1 - alpha_{t-1})
gives alpha_bar_{t-1} = alpha_{t-1} alpha_bar_t, and its reversal given u_y is Gaussian with mean a_t u_y + b_t z_{t-1}
and variance c_t, where

.. math:: a_t = \frac{\sqrt{\bar\alpha_t} (1 - \alpha_{t-1})}{1 - \bar\alpha_{t-1}}, \quad
          b_t = \frac{\sqrt{\alpha_{t-1}} (1 - \bar\alpha_t)}{1 - \bar\alpha_{t-1}}, \quad
          c_t = \frac{(1 - \bar\alpha_t)(1 - \alpha_{t-1})}{1 - \bar\alpha_{t-1}}.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def cosine_alpha_bar(num_blocks: int, offset: float | int = 0.008) -> Float[Tensor, "levels"]:
    """The cosine schedule (Nichol and Dhariwal, arXiv 2102.09672, Eq. 17), reversed into NoProp's direction.

    ``alpha_bar_t = cos((1 - t / T + s) / (1 + s) pi / 2)^2``. It starts at 0, pure noise. It is not divided by its
    value at the end, which would make that 1 and the SNR infinite: the offset leaves an SNR of
    1 / tan(s / (1 + s) pi / 2)^2, about 6400, so that every block has a finite weight and the last step adds next to no
    noise.

    Args:
        num_blocks: T, at least 1.
        offset: s, positive.

    Returns:
        alpha_bar_0, ..., alpha_bar_T: float64, ascending.

    Raises:
        ValueError: for fewer than 1 block or an offset that is not positive.
    """
    if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or num_blocks < 1:
        raise ValueError(f"num_blocks={num_blocks!r} must be a whole number of at least 1.")
    if not offset > 0:
        raise ValueError(f"offset={offset!r} must be positive: without it the last SNR is infinite.")
    t = torch.arange(num_blocks + 1, dtype=torch.float64, device="cpu")
    angle = (1 - t / num_blocks + offset) / (1 + offset) * math.pi / 2
    return angle.cos().square()


def signal_to_noise(alpha_bar: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``SNR = alpha_bar / (1 - alpha_bar)``."""
    return alpha_bar / (1 - alpha_bar)


def step_coefficients(alpha_bar: Float[Tensor, "levels"]) -> Float[Tensor, "three steps"]:
    """a_t, b_t and c_t of each step t = 1, ..., T, from alpha_bar_0, ..., alpha_bar_T."""
    before, after = alpha_bar[:-1], alpha_bar[1:]
    alpha = before / after  # alpha_{t-1}
    a = after.sqrt() * (1 - alpha) / (1 - before)
    b = alpha.sqrt() * (1 - after) / (1 - before)
    c = (1 - after) * (1 - alpha) / (1 - before)
    return torch.stack([a, b, c])


def noised(
    u: Float[Tensor, "batch dim"], alpha_bar: Float[Tensor, "#batch"], noise: Float[Tensor, "batch dim"]
) -> Float[Tensor, "batch dim"]:
    """A sample of q(z_t | y): ``sqrt(alpha_bar) u + sqrt(1 - alpha_bar) noise``."""
    alpha_bar = alpha_bar.to(u)[:, None]
    return alpha_bar.sqrt() * u + (1 - alpha_bar).sqrt() * noise


def divergence_from_prior(u: Float[Tensor, "batch dim"], alpha_bar_0: Float[Tensor, ""]) -> Float[Tensor, "batch"]:
    """``KL(q(z_0 | y) || N(0, I))`` in nats: the second term of the paper's losses.

    ``1/2 (alpha_bar_0 |u_y|^2 - d alpha_bar_0 - d ln(1 - alpha_bar_0))``.
    """
    dim = u.shape[-1]
    alpha_bar_0 = alpha_bar_0.to(u)
    return 0.5 * (alpha_bar_0 * u.square().sum(-1) - dim * alpha_bar_0 - dim * torch.log1p(-alpha_bar_0))


class LearnedSchedule(nn.Module):
    r"""The learned schedule of NoProp-CT (arXiv 2503.24322, App. B).

    .. math:: SNR(t) = e^{-\gamma(t)}, \quad \gamma(t) = \gamma_0 + (\gamma_1 - \gamma_0) (1 - \bar\gamma(t)), \quad
              \bar\gamma(t) = \frac{\tilde\gamma(t) - \tilde\gamma(0)}{\tilde\gamma(1) - \tilde\gamma(0)},

    with gamma_tilde a network whose weights are positive, so that it grows with t and the SNR does too:
    ``gamma_tilde(t) = w t + sum_j v_j sigmoid(r_j t + s_j)`` (as in variational diffusion models, arXiv 2107.00630,
    App. H). ``alpha_bar = sigmoid(-gamma)``.

    Args:
        hidden: number of sigmoids.
        gamma_0: -ln SNR at t = 1, learned.
        gamma_1: -ln SNR at t = 0, learned.

    Raises:
        ValueError: unless ``gamma_0 < gamma_1``.
    """

    def __init__(self, hidden: int = 64, gamma_0: float = -5.0, gamma_1: float = 5.0):
        super().__init__()
        if not gamma_0 < gamma_1:
            raise ValueError(f"gamma_0={gamma_0} must lie below gamma_1={gamma_1}: the SNR grows with time.")
        self.ends = nn.Parameter(torch.tensor([gamma_0, gamma_1]))
        self.linear = nn.Parameter(torch.zeros(()))  # softplus of it is w
        self.scale = nn.Parameter(torch.full((hidden,), -math.log(hidden)))  # of it: v
        self.rate = nn.Parameter(torch.randn(hidden))  # of it: r
        self.shift = nn.Parameter(torch.randn(hidden))

    def forward(self, t: Float[Tensor, "times"]) -> tuple[Float[Tensor, "times"], Float[Tensor, "times"]]:
        """-ln SNR at times in [0, 1], and its derivative by time, which is negative."""
        ends = t.new_tensor([0.0, 1.0])
        value, slope = self._monotone(t)
        (low, high), _ = self._monotone(ends)
        gamma_0, gamma_1 = self.ends
        gamma = gamma_0 + (gamma_1 - gamma_0) * (1 - (value - low) / (high - low))
        return gamma, -(gamma_1 - gamma_0) * slope / (high - low)

    def alpha_bar(self, t: Float[Tensor, "times"]) -> Float[Tensor, "times"]:
        """``sigmoid(-gamma(t))``."""
        return torch.sigmoid(-self(t)[0])

    def snr_slope(self, t: Float[Tensor, "times"]) -> Float[Tensor, "times"]:
        """SNR'(t) = -gamma'(t) exp(-gamma(t)), positive."""
        gamma, slope = self(t)
        return -slope * torch.exp(-gamma)

    def _monotone(self, t: Tensor) -> tuple[Tensor, Tensor]:
        w, v, r = F.softplus(self.linear), F.softplus(self.scale), F.softplus(self.rate)
        s = torch.sigmoid(r * t[:, None] + self.shift)
        return w * t + s @ v, w + (s * (1 - s)) @ (v * r)
