"""Several processes: which blocks each one trains, and how those that train the same block act as one.

Independent blocks need nothing of each other, so processes own different blocks and exchange nothing
(``parallelism="blocks"``). With more processes than blocks, those of a block form a group: each takes its part of an
update's samples, and gradients are averaged as they arrive. A cascade's blocks build on each other, so there all
processes are one group (``parallelism="data"``). Within a group the layers' weights, gradients, moments and averages
are sharded as well if Accelerate was launched with FSDP2.

Gradients are averaged parameter by parameter, from hooks: torch's ``DistributedDataParallel`` would keep buckets of
the size of each block's gradients for as long as the run lasts, which is what residency and the blocks are there to
avoid, and it sees only what goes through a module's ``forward``.

An update of a group of g processes with a accumulation steps is the update of one process with a g of them: the same
samples, the same noise, and, up to the order of sums, the same weights.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, ProjectConfiguration, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..adapter_checks import check_no_adapter
from ..configuration import DiffusionBlocksConfig
from ..modeling import BlockedPreTrainedModel
from .arguments import DiffusionBlocksTrainingArguments


@dataclass(frozen=True)
class Share:
    """What a group of processes trains.

    Attributes:
        blocks: in order.
        ranks: of the processes.
    """

    blocks: tuple[int, ...]
    ranks: tuple[int, ...]


def share_out(blocks: Sequence[int], num_processes: int) -> list[Share]:
    """Independent blocks over processes, as evenly as whole numbers allow; more or fewer processes than blocks.

    Example:
        >>> [(s.blocks, s.ranks) for s in share_out([0, 1, 2], 2)]
        [((0, 2), (0,)), ((1,), (1,))]
        >>> [(s.blocks, s.ranks) for s in share_out([0, 1], 5)]
        [((0,), (0, 1, 2)), ((1,), (3, 4))]
    """
    blocks = sorted(set(blocks))
    if num_processes <= len(blocks):
        return [Share(tuple(blocks[rank::num_processes]), (rank,)) for rank in range(num_processes)]
    least, more = divmod(num_processes, len(blocks))
    ends = [least * (i + 1) + min(i + 1, more) for i in range(len(blocks))]
    starts = [0, *ends]
    return [Share((block,), tuple(range(starts[i], ends[i]))) for i, block in enumerate(blocks)]


def make_accelerator(args: DiffusionBlocksTrainingArguments) -> Accelerator:
    """Accelerate's state, on the CPU also where there is nothing else and several processes were launched."""
    directory = str(Path(args.output_dir))
    return Accelerator(
        mixed_precision="no",
        cpu=on_cpu(args),
        log_with=args.report_to or None,
        project_config=ProjectConfiguration(project_dir=directory, logging_dir=directory),
    )


def process_state(args: DiffusionBlocksTrainingArguments) -> PartialState:
    """This process among those that were launched, and its device."""
    return PartialState(cpu=on_cpu(args))


