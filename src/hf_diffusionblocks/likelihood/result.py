"""What a likelihood is reported as, and how its errors are estimated."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..strict_json import known


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of held-out tokens.

    Attributes:
        nats_per_token: mean over all scored tokens.
        standard_error: of that mean, in nats, over the rows that were scored (and the noise, if there is any): how far
            other rows of the same source would lie. NaN for a single row.
        num_tokens: tokens that were scored; the first of a row or document is not.
        characters_per_token: of the text, or None if it is not known.
    """

    nats_per_token: float
    standard_error: float
    num_tokens: int
    characters_per_token: float | None = None

    @property
    def bits_per_token(self) -> float:
        """Nats per token over log 2."""
        return self.nats_per_token / math.log(2)

    @property
    def bits_per_character(self) -> float | None:
        """Bits per token over characters per token; None if these are not known."""
        return None if self.characters_per_token is None else self.bits_per_token / self.characters_per_token

    @property
    def perplexity(self) -> float:
        """exp of the nats per token; infinite if that is beyond what a float holds."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """All figures, the derived ones too, for JSON: None for those that are NaN or infinite."""
        derived = ("bits_per_token", "bits_per_character", "perplexity")
        return known(asdict(self) | {name: getattr(self, name) for name in derived})


@dataclass(frozen=True)
class LikelihoodBound(Likelihood):
    """A bound on the negative log-likelihood (see the module), and the share of each block.

    Attributes:
        nats_per_token: the bound; with ``exact`` the negative log-likelihood itself.
        monte_carlo_error: standard error that the draws of noise alone leave in ``nats_per_token``, for these very
            tokens; 0 if ``exact``, NaN for a single draw.
        edges: descending noise levels that bound the blocks' ranges.
        nats_per_block: share of each block, block 0 (highest noise) first; they sum to ``nats_per_token``.
        standard_error_per_block: of each share, over rows and noise.
        monte_carlo_error_per_block: of each share, of the noise alone.
        cross_entropy_at_sigma_min: what the last draw costs, part of the last block's share.
        prior_nats: ``||e_y||^2 / (2 sigma_max^2)``, part of block 0's share; 0 with ``edges``, where z at
            sigma_max is taken to tell nothing.
        cross_entropy_at_sigma_max: where z carries nothing: the likelihood of a plain language model.
        num_draws: noise levels drawn per token and block.
        exact: whether one f serves every noise level and ``nats_per_token`` is taken to be ``-log softmax(f)``, which
            the bound equals up to ``1.5 / sigma_max^2``; only the split is drawn then.
        denoiser: whose figure it is: ``blocks``, each block's D in its own range, or ``language_model``, the f of the
            next token's logits at every noise level.
        estimator: ``integral``, noise levels were drawn; ``controlled``, with a control variate; ``edges``,
            differences of cross-entropies given z at the edges; ``masked``, tokens were hidden, and ``edges`` are mask
            rates.
    """

    monte_carlo_error: float = math.nan
    edges: tuple[float, ...] = ()
    nats_per_block: tuple[float, ...] = ()
    standard_error_per_block: tuple[float, ...] = ()
    monte_carlo_error_per_block: tuple[float, ...] = ()
    cross_entropy_at_sigma_min: float = math.nan
    prior_nats: float = 0.0
    cross_entropy_at_sigma_max: float = math.nan
    num_draws: int = 0
    exact: bool = False
    denoiser: str = "blocks"
    estimator: str = "integral"

    @property
    def bits_per_character_per_block(self) -> tuple[float, ...] | None:
        """Each block's share in bits per character; None if characters per token are not known."""
        if self.characters_per_token is None:
            return None
        return tuple(nats / math.log(2) / self.characters_per_token for nats in self.nats_per_block)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"bits_per_character_per_block": self.bits_per_character_per_block}


@dataclass
class RowSums:
    """Nats summed over each row's tokens, batch by batch, and the errors of their mean.

    Rows are independent of each other, and so are the draws of one row; tokens of one row need not be.
    """

    nats: list[Float[Tensor, "rows draws parts"]] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)

    def add(self, nats: Float[Tensor, "rows draws parts"], counts: Int[Tensor, "rows"]) -> None:
        """Add a batch."""
        self.nats.append(nats.double().cpu())
        self.counts.append(counts.cpu())

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows.

        Raises:
            ValueError: if there are none.
        """
        total = sum(int(c.sum()) for c in self.counts)
        if total == 0:
            raise ValueError(
                "no token is scored: every row needs at least two tokens of one document that are not padding."
            )
        return total

    def mean(self, parts: slice | int = slice(None)) -> Float[Tensor, "*parts"]:
        """Per token."""
        return torch.cat(self.nats)[..., parts].mean(1).sum(0) / self.num_tokens

    def standard_error(self, parts: slice | int) -> Float[Tensor, ""]:
        """Of the sum of some parts per token, over rows (and draws): a ratio of sums over independent rows."""
        values, counts = torch.cat(self.nats)[..., parts].mean(1), torch.cat(self.counts).double()
        values = values if values.ndim == 1 else values.sum(-1)
        rows = len(values)
        if rows < 2:
            return torch.tensor(math.nan)
        residuals = values - counts * values.sum() / counts.sum()
        return (rows / (rows - 1) * residuals.square().sum()).sqrt() / counts.sum()

    def monte_carlo_error(self, parts: slice | int) -> Float[Tensor, ""]:
        """Of the sum of some parts per token, over draws alone."""
        values = torch.cat(self.nats)[..., parts]
        values = values if values.ndim == 2 else values.sum(-1)
        draws = values.shape[1]
        if draws < 2:
            return torch.tensor(math.nan)
        return (values.var(1).sum() / draws).sqrt() / self.num_tokens
