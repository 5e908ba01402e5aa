r"""The likelihood of a denoiser with categorical targets: a bound in nats, and the share of each block.

A class y has the embedding e_y; ``z_sigma = e_y + sigma eps`` with ``eps ~ N(0, I)``. A denoiser gives p(k | x, z,
sigma) and with it ``D(x, z, sigma) = sum_k p_k e_k``. Read as a generative model it starts at ``z ~ N(0, sigma_max^2
I)``, walks down the noise levels, each step drawn as if D were the clean target, and at sigma_min draws
``y ~ p(k | x, z, sigma_min)``. The evidence lower bound of that walk (Kingma et al. 2021, "Variational diffusion
models", arXiv 2107.00630, Eqs. 11 to 17, here in variance-exploding form):

1. Given y, the level ``t < s`` follows from s as a Gaussian with mean ``r z_s + (1 - r) e_y``, ``r = t^2 / s^2``, and
   variance ``t^2 (1 - r)``. The model's step has D in the place of e_y. Their Kullback-Leibler divergence is
   ``(1 - r)^2 ||e_y - D||^2 / (2 t^2 (1 - r)) = (t^-2 - s^-2) / 2 ||e_y - D(z_s)||^2``.
2. Over ever smaller steps the sum of these becomes ``int 1/2 ||e_y - D||^2 d(sigma^-2)``. With what both ends cost,

   .. math:: -\log p(y | x) \le \int_{\sigma_{min}}^{\sigma_{max}} \sigma^{-3}\, E\|e_y - D(x, z_\sigma,
       \sigma)\|^2\, d\sigma + E[-\log p(y | x, z_{\sigma_{min}}, \sigma_{min})] + \|e_y\|^2 / (2 \sigma_{max}^2)

It holds for any denoiser, for each token. Cut at the edges of a partition, the integral is the sum of what each block
contributes in its own range; the cross-entropy at sigma_min is added to the last block, the last term to block 0.

Where D is the posterior mean of one fixed distribution p(k | x), whatever z and sigma, the integral telescopes:

.. math:: \int_a^b \sigma^{-3}\, E\|e_y - D\|^2\, d\sigma = E[-\log p(y | x, z_b)] - E[-\log p(y | x, z_a)]

(differentiate ``E log q(z | y) / q(z)``; the I-MMSE relation of Guo, Shamai and Verdu 2005, per token). So the bound is
then ``-log p(y | x)`` itself, up to what z at sigma_max still tells: with rows of norm 1 the two differ by less than
``1.5 / sigma_max^2`` (2e-4 nats for 80). That is so for the true posterior, and for ``readout="clean"`` wherever one f
serves every noise level.
"""

from .bound import SAMPLINGS, denoising_bound
from .information import equal_information_partition, information_profile
from .language_models import DENOISERS, ESTIMATORS, language_model_likelihood, likelihood_bound
from .masked import masked_likelihood_bound
from .result import Likelihood, LikelihoodBound

__all__ = [
    "DENOISERS",
    "ESTIMATORS",
    "SAMPLINGS",
    "Likelihood",
    "LikelihoodBound",
    "denoising_bound",
    "equal_information_partition",
    "information_profile",
    "language_model_likelihood",
    "likelihood_bound",
    "masked_likelihood_bound",
]
