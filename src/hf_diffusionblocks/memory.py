"""What each way to train a model holds, in bytes, by kind and block: predicted from a config alone, in a second.

The prediction runs the real modules and the real objective on fake tensors, which have shapes but no memory, and counts
as :mod:`.memory_counting` counts a real step, where the kinds are defined.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from transformers import AutoModel

from .configuration import DiffusionBlocksConfig
from .families.loading import blocked_config_of
from .memory_counting import (
    KINDS,
    AnyValue,
    MemoryUse,
    Precision,
    SavedTensors,
    held_bytes,
    measure_memory,
    measure_step,
    set_mode,
)
from .modeling import BlockedPreTrainedModel
from .objectives import default_objective
from .suggest import unknown_name
from .training.arguments import MIXED_PRECISIONS
from .training.block_trainer import Objective

END_TO_END, BLOCKED, ALL_BLOCKS = "end to end", "blocked", "blocked, all blocks in one process"
CHECKPOINTING = ", checkpointing"
# Longer blocks are extrapolated from blocks of so many layers and one fewer: a layer more costs the same each time.
_PROBE_LAYERS = 2


@dataclass(frozen=True)
class MemoryRow(MemoryUse):
    """One way to train, in a :class:`MemoryPlan`.

    Attributes:
        method: ``end to end``, ``blocked`` or ``blocked, all blocks in one process``; with ``, checkpointing``.
        block: the block that the job trains; None for a row that holds the whole model.
        layers: number of layers that the job holds.
        parameters: number of parameters that the job holds.
        ratio: ``total`` over that of ``end to end`` without checkpointing.
    """

    method: str
    block: int | None
    layers: int
    parameters: int
    ratio: float


@dataclass(frozen=True)
class MemoryPlan:
    """What each way to train a model holds. ``print(plan)`` shows the table.

    Attributes:
        rows: end to end, then each block, then all blocks in one process, each without and with checkpointing.
        settings: what the figures hold for: model, blocks, batch size, precision, device.
    """

    rows: tuple[MemoryRow, ...]
    settings: dict[str, Any]

    def worst(self, method: str) -> MemoryRow:
        """The row of a method that holds the most: of ``blocked``, its largest block.

        Raises:
            ValueError: for a method that is not in the plan.
        """
        rows = [row for row in self.rows if row.method == method]
        if not rows:
            raise ValueError(unknown_name("method", method, list(dict.fromkeys(row.method for row in self.rows))))
        return max(rows, key=lambda row: row.total)

    @property
    def summary(self) -> str:
        """The plan in two sentences."""
        whole, lean = self.worst(END_TO_END), self.worst(END_TO_END + CHECKPOINTING)
        block, both = self.worst(BLOCKED), self.worst(BLOCKED + CHECKPOINTING)
        count = self.settings["num_blocks"]
        which = f"one of {count} blocks" if count > 1 else "the only block"
        return (
            f"A job that trains {which} holds at most {_human(block.total)}, {block.ratio:.2f} of end to end's "
            f"{_human(whole.total)}. With checkpointing it is {_human(both.total)}, "
            f"{both.total / lean.total:.2f} of end to end's {_human(lean.total)}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Settings, rows (in bytes) and summary, JSON-ready."""
        return {"settings": self.settings, "rows": [row.to_dict() for row in self.rows], "summary": self.summary}

    def format(self) -> str:
        """The table that ``diffusionblocks plan`` prints: aligned text, the footnotes and the summary."""
        kinds = ("EMA" if kind == "ema" else kind for kind in KINDS)
        head = ("method", "block", "layers", "params", "params %", *kinds, "total", "ratio")
        table = [head] + [
            (
                row.method,
                "all" if row.block is None else str(row.block),
                str(row.layers),
                f"{row.parameters:,}",
                f"{100 * row.parameters / self.rows[0].parameters:.1f}",
                *(_human(getattr(row, kind)) for kind in KINDS),
                _human(row.total),
                f"{row.ratio:.3f}",
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in table
        ]
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return "\n".join([settings, "", lines[0], "-" * len(lines[0]), *lines[1:], "", *_FOOTNOTES, "", self.summary])

    __str__ = format


_FOOTNOTES = (
    "blocked: a job that loads its own block only (blocks=[b]). A process that steps all blocks in turn keeps every",
    "  block's weights, moments and EMA: it saves gradients and activations only (the rows of all blocks).",
    "  With residency=host or disk it holds one block's row, and the next block's weights, moments and EMA.",
    "  gradient=exact adds the weights of up to two blocks that run again; an update of one block then costs about one",
    "  of end to end with checkpointing, so K updates of each of B blocks cost B times K of end to end.",
    "moments: AdamW's. activations: what autograd keeps for the backward pass, at its peak, the weights' casts under",
    "  autocast included. Kernels' workspaces, the allocator's rounding and the device's context come on top.",
    "params %, ratio: the parameters and the total over those of end to end without checkpointing.",
)


def _human(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"


def plan_memory(
    model_or_config: BlockedPreTrainedModel | DiffusionBlocksConfig | str | os.PathLike | Mapping[str, Any],
    num_blocks: int | None = None,
    *,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
    mixed_precision: str = "no",
    use_ema: bool = True,
    objective: Objective | None = None,
    device: str | torch.device | None = None,
    **batch_settings: Any,
) -> MemoryPlan:
    """Predict what training holds, by kind and block, without allocating the model.

    Args:
        model_or_config: a blocked model or its config; of a model only the config is used. Or, as ``from_base`` takes
            it, the directory or Hub id of a blocked or a base model, or a mapping with a base's config.
        num_blocks: B, to plan for another number of blocks than the config's.
        batch_size: samples per forward pass.
        dtype: of the weights.
        mixed_precision: ``no`` or ``bf16``, for autocast.
        use_ema: keep a moving average of the weights.
        objective: as in :class:`DiffusionBlocksTrainer`; without a teacher, whose weights would come on top.
        device: where training runs (its kernels decide what is saved); by default the GPU if there is one.
        **batch_settings: for the family's ``dummy_batch``.

    Returns:
        A :class:`MemoryPlan`; every parameter is trained, by AdamW.

    Raises:
        ValueError: for a batch size below 1, a setting that is not allowed, more blocks than layers, a device that
            this machine lacks, or an objective that decides by values, which a plan does not have.

    Example:
        >>> from hf_diffusionblocks import BlockedDiTConfig
        >>> base = {"num_layers": 12, "num_attention_heads": 4, "attention_head_dim": 16, "sample_size": 16}
        >>> plan = plan_memory(BlockedDiTConfig(base_config=base, num_blocks=3), batch_size=8)
        >>> round(plan.worst("blocked").ratio, 2)
        0.34
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number of at least 1.")
    if mixed_precision not in MIXED_PRECISIONS:
        raise ValueError(unknown_name("mixed_precision", mixed_precision, MIXED_PRECISIONS))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be a floating point torch.dtype, such as torch.float32.")
    given = model_or_config.config if isinstance(model_or_config, BlockedPreTrainedModel) else model_or_config
    if isinstance(given, (str, os.PathLike, Mapping)):
        given = blocked_config_of(given, num_blocks)
    if not isinstance(given, DiffusionBlocksConfig):
        raise ValueError(
            f"plan_memory takes a blocked model, its config, a directory or Hub id, or a base's config as a dict, not "
            f"a {type(given).__name__}."
        )
    make = type(model_or_config) if isinstance(model_or_config, BlockedPreTrainedModel) else AutoModel.from_config
    objective = objective or default_objective(given)
    step = _FakeStep(make, batch_size, dtype, mixed_precision, objective, _device(device), batch_settings)
    config = given if num_blocks in (None, given.num_blocks) else _recut(given, num_blocks=num_blocks)
    blocked = step.build(config)
    end_to_end = step.build(_recut(config, num_blocks=1, partition="equal_probability"))
    blocks = range(config.num_blocks)
    ways = [(END_TO_END, end_to_end, [0], None), *((BLOCKED, blocked, [b], b) for b in blocks)]
    ways.append((ALL_BLOCKS, blocked, list(blocks), None))
    rows: list[MemoryRow] = []
    for method in (END_TO_END, BLOCKED, ALL_BLOCKS):
        for suffix in ("", CHECKPOINTING):
            for _, model, held, block in (way for way in ways if way[0] == method):
                use = step.predict(model, held, checkpointing=bool(suffix), use_ema=use_ema)
                rows.append(
                    MemoryRow(
                        **asdict(use),
                        method=method + suffix,
                        block=block,
                        layers=sum(len(model.partition.layers(b)) for b in held),
                        parameters=sum(t.numel() for t in _resident(model, held) if isinstance(t, nn.Parameter)),
                        ratio=use.total / rows[0].total if rows else 1.0,
                    )
                )
    settings = {
        "model": config.model_type,
        "num_layers": config.num_layers,
        "num_blocks": config.num_blocks,
        "batch_size": batch_size,
        "dtype": str(dtype).removeprefix("torch."),
        "mixed_precision": mixed_precision,
        "use_ema": use_ema,
        "device": step.device.type,
        **batch_settings,
    }
    return MemoryPlan(tuple(rows), settings)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = str(device).partition(":")[0]
    backend = getattr(torch, kind, None)
    if kind != "cpu" and not (hasattr(backend, "is_available") and backend.is_available()):
        raise ValueError(
            f"device={str(device)!r} is not available here, and its kernels decide what a step saves. Plan on a "
            "machine that has it, or with device='cpu' for CPU kernels."
        )
    return torch.device(device)


def _recut(config: DiffusionBlocksConfig, **changes: Any) -> DiffusionBlocksConfig:
    return type(config).from_dict(config.to_dict() | {"edges": None, "layers_per_block": None} | changes)


def _resident(model: BlockedPreTrainedModel, held: Sequence[int]) -> list[Tensor]:
    """Parameters and buffers of a job that holds some blocks: theirs and those of no block."""
    prefixes = tuple(f"blocks.{b}." for b in held)
    named = [*model.named_parameters(), *model.named_buffers()]
    return [tensor for name, tensor in named if not name.startswith("blocks.") or name.startswith(prefixes)]


class _FakeStep:
    """A training step on fake tensors."""

    def __init__(
        self,
        make: Callable[..., BlockedPreTrainedModel],
        batch_size: int,
        dtype: torch.dtype,
        mixed_precision: str,
        objective: Objective,
        device: torch.device,
        batch_settings: dict[str, Any],
    ):
        self.make, self.batch_size, self.dtype, self.batch_settings = make, batch_size, dtype, batch_settings
        self.objective, self.device = objective, device
        self.precision = Precision(device, mixed_precision)
        self._known: dict[tuple, tuple[int, int]] = {}

    def build(self, config: DiffusionBlocksConfig, blocks: Sequence[int] | None = None) -> BlockedPreTrainedModel:
        """A model without memory, on the meta device."""
        with torch.device("meta"):
            return self.make(config, blocks=blocks).to(self.dtype)

    def predict(
        self, model: BlockedPreTrainedModel, held: Sequence[int], *, checkpointing: bool, use_ema: bool
    ) -> MemoryUse:
        """Bytes of a job that holds some blocks and steps them in turn."""
        trained = {b: list(model.block(b).parameters()) for b in held}
        if 0 in trained:  # what blocks share trains with the first one
            trained[0] += [p for _, p in model.shared_parameters()]
        size = held_bytes(p for parameters in trained.values() for p in parameters)
        return MemoryUse(
            weights=held_bytes(_resident(model, held)),
            gradients=max(held_bytes(parameters) for parameters in trained.values()),
            moments=2 * size + 4 * sum(len(parameters) for parameters in trained.values()),
            ema=size if use_ema else 0,
            activations=max(self.activations(model, b)[checkpointing] for b in held),
        )

    def activations(self, model: BlockedPreTrainedModel, block: int) -> tuple[int, int]:
        """Peak bytes that autograd keeps in a step of a block, without and with checkpointing."""
        key = tuple(tuple(p.shape) for p in model.block(block).parameters())
        if key not in self._known:
            self._known[key] = self._extrapolate(model, block) or self._run(model.config, block)
        return self._known[key]

    def _extrapolate(self, model: BlockedPreTrainedModel, block: int) -> tuple[int, int] | None:
        """From two short blocks; None if the block is short itself or if its layers differ in size."""
        layers, num_layers = len(model.partition.layers(block)), model.config.num_layers
        if layers <= _PROBE_LAYERS:
            return None
        sizes, activations = [], []
        for probe in (_PROBE_LAYERS - 1, _PROBE_LAYERS):
            cut = {"num_blocks": 2, "layers_per_block": [probe, num_layers - probe], "partition": "equal_probability"}
            short = self.build(_recut(model.config, **cut), blocks=[0])
            sizes.append(held_bytes(short.block(0).parameters()))
            activations.append(self.activations(short, 0))
        more = layers - _PROBE_LAYERS
        if held_bytes(model.block(block).parameters()) != sizes[1] + more * (sizes[1] - sizes[0]):
            return None
        plain, checkpointed = (long + more * (long - short) for short, long in zip(*activations, strict=True))
        return plain, checkpointed

    def _run(self, config: DiffusionBlocksConfig, block: int) -> tuple[int, int]:
        model = self.build(config, blocks=[block])
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                model.to_empty(device=self.device)
                with AnyValue():
                    return self._peak(model, block, False), self._peak(model, block, True)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"{type(self.objective).__name__} decides by the values of tensors ({error.func}), which a plan does "
                "not have (a teacher's blocks are chosen so). Plan without it, or count a real step: measure_memory()."
            ) from error

    def _peak(self, model: BlockedPreTrainedModel, block: int, checkpointing: bool) -> int:
        # Fake tensors cannot hold the state of the random number generator, which autograd does not save anyway.
        set_mode(model, checkpointing, preserve_rng_state=False)
        batch = model.dummy_batch(self.batch_size, **self.batch_settings)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        with SavedTensors([model]) as saved:
            with self.precision.autocast():
                loss = self.objective(model, block, batch, torch.Generator()).loss
            if checkpointing:  # otherwise the forward pass's end is the peak
                self.precision.backward(loss)
        return saved.peak


__all__ = ["MemoryPlan", "MemoryRow", "MemoryUse", "measure_memory", "measure_step", "plan_memory"]
