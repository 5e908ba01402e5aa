"""The partition of layers and noise levels into blocks: the one road from a noise level to a block.

Block 0 holds the FIRST layers and the HIGHEST noise; block b owns the noise range ``[edges[b + 1], edges[b]]``, with
``edges`` descending from ``sigma_max`` to ``sigma_min`` (arXiv 2506.14202, section 3.3). Sampling therefore visits
blocks 0, 1, ..., B - 1, the order in which data flows through the network. A noise level exactly on an inner edge
belongs to the noisier block. No other module derives a block from a noise level or layers from a block.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from .layer_counts import spread_layers
from .masking import MaskNoise
from .noise import LogNormalNoise

# A distribution of noise levels: of sigma, or of the mask rate of masked diffusion.
Noise = LogNormalNoise | MaskNoise
# Relative slack for noise levels that a float32 computation (a scheduler's grid, say) put a rounding error outside.
_RANGE_TOLERANCE = 1e-5
# A level that a rounding error put below an edge (a float32 grid, another order of operations) still sits on it.
_EDGE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class InformationProfile:
    """How many nats each range of noise levels costs a denoiser: the likelihood bound, bin by bin.

    Measured by ``information_profile``.

    Attributes:
        edges: N + 1 noise levels, descending from sigma_max to sigma_min.
        nats: of each of the N bins, highest noise first, per target; not negative.

    Raises:
        ValueError: for edges out of order, nats that are negative, not finite or all 0, or numbers that do not fit.
    """

    edges: tuple[float | int, ...]
    nats: tuple[float | int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", tuple(float(edge) for edge in self.edges))
        object.__setattr__(self, "nats", tuple(float(n) for n in self.nats))
        if not self.nats or len(self.edges) != len(self.nats) + 1:
            raise ValueError(
                f"a profile of {len(self.nats)} nats has {len(self.edges)} edges: N bins have N + 1 edges."
            )
        descending = all(high > low for high, low in zip(self.edges, self.edges[1:], strict=False))
        if not descending or not self.edges[-1] > 0 or not math.isfinite(self.edges[0]):
            raise ValueError(
                f"the profile's edges {list(self.edges)} must be finite, positive and strictly descending (highest "
                "noise first)."
            )
        if not all(math.isfinite(n) and n >= 0 for n in self.nats):
            bad = next(n for n in self.nats if not (math.isfinite(n) and n >= 0))
            raise ValueError(f"the profile has a bin of {bad} nats: bins must be finite and not negative.")
        if self.total == 0:
            raise ValueError("the profile's bins are all 0: there is no information to share. Measure a trained model.")

    @property
    def total(self) -> float:
        """Nats of all bins together: the likelihood bound."""
        return math.fsum(self.nats)

    def above(self, sigma: float | int) -> float:
        """Nats from sigma_max down to a noise level; within a bin they grow evenly in log sigma."""
        log_edges, cumulative = self._curve
        return float(np.interp(-math.log(sigma), -log_edges, cumulative))

    def level(self, nats: float | int) -> float:
        """The noise level above which so many nats lie (inverse of ``above``); the lowest where several do."""
        log_edges, cumulative = self._curve
        return math.exp(float(np.interp(nats, cumulative, log_edges)))

    @property
    def _curve(self) -> tuple[np.ndarray, np.ndarray]:
        return np.log(self.edges), np.concatenate([[0.0], np.cumsum(self.nats)])


@dataclass(frozen=True)
class BlockPartition:
    """Which layers and which noise levels each block owns.

    Use one of the constructors: ``equal_probability`` (the paper's), ``uniform``, ``log_uniform``,
    ``equal_information`` (from a pilot run), ``explicit``.

    Attributes:
        edges: B + 1 noise levels, descending; ``edges[0] = sigma_max``, ``edges[B] = sigma_min``.
        layers_per_block: number of layers of each block, first block first.
        noise: the distribution that training draws from, renormalised to a block's range.
        overlap: gamma of App. C; how far training reaches over a block's edges. Never affects inference.
    """

    edges: tuple[float | int, ...]
    layers_per_block: tuple[int, ...]
    noise: Noise = field(default_factory=LogNormalNoise)
    overlap: float | int = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", tuple(float(edge) for edge in self.edges))
        object.__setattr__(self, "layers_per_block", tuple(int(n) for n in self.layers_per_block))
        if self.num_blocks < 1 or len(self.edges) != self.num_blocks + 1:
            raise ValueError(
                f"{len(self.edges)} edges were given for {self.num_blocks} blocks: B blocks need B + 1 edges, "
                "from sigma_max down to sigma_min."
            )
        if any(not math.isfinite(e) for e in self.edges) or any(
            high <= low for high, low in zip(self.edges, self.edges[1:], strict=False)
        ):
            raise ValueError(f"edges={list(self.edges)} must be finite and strictly descending (highest noise first).")
        for given, wanted, name in (
            (self.edges[0], self.noise.sigma_max, "sigma_max"),
            (self.edges[-1], self.noise.sigma_min, "sigma_min"),
        ):
            if not math.isclose(given, wanted, rel_tol=1e-9):
                raise ValueError(
                    f"the outer edge {given} must equal {name}={wanted}: edges span the whole noise range and inner "
                    "edges lie inside it."
                )
        if any(n < 1 for n in self.layers_per_block):
            raise ValueError(f"layers_per_block={list(self.layers_per_block)}: every block needs at least one layer.")
        if not (isinstance(self.overlap, (int, float)) and 0 <= self.overlap < 1):
            raise ValueError(f"overlap={self.overlap!r} must lie in [0, 1); the paper uses 0.05 (images), 0.1 (text).")

    # -- constructors --------------------------------------------------------------------------------------------

    @classmethod
    def equal_probability(
        cls,
        num_blocks: int,
        num_layers: int,
        noise: Noise | None = None,
        overlap: float | int = 0.05,
        layers_per_block: Sequence[int] | None = None,
    ) -> "BlockPartition":
        """Every block owns the share 1/B of the training distribution (arXiv 2506.14202, section 3.3).

        Args:
            num_blocks: B, between 1 and ``num_layers``.
            num_layers: L; a remainder of L / B goes to the first blocks, no layer is lost.
            noise: the training distribution, default ``LogNormalNoise``.
            overlap: gamma of App. C.
            layers_per_block: explicit numbers such as ``(3, 6, 3)`` instead of an even spread.

        Raises:
            ValueError: for fewer than 1 or more than ``num_layers`` blocks, or numbers that do not sum to it.

        Example:
            >>> low, high = BlockPartition.equal_probability(3, 12).range(1)
            >>> round(low, 6), round(high, 6)
            (0.179632, 0.505041)
        """
        noise = noise or LogNormalNoise()
        layers = spread_layers(num_blocks, num_layers, layers_per_block)
        inner = noise.icdf(torch.linspace(1, 0, len(layers) + 1, dtype=torch.float64, device="cpu")[1:-1])
        return cls(_with_ends(inner, noise), layers, noise, overlap)

    @classmethod
    def uniform(
        cls,
        num_blocks: int,
        num_layers: int,
        noise: Noise | None = None,
        overlap: float | int = 0.05,
        layers_per_block: Sequence[int] | None = None,
    ) -> "BlockPartition":
        """Ranges of equal width in sigma (arXiv 2506.14202, Table 7's baseline, as its text defines it).

        Arguments and errors as in ``equal_probability``.
        """
        noise = noise or LogNormalNoise()
        layers = spread_layers(num_blocks, num_layers, layers_per_block)
        inner = torch.linspace(noise.sigma_max, noise.sigma_min, len(layers) + 1, dtype=torch.float64, device="cpu")[
            1:-1
        ]
        return cls(_with_ends(inner, noise), layers, noise, overlap)

    @classmethod
    def log_uniform(
        cls,
        num_blocks: int,
        num_layers: int,
        noise: Noise | None = None,
        overlap: float | int = 0.05,
        layers_per_block: Sequence[int] | None = None,
    ) -> "BlockPartition":
        """Ranges of equal width in log sigma (arXiv 2506.14202, Table 7's baseline, as its appendix defines it).

        Arguments and errors as in ``equal_probability``.
        """
        noise = noise or LogNormalNoise()
        layers = spread_layers(num_blocks, num_layers, layers_per_block)
        ends = math.log(noise.sigma_max), math.log(noise.sigma_min)
        inner = torch.linspace(*ends, len(layers) + 1, dtype=torch.float64, device="cpu")[1:-1].exp()
        return cls(_with_ends(inner, noise), layers, noise, overlap)

    @classmethod
    def explicit(
        cls,
        edges: Sequence[float | int],
        num_layers: int,
        noise: Noise | None = None,
        overlap: float | int = 0.05,
        layers_per_block: Sequence[int] | None = None,
    ) -> "BlockPartition":
        """Edges chosen by hand.

        Args:
            edges: B + 1 noise levels, strictly descending, from ``sigma_max`` to ``sigma_min``.
            num_layers: L.
            noise: the training distribution; by default the standard one on the range that the edges span.
            overlap: gamma of App. C.
            layers_per_block: as in ``equal_probability``.

        Raises:
            ValueError: for edges out of order or outside the noise range.
        """
        edges = [float(edge) for edge in edges]
        if len(edges) < 2:
            raise ValueError(f"edges={edges}: at least two are needed, sigma_max and sigma_min.")
        if noise is None:
            if not all(high > low for high, low in zip(edges, edges[1:], strict=False)) or edges[-1] <= 0:
                raise ValueError(f"edges={edges} must be positive and strictly descending (highest noise first).")
            noise = LogNormalNoise(sigma_min=edges[-1], sigma_max=edges[0])
        return cls(tuple(edges), spread_layers(len(edges) - 1, num_layers, layers_per_block), noise, overlap)

    @classmethod
    def equal_information(
        cls,
        information: InformationProfile | tuple[Sequence[float | int], Sequence[float | int]],
        num_blocks: int,
        num_layers: int,
        noise: Noise | None = None,
        overlap: float | int = 0.05,
        layers_per_block: Sequence[int] | None = None,
    ) -> "BlockPartition":
        """Every block owns the same number of nats of the likelihood bound, as a pilot run measured them.

        The paper's equal probability shares the training distribution equally, wherever it was put. For text that
        leaves blocks without work: low noise is free, because the nearest embedding already is the answer. Here edge b
        is the noise level above which ``b / B`` of the nats lie. Time warping (Dieleman et al. 2022, arXiv 2211.15089,
        section 4.1) moves the training distribution to where the cross-entropy changes; this moves the edges and leaves
        the distribution within a block as it is.

        Args:
            information: a profile, see ``information_profile``, or its descending
                edges and the nats between them.
            num_blocks: B, between 1 and ``num_layers``.
            num_layers: L.
            noise: the training distribution; by default the standard one on the range that the profile spans.
            overlap: gamma of App. C.
            layers_per_block: as in ``equal_probability``.

        Raises:
            ValueError: for a profile that is none or does not span the noise range, and as ``equal_probability``.

        Example:
            >>> BlockPartition.equal_information(([80.0, 2.0, 0.5, 0.002], [1.0, 2.0, 1.0]), 2, 6).edges
            (80.0, 1.0, 0.002)
        """
        if not isinstance(information, InformationProfile):
            information = InformationProfile(*(tuple(values) for values in information))
        first, last = information.edges[0], information.edges[-1]
        noise = noise or LogNormalNoise(sigma_min=last, sigma_max=first)
        for given, wanted, name in ((first, noise.sigma_max, "sigma_max"), (last, noise.sigma_min, "sigma_min")):
            if not math.isclose(given, wanted, rel_tol=1e-9):
                raise ValueError(
                    f"the profile ends at {given}, the noise range at {name}={wanted}: measure the information of a "
                    "model with the same noise range, or give that range."
                )
        layers = spread_layers(num_blocks, num_layers, layers_per_block)
        shares = [information.total * b / len(layers) for b in range(1, len(layers))]
        return cls((noise.sigma_max, *map(information.level, shares), noise.sigma_min), layers, noise, overlap)

    # -- the road ------------------------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """B, the number of blocks."""
        return len(self.layers_per_block)

    @property
    def num_layers(self) -> int:
        """L, the number of layers of all blocks together."""
        return sum(self.layers_per_block)

    def layers(self, block: int) -> range:
        """Indices of the base model's layers that a block holds, in order.

        Raises:
            ValueError: for a block that does not exist.
        """
        self.check_block(block)
        first = sum(self.layers_per_block[:block])
        return range(first, first + self.layers_per_block[block])

    def range(self, block: int, training: bool = False) -> tuple[float, float]:
        """Noise range ``(low, high)`` of a block.

        Args:
            block: which block.
            training: widen by the overlap: ``[low / alpha, alpha high]``, ``alpha = (high / low)^gamma``, clamped to
                ``[sigma_min, sigma_max]`` (arXiv 2506.14202, App. C). Inference uses the plain edges.

        Raises:
            ValueError: for a block that does not exist.
        """
        self.check_block(block)
        high, low = self.edges[block], self.edges[block + 1]
        return self.noise.widened(low, high, self.overlap) if training else (low, high)

    @overload
    def block_of(self, sigma: float | int) -> int: ...
    @overload
    def block_of(self, sigma: Float[Tensor, "..."]) -> Int64[Tensor, "..."]: ...

    def block_of(self, sigma: Float[Tensor, "..."] | float | int) -> Int64[Tensor, "..."] | int:
        """The block that owns each noise level; on an inner edge the noisier one.

        Args:
            sigma: noise level(s), a number or a tensor of any shape.

        Returns:
            An int for a number, otherwise an int64 tensor of the same shape and device.

        Raises:
            ValueError: for a noise level that is not finite, not positive or beyond ``[sigma_min, sigma_max]``.
        """
        self.check_sigma(sigma)
        if not isinstance(sigma, Tensor):
            return sum(edge > sigma * (1 + _EDGE_TOLERANCE) for edge in self.edges[1:-1])
        if sigma.dtype not in (torch.float32, torch.float64):
            sigma = sigma.float()
        # Edges in the precision of sigma: a float32 grid point made from an edge still sits on that edge.
        inner = torch.tensor(self.edges[1:-1], dtype=torch.float64, device=sigma.device).to(sigma.dtype)
        return (inner > sigma[..., None] * (1 + _EDGE_TOLERANCE)).sum(-1)

    def sample(self, block: int, shape: tuple[int, ...] | int, generator: torch.Generator | None = None) -> Tensor:
        """Training noise levels of a block: the training distribution on its widened range, float64 [shape]."""
        return self.noise.sample(shape, *self.range(block, training=True), generator=generator)

    # -- checks --------------------------------------------------------------------------------------------------

    def check_block(self, block: int) -> None:
        """Raise a ``ValueError`` for a block that does not exist."""
        if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < self.num_blocks:
            raise ValueError(f"block {block!r} does not exist: the model has blocks 0 to {self.num_blocks - 1}.")

    def check_sigma(self, sigma: Tensor | float | int) -> None:
        """Raise a ``ValueError`` for noise levels that are not finite, not positive or out of range."""
        values = sigma if isinstance(sigma, Tensor) else torch.tensor(float(sigma), dtype=torch.float64, device="cpu")
        low, high = self.noise.sigma_min * (1 - _RANGE_TOLERANCE), self.noise.sigma_max * (1 + _RANGE_TOLERANCE)
        good = (values >= low) & (values <= high)  # False for NaN
        if not bool(good.all()):
            bad = values.detach()[~good].flatten()[0].item()
            raise ValueError(
                f"sigma={bad} is outside the noise range [{self.noise.sigma_min}, {self.noise.sigma_max}] of this "
                "model. Give a finite positive noise level in that range."
            )

    def describe(self) -> list[dict]:
        """One row per block for tables: block, layers, range, training range, share of the training distribution."""
        rows = []
        for b in range(self.num_blocks):
            low, high = self.range(b)
            mass = float(self.noise.cdf(high) - self.noise.cdf(low))
            rows.append(
                {
                    "block": b,
                    "layers": list(self.layers(b)),
                    "range": (low, high),
                    "training_range": self.range(b, training=True),
                    "mass": mass,
                }
            )
        return rows


def _with_ends(inner: Tensor, noise: Noise) -> tuple[float, ...]:
    return (noise.sigma_max, *inner.tolist(), noise.sigma_min)
