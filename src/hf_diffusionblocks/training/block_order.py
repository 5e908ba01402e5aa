"""Which block steps when."""

import torch

from ..configuration import DiffusionBlocksConfig
from .arguments import DiffusionBlocksTrainingArguments
from .data_stream import derive_seed


def block_schedule(
    blocks: list[int], num_updates: int, args: DiffusionBlocksTrainingArguments, sequential: bool = False
) -> list[int]:
    """The block of each iteration: every block gets exactly ``num_updates`` (arXiv 2506.14202, Alg. 1 draws b).

    ``random`` shuffles the visits, ``round_robin`` takes turns, ``sequential`` finishes block after block; a visit
    lasts ``args.steps_per_visit`` updates (the last one of a block may be shorter). ``sequential``, the order of a
    cascade, overrides them.
    """
    whole, rest = divmod(num_updates, args.steps_per_visit)
    visits = [args.steps_per_visit] * whole + [rest] * bool(rest)
    plan = [(block, length) for length in visits for block in blocks]
    if sequential or args.block_order == "sequential":
        plan = [(block, length) for block in blocks for length in visits]
    elif args.block_order == "random":
        generator = torch.Generator().manual_seed(derive_seed(args.seed, "block order"))
        plan = [plan[i] for i in torch.randperm(len(plan), generator=generator).tolist()]
    return [block for block, length in plan for _ in range(length)]


def is_sequential(config: DiffusionBlocksConfig, args: DiffusionBlocksTrainingArguments) -> bool:
    """Whether one block is finished before the next begins: by default a cascade's that are trained by local losses."""
    cascade = getattr(config, "context", "independent") == "cascade"
    order = "sequential" if cascade and args.gradient == "local" else "simultaneous"
    return (args.order or order) == "sequential"
