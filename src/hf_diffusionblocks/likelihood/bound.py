"""The bound by Monte Carlo, for any denoiser: stratified noise levels, importance weights, errors.

With noise levels drawn from a density q of ``log sigma``, ``sigma^-2 ||e_y - D||^2 / q(log sigma)`` is an unbiased
estimate of the integral of ``sigma^-3 ||e_y - D||^2 dsigma = sigma^-2 ||e_y - D||^2 dlog sigma``. Two densities:

``log_uniform``
    uniform in ``log sigma``; the weight is ``sigma^-2 log(high / low)``.
``importance``
    half of the mass uniform in ``log sigma``, half where the information of unit embeddings lies: with ``gamma =
    sigma^-2``, ``gamma / gamma_0 / (1 + gamma / gamma_0)^2``, which follows the integrand of a target that is unknown
    at small gamma (``gamma`` times a constant) and known at large gamma. The uniform half bounds the weights where a
    wrong denoiser errs at low noise, so that the error bar sees it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..suggest import unknown_name
from .result import LikelihoodBound, RowSums

SAMPLINGS = ("importance", "log_uniform")

_CELLS = 512  # of the table of a density
_GAMMA_0 = 16.0  # sigma = 0.25: where embeddings of norm 1 are told apart

# log p(k | x, z, sigma) of noisy targets z [rows, tokens, width] at sigma [rows, tokens]: [rows, tokens, classes].
Denoiser = Callable[[Tensor, Tensor], Tensor]
# ||e_y - D||^2 and -log p(y | x, z, sigma) of each token, [rows, tokens]; 0 at tokens without a target.
Errors = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class NoiseSampling:
    """Draws noise levels of one range by a tabulated density of ``log sigma``.

    Args:
        low: lower end of the range, positive.
        high: upper end, above it.
        sampling: ``importance`` or ``log_uniform``.

    Raises:
        ValueError: for an unknown density.
    """

    def __init__(self, low: float, high: float, sampling: str = "importance"):
        if sampling not in SAMPLINGS:
            raise ValueError(unknown_name("sampling", sampling, SAMPLINGS))
        # On the CPU whatever the default device is: so that draws are the same on every device.
        self.log_sigma = torch.linspace(math.log(low), math.log(high), _CELLS + 1, dtype=torch.float64, device="cpu")
        self.width = (math.log(high) - math.log(low)) / _CELLS
        mass = torch.full((_CELLS,), 1 / _CELLS, dtype=torch.float64, device="cpu")
        if sampling == "importance":
            gamma = (-2 * (self.log_sigma[1:] + self.log_sigma[:-1]) / 2).exp() / _GAMMA_0
            peak = gamma / (1 + gamma) ** 2
            mass = (mass + peak / peak.sum()) / 2
        self.mass = mass
        self.ends = torch.cat([mass.new_zeros(1), mass.cumsum(0)]) / mass.sum()

    def __call__(
        self, rows: int, tokens: int, generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "rows tokens"], Float[Tensor, "rows tokens"]]:
        """Noise levels, each by the density, stratified within each row: one in each part of equal mass.

        Returns:
            sigma, and the weight ``sigma^-2 / q(log sigma)`` of ``||e_y - D||^2``; float64.
        """
        order = torch.rand(rows, tokens, generator=generator, dtype=torch.float64, device="cpu").argsort(-1)
        u = torch.rand(rows, tokens, generator=generator, dtype=torch.float64, device="cpu")
        u = (order + u) / tokens
        cell = torch.searchsorted(self.ends, u, right=True).sub(1).clamp(0, _CELLS - 1)
        inside = (u - self.ends[cell]) / (self.ends[cell + 1] - self.ends[cell])
        log_sigma = self.log_sigma[cell] + self.width * inside.clamp(0, 1)
        return log_sigma.exp(), (-2 * log_sigma).exp() * self.width / self.mass[cell]


class RowNoiseSampling(NoiseSampling):
    """The same with one noise level for all tokens of a row, stratified over the rows: for a denoiser whose tokens see
    each other's noisy targets at one level."""

    def __call__(
        self, rows: int, tokens: int, generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "rows tokens"], Float[Tensor, "rows tokens"]]:
        """As ``NoiseSampling.__call__``."""
        sigma, weight = super().__call__(1, rows, generator)
        return sigma[0, :, None].expand(rows, tokens), weight[0, :, None].expand(rows, tokens)


