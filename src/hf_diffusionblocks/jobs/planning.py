"""What a plan counts, for every family: a step's memory, and what updates cost; as a whole, and on one screen."""

from dataclasses import dataclass
from typing import Any

from ..compute import TrainingCompute, training_flops
from ..configuration import DiffusionBlocksConfig
from ..memory import ALL_BLOCKS, BLOCKED, CHECKPOINTING, END_TO_END, MemoryPlan, plan_memory
from ..modeling import BlockedPreTrainedModel, format_block_parameters
from ..recipes import Recipe
from ..units import human_bytes
from .common import planned


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts.

    Attributes:
        recipe: the one that really runs, with its method resolved.
        model: without values, on the meta device.
        memory: what a training step holds.
        parts: lines that name the model's parts besides its blocks.
        cost: lines on compute, and on whether blocks pay.
        values: the figures behind ``cost``, JSON-ready.
    """

    recipe: Recipe
    model: BlockedPreTrainedModel
    memory: MemoryPlan
    parts: list[str]
    cost: list[str]
    values: dict[str, Any]

    def lines(self) -> list[str]:
        """All of it."""
        return [format_block_parameters(self.model), *self.parts, "", str(self.memory), "", *self.cost]

    def short_lines(self) -> list[str]:
        """What fits on a screen: model, data, blocks, updates, and memory in ``memory_lines``."""
        config, recipe = self.model.config, self.recipe
        blocks = f"{config.num_blocks} blocks" if config.num_blocks > 1 else "one block"
        return [
            f"model: {config.model_type} ({recipe.method}), {config.num_layers} layers in {blocks}",
            f"data: {_source(recipe)}",
            f"updates: {_updates(recipe)}",
            "",
            format_block_parameters(self.model),
            "",
            *memory_lines(self.memory),
        ]

    def to_dict(self) -> dict[str, Any]:
        """All figures, JSON-ready."""
        return self.memory.to_dict() | self.values


def memory_lines(memory: MemoryPlan) -> list[str]:
    """The rows of a plan that decide, in MiB and as shares of end to end: the whole model, all blocks, one block.

    Args:
        memory: of the run.

    Returns:
        A head and a line per way to train, without and with checkpointing.
    """
    count = memory.settings["num_blocks"]
    ways = {"end to end, all layers at once": END_TO_END}
    if count > 1:
        ways["all blocks in turn, in one process"] = ALL_BLOCKS
    ways[f"a job of one of {count} blocks, at most" if count > 1 else "the only block"] = BLOCKED
    lines = [f"{'memory of a training step':<38}{'':>20}{'with checkpointing':>22}"]
    for name, method in ways.items():
        cells = [memory.worst(method), memory.worst(method + CHECKPOINTING)]
        plain, checkpointed = (f"{human_bytes(row.total)} ({row.ratio:.2f})" for row in cells)
        lines.append(f"  {name:<36}{plain:>20}{checkpointed:>22}")
    return lines


def _source(recipe: Recipe) -> str:
    """Where the data come from, and what a recipe knows of their size."""
    data = recipe.data
    known = f"{data.name}, split {data.train_split}" if data.name else "none yet: give --data PATH"
    if recipe.kind.has_text:
        known += f", rows of {data.block_length} tokens"
    return known + (f", the first {data.max_samples:,} rows" if data.max_samples else "")


def _updates(recipe: Recipe) -> str:
    """How long a run is, in updates if that is known before the data are."""
    args, rows = recipe.training_arguments(), recipe.data.max_samples
    known = args.max_steps > 0 or bool(rows)
    long = f"{args.updates_per_block(rows or 1):,}" if known else f"{args.num_train_epochs:g} epoch(s)"
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps
    order = f", order {args.order}" if args.order else ""
    return f"{long} of each block, of {samples} samples; residency {args.residency}{order}"


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
