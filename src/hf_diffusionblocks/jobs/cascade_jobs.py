"""Jobs that train some blocks of a cascade: which blocks they hold, and where those below come from."""

import copy
from collections.abc import Iterator

import torch

from ..configuration import DiffusionBlocksConfig
from ..families.categorical import BlockedCategoricalModel
from ..modeling import BlockedPreTrainedModel
from ..training.arguments import DiffusionBlocksTrainingArguments
from ..training.block_order import is_sequential
from ..training.cascade import check_job, with_gradient
from ..training.parallel import my_blocks

_SAME = ("base_config", "num_blocks", "layers_per_block", "readout", "context", "auxiliary_layers")


def held_blocks(
    config: DiffusionBlocksConfig, args: DiffusionBlocksTrainingArguments, blocks: list[int] | None, lower: str | None
) -> list[int] | None:
    """The blocks that a job holds, None for all; ``args.blocks`` becomes those that it trains.

    Args:
        config: of the model.
        args: of the run.
        blocks: train these only. A cascade's job also holds the blocks below them, which it runs forward.
        lower: directory of a saved model with the trained blocks below.

    Raises:
        ValueError: for blocks that do not exist, or lower ones where there is no use for them.
    """
    cascade = getattr(config, "context", "independent") == "cascade" and config.num_blocks > 1
    if lower is not None and (blocks is None or not cascade or min(blocks) == 0):
        raise ValueError(
            f"--lower {lower} gives a cascade's job the trained blocks below its own: name a block above 0 with "
            "--block, in a recipe with blocks.context=cascade."
        )
    for block in blocks or ():
        config.make_partition().check_block(block)
    held = blocks
    if blocks is not None:
        args.blocks = sorted(set(blocks))
        if cascade and config.pretrained and args.gradient != "local" and not config.auxiliary_layers:
            held = None  # the exact gradient comes through the blocks above
        elif cascade and (lower is not None or config.pretrained):
            held = list(range(max(blocks) + 1))
    return held if cascade else my_blocks(config, args)


def take_lower_blocks(model: BlockedCategoricalModel, directory: str, count: int) -> None:
    """Load the shared parts and the first so many blocks from a saved model.

    Raises:
        ValueError: if that is another model, or does not hold all of them.
    """
    for block, below in _lower_blocks(type(model), model.config, directory, count):
        model.block(block).load_state_dict(below.block(block).state_dict())
    shared = {name: tensor for name, tensor in below.state_dict().items() if not name.startswith("blocks.")}
    model.load_state_dict(shared, strict=False)
    model.config.trained_blocks = list(below.config.trained_blocks)


def check_planned_job(
    model: BlockedPreTrainedModel,
    args: DiffusionBlocksTrainingArguments,
    blocks: list[int] | None,
    lower: str | None,
) -> None:
    """Raise the ``ValueError`` that a job would end with before its first update, for a plan of it.

    Args:
        model: the plan's, of any device; stays as it is.
        args: of the run.
        blocks: that the job trains; None for all.
        lower: directory of a saved model with the trained blocks below.
    """
    kind, config = type(model), copy.deepcopy(model.config)
    held = held_blocks(config, args, blocks, lower)
    if lower is not None and blocks:
        for _, below in _lower_blocks(kind, config, lower, min(blocks)):
            config.trained_blocks = list(below.config.trained_blocks)
    with torch.device("meta"):
        job = kind(config, blocks=held)
    args = with_gradient(job, args, distils=args.distillation_weight > 0 or args.hidden_weight > 0)
    trained = sorted(set(job.resident_blocks if args.blocks is None else args.blocks))
    try:
        check_job(job, trained, args, is_sequential(config, args))
    except ValueError as error:
        if blocks is not None:
            raise ValueError(f"{error}{how_to_mend(str(error), blocks)}") from error
        raise


def _lower_blocks(
    kind: type[BlockedPreTrainedModel], config: DiffusionBlocksConfig, directory: str, count: int
) -> Iterator[tuple[int, BlockedPreTrainedModel]]:
    """The first so many blocks of a saved model that must agree with a config, each with the model that holds it."""
    for block in range(count):  # one at a time: they may be streamed
        try:
            below = kind.from_pretrained(directory, blocks=[block])
        except ValueError as error:
            raise ValueError(
                f"--lower {directory} does not give block {block}, which block {count} reads ({error}) Train --block "
                f"{block} first, with --lower if it is not the lowest, and give the model that it saves."
            ) from error
        for name in _SAME:
            theirs, ours = getattr(below.config, name), getattr(config, name)
            if theirs != ours:
                raise ValueError(
                    f"the blocks in {directory} belong to another model: its {name} is {theirs!r}, here {ours!r}. Use "
                    "the same recipe for all blocks of a cascade."
                )
        yield block, below


def how_to_mend(error: str, blocks: list[int]) -> str:
    """An error's advice in the words of the command line."""
    if "train_shared=" in error:
        return " On the command line: training.train_shared=none."
    if "have not been trained" in error:
        return (
            f" On the command line: train --block {blocks[0] - 1} first, then --block {blocks[0]} with --lower, the "
            "directory of the model that it saved."
        )
    return ""