@dataclass
class Draw:
    """One noise level per token.

    Attributes:
        sigma: the noise levels.
        nats: the weighted squared errors, whose mean over draws estimates the integral over the range.
        cross_entropy: at these noise levels.
    """

    sigma: Float[Tensor, "rows tokens"]
    nats: Float[Tensor, "rows tokens"]
    cross_entropy: Float[Tensor, "rows tokens"]


def draw_range(
    errors: Errors,
    embedded: Float[Tensor, "rows tokens width"],
    sampling: NoiseSampling,
    num_draws: int,
    generator: torch.Generator | None,
    reference: Errors | None = None,
) -> Iterator[Draw]:
    """Independent draws of one range's integral, a pass of the denoiser each.

    Args:
        errors: of the denoiser.
        embedded: e_y.
        sampling: of the range.
        num_draws: how many.
        generator: CPU generator of noise levels and noise.
        reference: of a denoiser whose integral is known; what is drawn is the integral's difference from it.
    """
    for _ in range(num_draws):
        sigma, weight = sampling(embedded.shape[0], embedded.shape[1], generator)
        sigma = sigma.to(embedded.device, torch.float32)
        z = noisy(embedded, sigma, generator)
        squared_error, cross_entropy = errors(z, sigma)
        if reference is not None:
            squared_error = squared_error - reference(z, sigma)[0]
        yield Draw(sigma, weight.to(embedded.device) * squared_error.double(), cross_entropy.double())


def noisy(
    embedded: Float[Tensor, "rows tokens width"],
    sigma: Float[Tensor, "rows tokens"],
    generator: torch.Generator | None,
) -> Float[Tensor, "rows tokens width"]:
    """``z = e_y + sigma eps``; the noise is drawn on the CPU."""
    noise = torch.randn(embedded.shape, generator=generator, device="cpu").to(embedded.device)
    return embedded + sigma[..., None] * noise


def noisy_at(
    embedded: Float[Tensor, "rows tokens width"], sigma: float, generator: torch.Generator | None
) -> tuple[Float[Tensor, "rows tokens width"], Float[Tensor, "rows tokens"]]:
    """z and sigma for one noise level of all targets."""
    levels = torch.full(embedded.shape[:2], sigma, dtype=torch.float32, device=embedded.device)
    return noisy(embedded, levels, generator), levels


def cross_entropy_at(
    errors: Errors, embedded: Float[Tensor, "rows tokens width"], sigma: float, generator: torch.Generator | None
) -> Float[Tensor, "rows tokens"]:
    """``-log p(y | x, z, sigma)`` for one draw of noise, float64."""
    return errors(*noisy_at(embedded, sigma, generator))[1].double()


