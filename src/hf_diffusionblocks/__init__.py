"""DiffusionBlocks (arXiv 2506.14202) for Hugging Face models: train a network block by block, at 1/B of the memory.

Importing the package makes its configs and models known to transformers' Auto classes. The names below are imported
when they are first used (PEP 562), so that importing the package costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .auto_classes import register_families

if TYPE_CHECKING:
    from .families.causal_lm import BlockedCausalLMConfig, BlockedForCausalLM
    from .families.dit import BlockedDiTConfig, BlockedDiTModel
    from .families.image_classification import BlockedForImageClassification, BlockedImageClassificationConfig
    from .families.masked_lm import BlockedForMaskedLM, BlockedMaskedLMConfig
    from .families.recurrent import BlockedRecurrentConfig, BlockedRecurrentForCausalLM
    from .generation import denoising_generate
    from .masked_generation import unmask
    from .memory import plan_memory
    from .merging import merge_blocks
    from .noise import LogNormalNoise
    from .objectives import (
        DenoisingScoreMatching,
        LabelPrediction,
        MaskedDiffusion,
        NextTokenPrediction,
        held_out_loss,
    )
    from .partition import BlockPartition
    from .pipelines import BlockedDiTPipeline
    from .recipes.registration import register_family
    from .training import DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments

__version__ = "0.1.0"

_MODULES = {
    "BlockPartition": "partition",
    "BlockedCausalLMConfig": "families.causal_lm",
    "BlockedDiTConfig": "families.dit",
    "BlockedDiTModel": "families.dit",
    "BlockedDiTPipeline": "pipelines",
    "BlockedForCausalLM": "families.causal_lm",
    "BlockedForImageClassification": "families.image_classification",
    "BlockedImageClassificationConfig": "families.image_classification",
    "BlockedForMaskedLM": "families.masked_lm",
    "BlockedMaskedLMConfig": "families.masked_lm",
    "BlockedRecurrentConfig": "families.recurrent",
    "BlockedRecurrentForCausalLM": "families.recurrent",
    "DenoisingScoreMatching": "objectives",
    "DiffusionBlocksTrainer": "training",
    "DiffusionBlocksTrainingArguments": "training",
    "LabelPrediction": "objectives",
    "LogNormalNoise": "noise",
    "MaskedDiffusion": "objectives",
    "NextTokenPrediction": "objectives",
    "denoising_generate": "generation",
    "held_out_loss": "objectives",
    "merge_blocks": "merging",
    "plan_memory": "memory",
    "register_family": "recipes.registration",
    "unmask": "masked_generation",
}

__all__ = [
    "BlockPartition",
    "BlockedCausalLMConfig",
    "BlockedDiTConfig",
    "BlockedDiTModel",
    "BlockedDiTPipeline",
    "BlockedForCausalLM",
    "BlockedForImageClassification",
    "BlockedImageClassificationConfig",
    "BlockedForMaskedLM",
    "BlockedMaskedLMConfig",
    "BlockedRecurrentConfig",
    "BlockedRecurrentForCausalLM",
    "DenoisingScoreMatching",
    "DiffusionBlocksTrainer",
    "DiffusionBlocksTrainingArguments",
    "LabelPrediction",
    "LogNormalNoise",
    "MaskedDiffusion",
    "NextTokenPrediction",
    "denoising_generate",
    "held_out_loss",
    "merge_blocks",
    "plan_memory",
    "register_family",
    "unmask",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_families()
