"""Training: arguments, the trainer of one block, the loop over blocks, checkpoints."""

from .arguments import DiffusionBlocksTrainingArguments
from .trainer import DiffusionBlocksTrainer

__all__ = ["DiffusionBlocksTrainer", "DiffusionBlocksTrainingArguments"]
