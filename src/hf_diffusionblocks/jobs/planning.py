"""What a plan counts, for every family: a step's memory, and what updates cost."""

from typing import Any

from ..compute import TrainingCompute, training_flops
from ..configuration import DiffusionBlocksConfig
from ..memory import MemoryPlan, plan_memory
from ..recipes import Recipe
from .common import planned


def _tokens(recipe: Recipe) -> dict[str, Any]:
    return {"tokens": recipe.data.block_length} if recipe.kind.has_text else {}


def planned_memory(config: DiffusionBlocksConfig, recipe: Recipe, alternatives: bool = True) -> MemoryPlan:
    """What a training step of a recipe holds in memory; see ``plan_memory``."""
    args = recipe.training_arguments()
    return plan_memory(config, **planned(args), alternatives=alternatives, **_tokens(recipe))


def planned_compute(config: DiffusionBlocksConfig, recipe: Recipe, **lower: Any) -> TrainingCompute:
    """What the updates of a recipe cost; see ``training_flops``, which ``lower`` goes to."""
    args = recipe.training_arguments()
    return training_flops(
        config,
        batch_size=args.per_device_train_batch_size,
        gradient_checkpointing=args.gradient_checkpointing,
        **lower,
        **_tokens(recipe),
    )


def compute_lines(cost: TrainingCompute) -> list[str]:
    """What updates cost, as lines of a plan."""
    return [
        "compute: FLOPs of an update of each block; ratio to an end-to-end update of all layers",
        str(cost),
        f"A run of blocks costs {cost.ratio:.2f} times the end-to-end run of as many updates.",
    ]


def compute_values(cost: TrainingCompute) -> dict[str, Any]:
    """The figures behind ``compute_lines``, JSON-ready."""
    return {
        "flops_per_update_of_every_block": cost.flops,
        "flops_per_end_to_end_update": cost.end_to_end,
        "compute_ratio": cost.ratio,
        "flops_per_block": [block.flops for block in cost.blocks],
    }