def denoising_bound(
    denoiser: Denoiser,
    y: Int[Tensor, "rows tokens"],
    table: Float[Tensor, "classes width"],
    edges: Sequence[float],
    *,
    num_draws: int = 8,
    sampling: str = "importance",
    seed: int = 0,
) -> LikelihoodBound:
    """The bound for any denoiser of categorical targets, with its split at ``edges``.

    Args:
        denoiser: gives ``log p(k | x, z, sigma)`` [rows, tokens, classes], normalised, for noisy targets z [rows,
            tokens, width] at noise levels sigma [rows, tokens]. It knows the context x of each target.
        y: the targets' classes. Rows must be independent of each other; within a row noise levels are stratified.
        table: e_k.
        edges: noise levels, descending from sigma_max to sigma_min; B + 1 for B shares.
        num_draws: passes per range; 2 at least for an error of the noise alone.
        sampling: see the module.
        seed: of noise levels and noise.

    Raises:
        ValueError: for edges that do not descend, classes without an embedding, log-probabilities of another shape or
            that do not sum to 1, or settings that are not allowed.

    Example:
        >>> table = torch.eye(4)
        >>> posterior = lambda z, sigma: (z @ table.T / sigma[..., None] ** 2).log_softmax(-1)
        >>> y = torch.arange(4).repeat(64, 16)  # uniform over 4 classes: log 4 = 1.386 nats
        >>> bound = denoising_bound(posterior, y, table, [80.0, 0.3, 0.002], num_draws=16)
        >>> abs(bound.nats_per_token - 1.386) < 5 * bound.monte_carlo_error < 0.1
        True
    """
    edges = [float(edge) for edge in edges]
    check_draws(num_draws)
    if (
        len(edges) < 2
        or not all(high > low > 0 for high, low in zip(edges, edges[1:], strict=False))
        or math.isinf(edges[0])
    ):
        raise ValueError(
            f"edges={edges} must be at least two finite positive noise levels, strictly descending (highest first)."
        )
    if y.ndim != 2 or y.dtype not in (torch.int64, torch.int32) or y.numel() == 0:
        raise ValueError(f"y is {y.dtype} {list(y.shape)}: give integer classes [rows, tokens].")
    if int(y.min()) < 0 or int(y.max()) >= len(table):
        raise ValueError(f"y has classes from {int(y.min())} to {int(y.max())}; table has rows 0 to {len(table) - 1}.")
    y, table = y.long(), table.float()
    embedded = table[y]

    def errors(z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        log_p = denoiser(z, sigma)
        _check_log_probabilities(log_p, (*y.shape, len(table)))
        squared = (embedded - log_p.float().exp() @ table).square().sum(-1)
        return squared, -log_p.gather(-1, y[..., None])[..., 0].float()

    generator, sums = torch.Generator().manual_seed(seed), RowSums()
    parts = torch.zeros(len(y), num_draws, len(edges) + 1, dtype=torch.float64)
    for b, (high, low) in enumerate(zip(edges, edges[1:], strict=False)):
        for i, draw in enumerate(
            draw_range(errors, embedded, NoiseSampling(low, high, sampling), num_draws, generator)
        ):
            parts[:, i, b] = draw.nats.sum(1).cpu()
    for i in range(num_draws):
        parts[:, i, -2] = cross_entropy_at(errors, embedded, edges[-1], generator).sum(1).cpu()
    parts[..., -1] = prior_nats(embedded, edges[0]).sum(1, keepdim=True).cpu()
    at_max = cross_entropy_at(errors, embedded, edges[0], generator)
    sums.add(parts, torch.full((len(y),), y.shape[1]))
    return summarise(sums, edges, cross_entropy_at_sigma_max=float(at_max.mean()), num_draws=num_draws)


def prior_nats(embedded: Float[Tensor, "rows tokens width"], sigma_max: float) -> Float[Tensor, "rows tokens"]:
    """``KL(N(e_y, sigma_max^2 I) || N(0, sigma_max^2 I)) = ||e_y||^2 / (2 sigma_max^2)``."""
    return embedded.double().square().sum(-1) / (2 * sigma_max**2)


def summarise(sums: RowSums, edges: Sequence[float], **fields: Any) -> LikelihoodBound:
    """The result of sums whose parts are the B integrals, the cross-entropy at sigma_min and the prior's term."""
    folded = RowSums()  # the last two parts belong to the last and the first block
    for nats, counts in zip(sums.nats, sums.counts, strict=True):
        blocks = nats[..., :-2].clone()
        blocks[..., -1] += nats[..., -2]
        blocks[..., 0] += nats[..., -1]
        folded.add(blocks, counts)
    ends = {"cross_entropy_at_sigma_min": float(sums.mean(-2)), "prior_nats": float(sums.mean(-1))}
    return summarise_shares(folded, edges, **ends, **fields)


def summarise_shares(folded: RowSums, edges: Sequence[float], **fields: Any) -> LikelihoodBound:
    """The result of sums whose parts are the blocks' shares."""
    shares, whole = folded.mean(), slice(None)
    blocks = range(len(shares))
    return LikelihoodBound(
        nats_per_token=float(shares.sum()),
        standard_error=float(folded.standard_error(whole)),
        num_tokens=folded.num_tokens,
        monte_carlo_error=float(folded.monte_carlo_error(whole)),
        edges=tuple(edges),
        nats_per_block=tuple(shares.tolist()),
        standard_error_per_block=tuple(float(folded.standard_error(b)) for b in blocks),
        monte_carlo_error_per_block=tuple(float(folded.monte_carlo_error(b)) for b in blocks),
        **fields,
    )


def check_draws(num_draws: int) -> None:
    """Raise a ``ValueError`` for a number of draws that is none."""
    if isinstance(num_draws, bool) or not isinstance(num_draws, int) or num_draws < 1:
        raise ValueError(f"num_draws={num_draws!r} must be a whole number of at least 1; 2 or more give an error bar.")


def _check_log_probabilities(log_p: Tensor, shape: tuple[int, ...]) -> None:
    if log_p.shape != shape:
        raise ValueError(f"the denoiser gave {list(log_p.shape)}; expected log-probabilities {list(shape)}.")
    total = log_p.double().logsumexp(-1)
    if not bool((total.abs() < 1e-3).all()):
        worst = float(total.flatten()[total.abs().nan_to_num(math.inf).argmax()].exp())
        raise ValueError(
            f"the denoiser's probabilities sum to {worst:g} instead of 1: give normalised log-probabilities "
            "(torch.log_softmax)."
        )