def on_cpu(args: DiffusionBlocksTrainingArguments) -> bool:
    """Whether the run is on the CPU. Without a GPU, Accelerate joins launched processes only if it is told so."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return args.cpu or (launched and torch.accelerator.current_accelerator(check_available=True) is None)


def shares(config: DiffusionBlocksConfig, args: DiffusionBlocksTrainingArguments, num_processes: int) -> list[Share]:
    """What each group of processes trains.

    Raises:
        ValueError: if processes are to own blocks that build on each other.
    """
    blocks = range(config.num_blocks) if args.blocks is None else args.blocks
    chained = getattr(config, "context", "independent") == "cascade"
    if chained and args.parallelism == "blocks":
        raise ValueError(
            "parallelism='blocks' is for independent blocks: those of a cascade build on each other. Use "
            "parallelism='data', in which all processes train the same block."
        )
    if chained or args.parallelism == "data":
        return [Share(tuple(sorted(set(blocks))), tuple(range(num_processes)))]
    return share_out(list(blocks), num_processes)


def my_blocks(config: DiffusionBlocksConfig, args: DiffusionBlocksTrainingArguments) -> list[int] | None:
    """The blocks that this process needs of a model; None for all."""
    state = process_state(args)
    every = shares(config, args, state.num_processes)
    if len(every) == 1:
        return args.blocks
    return list(next(share for share in every if state.process_index in share.ranks).blocks)


class Group:
    """The processes that train the same blocks; by default this one alone.

    Attributes:
        blocks: what they train.
        rank: of this process within the group.
        size: number of processes.
        alone: whether other groups train other blocks of the model, which this process then needs nothing of.
        sharded: whether the layers of the blocks lie in shards on all of them (FSDP2).
    """

    def __init__(self, blocks: Sequence[int], rank: int = 0, size: int = 1):
        self.blocks, self.rank, self.size = tuple(blocks), rank, size
        self.alone = False
        self.sharded = False
        self._group: Any = None
        self._control: Any = None
        self._plugin: Any = None
        self._device: Any = None

    @classmethod
    def make(
        cls, config: DiffusionBlocksConfig, args: DiffusionBlocksTrainingArguments, accelerator: Accelerator
    ) -> "Group":
        """This process's group. All processes call it at the same time."""
        every = shares(config, args, accelerator.num_processes)
        mine = next(s for s in every if accelerator.process_index in s.ranks)
        group = cls(mine.blocks, mine.ranks.index(accelerator.process_index), len(mine.ranks))
        group._device, group.alone = accelerator.device, len(every) > 1
        for share in every:
            if len(share.ranks) > 1:  # making a group needs all processes, members or not
                made = dist.new_group(list(share.ranks))
                # The others wait for the leader, which may write or compute for long.
                control = dist.new_group(list(share.ranks), backend="gloo", timeout=timedelta(days=7))
                if share is mine:
                    group._group, group._control = made, control
        if group.size > 1 and sharded_launch():
            group._plugin, group.sharded = _fsdp_plugin(args), True
        return group

    @property
    def is_leader(self) -> bool:
        """Whether this process writes the group's files and logs."""
        return self.rank == 0

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether any process of the group raised each flag. On the CPU: no device waits for it."""
        if self.size == 1:
            return flags
        values = torch.tensor(flags, dtype=torch.int32, device="cpu")
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._control)
        return tuple(bool(v) for v in values.tolist())

    def wait(self) -> None:
        """Return when all processes of the group have come here."""
        self.any(False)

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """Run what follows in the leader, then in the others, which find what it has written."""
        if not self.is_leader:
            self.wait()
        yield
        if self.is_leader:
            self.wait()

    def gathered(self, model: BlockedPreTrainedModel) -> dict[str, Tensor] | None:
        """The state dict of a sharded model as whole tensors on the CPU; None if the model is not sharded."""
        return whole(model.state_dict()) if self.sharded else None

    def save_pretrained(self, model: BlockedPreTrainedModel, directory: Path) -> None:
        """Save a model that all processes of the group have, or have in shards. Returns when it is there."""
        check_no_adapter(model.blocks, f"save the model in {directory}")  # in all processes, before any waits
        weights = self.gathered(model)
        if self.is_leader:
            model.save_pretrained(directory, state_dict=weights)
        self.wait()

    def mean_(self, value: Tensor) -> Tensor:
        """The mean over the group, in place."""
        if self.size > 1:
            dist.all_reduce(value, group=self._group)
            value /= self.size
        return value

    def average(self, parameter: Tensor) -> None:
        """The mean of a parameter's gradient over the group, in place."""
        self.mean_(parameter.grad)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
        """Average gradients over the group as each arrives in a backward pass.

        What FSDP2 shards it averages itself. Returns a function to call after the backward pass, which waits for those
        that are still on their way.
        """
        arriving: list[tuple[Any, nn.Parameter]] = []
        plain = [p for p in parameters if not isinstance(p, DTensor)]

        def send(parameter: nn.Parameter) -> None:
            if self.averaging:
                work = dist.all_reduce(parameter.grad, group=self._group, async_op=True)
                arriving.append((work, parameter))

        def finish() -> None:
            for work, parameter in arriving:
                work.wait()
                parameter.grad /= self.size
            arriving.clear()

        for parameter in plain if self.size > 1 else ():
            parameter.register_post_accumulate_grad_hook(send)
        return finish

    averaging = True  # false in backward passes whose gradients only accumulate here

    def share_weights(self, model: BlockedPreTrainedModel) -> None:
        """Take over the leader's weights and buffers, and shard the layers of the blocks if the run is sharded."""
        if self.size == 1:
            return
        source = dist.get_global_rank(self._group, 0)
        with torch.no_grad():
            at_home = model.streamer is not None  # then blocks came from a file, or from the seed
            weights = [p for _, p in model.shared_parameters()] if at_home else model.parameters()
            for tensor in (*weights, *model.buffers()):
                dist.broadcast(tensor.data, source, group=self._group)
        if self.sharded:
            mesh = DeviceMesh.from_group(self._group, self._device.type)
            for block in self.blocks:
                for module in model.layer_modules(block):  # stem, norm and head are small and stay whole everywhere
                    # Two streams call a module twice and go backward through both calls in turn: it stays whole then.
                    reshard = bool(self._plugin.reshard_after_forward) and not self._calls_twice(model)
                    fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
                    module.set_reshard_after_backward(reshard)

    @staticmethod
    def _calls_twice(model: BlockedPreTrainedModel) -> bool:
        return bool(getattr(model.config, "two_stream", False))

    def reshard(self, model: BlockedPreTrainedModel, block: int) -> None:
        """After a block's update: keep this process's shards of its weights only."""
        if self.sharded and self._calls_twice(model):
            for module in model.layer_modules(block):
                module.reshard()

    def set_accumulating(self, model: BlockedPreTrainedModel, block: int, accumulating: bool) -> None:
        """Whether the next backward pass's gradients stay on this process, to be averaged with later ones."""
        self.averaging = not accumulating
        if self.sharded:
            for module in model.layer_modules(block):
                module.set_requires_gradient_sync(not accumulating)


