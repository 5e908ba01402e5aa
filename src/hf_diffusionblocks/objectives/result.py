"""What an objective returns, in training and on held-out data."""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor


@dataclass
class ObjectiveResult:
    """What an objective returns.

    Attributes:
        loss: scalar to differentiate.
        sigma: noise levels that were drawn: one per sample, or per token.
        per_sample: weighted loss of each sample against the data, [batch], detached.
        parts: detached scalars for the log.
    """

    loss: Float[Tensor, ""]
    sigma: Float[Tensor, "draws"]
    per_sample: Float[Tensor, "batch"]
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class HeldOutLoss:
    """Denoising loss on held-out data, over all noise levels and per range.

    Attributes:
        total: mean weighted loss under the training distribution of noise levels.
        per_range: the same within each range of ``edges``, highest noise first.
        edges: descending noise levels that bound the ranges.
        num_samples: number of (image, noise level, noise) draws.
        standard_error: of ``total``, over the draws.
    """

    total: float
    per_range: list[float]
    edges: list[float]
    num_samples: int
    standard_error: float
