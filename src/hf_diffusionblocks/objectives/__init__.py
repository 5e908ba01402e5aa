"""Training objectives: what one update of one block minimises."""

from dataclasses import fields
from typing import Any

from ..configuration import DiffusionBlocksConfig
from ..families.causal_lm_config import BlockedCausalLMConfig
from ..families.image_classification_config import BlockedImageClassificationConfig
from ..families.masked_lm_config import BlockedMaskedLMConfig
from ..families.recurrent_config import BlockedRecurrentConfig
from .exact_gradient import ExactNextTokenPrediction, check_exact
from .label_prediction import ExactLabelPrediction, LabelPrediction
from .masked import MaskedDiffusion
from .next_token import NextTokenPrediction
from .recurrent import RecurrentDenoising, TruncatedBackpropagation
from .result import HeldOutLoss, ObjectiveResult
from .score_matching import DenoisingScoreMatching, denoise_routed, held_out_loss, weighted_error

# By config: the objective of a block alone, and that of the whole chain with its exact gradient in one block.
_OBJECTIVES: dict[type[DiffusionBlocksConfig], tuple[type, type]] = {
    BlockedCausalLMConfig: (NextTokenPrediction, ExactNextTokenPrediction),
    BlockedImageClassificationConfig: (LabelPrediction, ExactLabelPrediction),
    BlockedMaskedLMConfig: (MaskedDiffusion, MaskedDiffusion),  # blocks stand alone: check_exact refuses
}


def register_objective(config_class: type[DiffusionBlocksConfig], local: type, exact: type | None = None) -> None:
    """Say how a family of your own is trained: ``default_objective`` then makes its objectives.

    Args:
        config_class: of the family.
        local: the objective of a block alone, a dataclass; ``LabelPrediction`` is an example.
        exact: that with the whole chain's exact gradient; the local one if there is none.
    """
    _OWN[config_class] = (local, exact or local)


_OWN: dict[type[DiffusionBlocksConfig], tuple[type, type]] = {}


def _kinds(config: DiffusionBlocksConfig) -> tuple[type, type]:
    own = next((_OWN[c] for c in type(config).__mro__ if c in _OWN), None)
    if own is not None:
        return own
    if isinstance(config, BlockedRecurrentConfig):  # a causal language model's, too: asked for first
        return (RecurrentDenoising if config.two_stream else TruncatedBackpropagation,) * 2
    return next((k for c, k in _OBJECTIVES.items() if isinstance(config, c)), (DenoisingScoreMatching,) * 2)


def default_objective(
    config: DiffusionBlocksConfig, gradient: str = "local", **settings: Any
) -> DenoisingScoreMatching | NextTokenPrediction | TruncatedBackpropagation | LabelPrediction | MaskedDiffusion:
    """The objective of a family: that of next or of hidden tokens for language models, ``LabelPrediction`` for image
    classifiers, else denoising score matching.

    Args:
        config: the model's.
        gradient: ``exact`` for the last block's loss with its exact gradient in each block
            (``ExactNextTokenPrediction``, ``ExactLabelPrediction``); with one block, its own loss is that.
        **settings: of the objective; those that it does not know are left out if they are not set.
    """
    exact = gradient == "exact" and config.num_blocks > 1
    if exact:
        check_exact(config)
    kind = _kinds(config)[exact]
    known = [field.name for field in fields(kind)]
    for name, value in settings.items():
        if name not in known and value:
            raise ValueError(
                f"{name}={value!r} has no meaning for {config.model_type}: it is trained by {kind.__name__}."
            )
    return kind(**{name: value for name, value in settings.items() if name in known})


__all__ = [
    "DenoisingScoreMatching",
    "ExactLabelPrediction",
    "ExactNextTokenPrediction",
    "HeldOutLoss",
    "LabelPrediction",
    "MaskedDiffusion",
    "NextTokenPrediction",
    "ObjectiveResult",
    "RecurrentDenoising",
    "TruncatedBackpropagation",
    "default_objective",
    "denoise_routed",
    "held_out_loss",
    "register_objective",
    "weighted_error",
]