def sharded_launch() -> bool:
    """Whether ``accelerate launch`` was told to shard."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def _fsdp_plugin(args: DiffusionBlocksTrainingArguments) -> FullyShardedDataParallelPlugin:
    """Accelerate's settings of FSDP, as it was launched with them."""
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version={plugin.fsdp_version}: FSDP2 shards a block. Set fsdp_version: 2.")
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("fsdp_offload_params=true is not known here: launch without FSDP, with residency='host'.")
    for name, value in (("residency", "device"), ("gradient", "local"), ("lower_outputs", "recompute")):
        if getattr(args, name) != value:
            raise ValueError(
                f"{name}={getattr(args, name)!r} does not go with FSDP2, which shards a block over processes: use "
                f"{name}={value!r}, or launch without FSDP."
            )
    if args.gradient_release or not args.optim.startswith("adamw_torch"):
        raise ValueError(
            f"optim={args.optim!r} with gradient_release={args.gradient_release} does not go with FSDP2: use torch's "
            "AdamW and no release, or launch without FSDP."
        )
    return plugin


def keep_blocks(model: BlockedPreTrainedModel, blocks: Sequence[int]) -> None:
    """Free all blocks of a model but some, as if the others had not been loaded.

    Raises:
        ValueError: if one to keep is not loaded, or others are and blocks are streamed.
    """
    for block in blocks:
        model.check_loaded(block)
    others = [b for b in model.resident_blocks if b not in blocks]
    if others and model.streamer is not None:
        raise ValueError(
            f"blocks {others} cannot be dropped from a model whose blocks are streamed: make or load it with "
            f"blocks={list(blocks)}."
        )
    for block in others:
        del model.blocks[str(block)]


# -- tensors that may be sharded ----------------------------------------------------------------------------------


def whole(value: Any) -> Any:
    """A tensor as a whole on the CPU if it is sharded (all processes of the group call it), and values within dicts."""
    if isinstance(value, DTensor):
        return value.detach().full_tensor().cpu()
    if isinstance(value, dict):
        return {key: whole(v) for key, v in value.items()}
    return value


def as_sharded(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the shards of another of its shape."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of gradients, of which some may be sharded."""
    parts = [[g for g in gradients if isinstance(g, DTensor) is sharded] for sharded in (False, True)]
    norms = [whole_norm(torch.nn.utils.get_total_norm(part)) for part in parts if part]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def whole_norm(norm: Tensor) -> Tensor:
    """The value of a norm whose terms lie on several processes."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a norm of at most ``max_norm``; gives the norm from before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = total_norm(gradients)
    for sharded in (False, True):
        part = [p for p in parameters if isinstance(p, DTensor) is sharded]
        if part:
            torch.nn.utils.clip_grads_with_norm_(part, max_norm, norm)
    return norm
