"""Training objectives: what one update of one block minimises."""

from typing import Any

from ..configuration import DiffusionBlocksConfig
from ..families.causal_lm_config import BlockedCausalLMConfig
from ..families.recurrent_config import BlockedRecurrentConfig
from .exact_gradient import ExactNextTokenPrediction, check_exact
from .next_token import NextTokenPrediction
from .recurrent import RecurrentDenoising, TruncatedBackpropagation
from .result import HeldOutLoss, ObjectiveResult
from .score_matching import DenoisingScoreMatching, denoise_routed, held_out_loss, weighted_error


def default_objective(
    config: DiffusionBlocksConfig, gradient: str = "local", **settings: Any
) -> DenoisingScoreMatching | NextTokenPrediction | TruncatedBackpropagation:
    """The objective of a family: ``NextTokenPrediction`` for language models, else denoising score matching.

    Args:
        config: the model's.
        gradient: ``exact`` for the last block's loss with its exact gradient in each block
            (``ExactNextTokenPrediction``); with one block, its own loss is just that.
        **settings: of the objective; those that it does not know are left out if they are not set.
    """
    kind = NextTokenPrediction if isinstance(config, BlockedCausalLMConfig) else DenoisingScoreMatching
    if isinstance(config, BlockedRecurrentConfig):
        kind = RecurrentDenoising if config.two_stream else TruncatedBackpropagation
    if gradient == "exact" and config.num_blocks > 1:
        check_exact(config)
        kind = ExactNextTokenPrediction
    known = kind.__dataclass_fields__
    for name, value in settings.items():
        if name not in known and value:
            raise ValueError(
                f"{name}={value!r} has no meaning for {config.model_type}: it is trained by {kind.__name__}."
            )
    return kind(**{name: value for name, value in settings.items() if name in known})


__all__ = [
    "DenoisingScoreMatching",
    "ExactNextTokenPrediction",
    "HeldOutLoss",
    "NextTokenPrediction",
    "ObjectiveResult",
    "RecurrentDenoising",
    "TruncatedBackpropagation",
    "default_objective",
    "denoise_routed",
    "held_out_loss",
    "weighted_error",
]
