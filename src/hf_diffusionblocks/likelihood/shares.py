"""What each block tells of the likelihood, measured while a run goes on."""

from typing import Any

from ..configuration import DiffusionBlocksConfig
from ..families.causal_lm_config import BlockedCausalLMConfig
from ..families.masked_lm_config import BlockedMaskedLMConfig
from ..modeling import BlockedPreTrainedModel
from ..objectives import HeldOutLoss
from .language_models import likelihood_bound


def has_bound(config: DiffusionBlocksConfig) -> bool:
    """Whether a model's blocks have noise levels of their own, so that its likelihood bound is a sum over blocks."""
    if isinstance(config, BlockedMaskedLMConfig):
        return True
    own = isinstance(config, BlockedCausalLMConfig)
    return own and (config.two_stream or (config.context == "independent" and config.num_blocks > 1))


def is_shared_out(config: DiffusionBlocksConfig) -> bool:
    """Whether the bound has the shares of several blocks."""
    return config.num_blocks > 1 and has_bound(config)


def likelihood_shares(
    model: BlockedPreTrainedModel, dataset: Any, held_out: HeldOutLoss, *, max_samples: int | None = None, seed: int = 0
) -> list[float]:
    """The share of each block in the bound on the negative log-likelihood of held-out rows.

    Args:
        model: with all blocks resident.
        dataset: held-out rows.
        held_out: the objective's losses on these very rows. Those of a masked model hold the shares already: a block's
            loss per hidden token, times the width of its range of mask rates.
        max_samples: use the first so many rows only.
        seed: of noise levels and noise, one draw per token and block.

    Returns:
        Nats per token, block 0 first, which sum to the bound; none for a model whose likelihood is not shared out.
    """
    if not is_shared_out(model.config):
        return []
    if isinstance(model.config, BlockedMaskedLMConfig):
        ranges = (model.partition.range(b) for b in range(model.partition.num_blocks))
        return [loss * (high - low) for loss, (low, high) in zip(held_out.per_range, ranges, strict=True)]
    return list(likelihood_bound(model, dataset, num_draws=1, max_rows=max_samples, seed=seed).nats_per_block)


__all__ = ["has_bound", "is_shared_out", "likelihood_shares"]
