"""DiffusionBlocks (arXiv 2506.14202) for Hugging Face models: train a network block by block, at 1/B of the memory."""

from .families.dit import BlockedDiTConfig, BlockedDiTModel
from .noise import LogNormalNoise
from .partition import BlockPartition
from .training import DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments

__version__ = "0.1.0"
