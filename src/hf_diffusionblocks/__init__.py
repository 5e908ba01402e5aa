"""DiffusionBlocks (arXiv 2506.14202) for Hugging Face models: train a network block by block, at 1/B of the memory.

Importing the package registers its configs and models with transformers' Auto classes.
"""

from .families.causal_lm import BlockedCausalLMConfig, BlockedForCausalLM
from .families.dit import BlockedDiTConfig, BlockedDiTModel
from .generation import denoising_generate
from .memory import plan_memory
from .noise import LogNormalNoise
from .objectives import DenoisingScoreMatching, NextTokenPrediction, held_out_loss
from .partition import BlockPartition
from .pipelines import BlockedDiTPipeline
from .training import DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments

__version__ = "0.1.0"

__all__ = [
    "BlockPartition",
    "BlockedCausalLMConfig",
    "BlockedDiTConfig",
    "BlockedDiTModel",
    "BlockedDiTPipeline",
    "BlockedForCausalLM",
    "DenoisingScoreMatching",
    "DiffusionBlocksTrainer",
    "DiffusionBlocksTrainingArguments",
    "LogNormalNoise",
    "NextTokenPrediction",
    "denoising_generate",
    "held_out_loss",
    "plan_memory",
]
