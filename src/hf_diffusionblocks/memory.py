"""What each way to train a model holds, in bytes, by kind and block: predicted from a config alone, in a second.

A block needs weights, gradients, moments and activations of L / B layers (arXiv 2506.14202, section 3).

The prediction runs the real modules and the real objective on fake tensors (``memory_fake_steps``) and counts as
``memory_counting`` counts a real step, where the kinds are defined. ``memory_alternatives`` puts other methods
beside ours.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from .configuration import DiffusionBlocksConfig
from .families.categorical_config import PLAIN, CategoricalConfig
from .families.loading import blocked_config_of
from .memory_alternatives import WHOLE, Alternatives, compare, human
from .memory_counting import KINDS, MemoryUse, measure_memory, measure_step
from .memory_fake_steps import FakeStep, recut, resident
from .modeling import BlockedPreTrainedModel
from .suggest import unknown_name
from .training.arguments import MIXED_PRECISIONS, OPTIMIZERS
from .training.block_trainer import Objective
from .training.optimizers import check_optimizer

END_TO_END, BLOCKED, ALL_BLOCKS = "end to end", "blocked", "blocked, all blocks in one process"
CHECKPOINTING = ", checkpointing"


@dataclass(frozen=True)
class MemoryRow(MemoryUse):
    """One way to train, in a ``MemoryPlan``.

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
        settings: what the figures hold for: model, blocks, batch size, precision, optimizer, device.
        alternatives: what other methods hold, alone and with one block; None if they were not asked for.
    """

    rows: tuple[MemoryRow, ...]
    settings: dict[str, Any]
    alternatives: Alternatives | None = None

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
            f"A job that trains {which} holds at most {human(block.total)}, {block.ratio:.2f} of end to end's "
            f"{human(whole.total)}. With checkpointing it is {human(both.total)}, "
            f"{both.total / lean.total:.2f} of end to end's {human(lean.total)}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Settings, rows (in bytes), summary and alternatives, JSON-ready."""
        plan = {"settings": self.settings, "rows": [row.to_dict() for row in self.rows], "summary": self.summary}
        return plan if self.alternatives is None else plan | {"alternatives": self.alternatives.to_dict()}

    def format(self) -> str:
        """What ``diffusionblocks plan`` prints: the table with footnotes and summary, then that of the alternatives."""
        kinds = ("EMA" if kind == "ema" else kind for kind in KINDS)
        head = ("method", "block", "layers", "params", "params %", *kinds, "total", "ratio")
        table = [head] + [
            (
                row.method,
                "all" if row.block is None else str(row.block),
                str(row.layers),
                f"{row.parameters:,}",
                f"{100 * row.parameters / self.rows[0].parameters:.1f}",
                *(human(getattr(row, kind)) for kind in KINDS),
                human(row.total),
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
        others = [] if self.alternatives is None else ["", str(self.alternatives)]
        rule = "-" * len(lines[0])
        return "\n".join([settings, "", lines[0], rule, *lines[1:], "", *_FOOTNOTES, "", self.summary, *others])

    __str__ = format


_FOOTNOTES = (
    "blocked: a job that loads its own block only (blocks=[b]). A process that steps all blocks in turn keeps every",
    "  block's weights, moments and EMA: it saves gradients and activations only (the rows of all blocks).",
    "  With residency=host or disk it holds one block's row, and the next block's weights, moments and EMA.",
    "  gradient=exact adds the weights of up to two blocks that run again; an update of one block then costs about one",
    "  of end to end with checkpointing, so K updates of each of B blocks cost B times K of end to end.",
    "moments: the optimizer's state. gradients: under gradient_release, the most that exist at a time. activations:",
    "  what autograd keeps for the backward pass, at its peak, the weights' casts under autocast included. Kernels'",
    "  workspaces, the allocator's rounding and the device's context come on top.",
    "params %, ratio: the parameters and the total over those of end to end without checkpointing.",
)


def plan_memory(
    model_or_config: BlockedPreTrainedModel | DiffusionBlocksConfig | str | os.PathLike | Mapping[str, Any],
    num_blocks: int | None = None,
    *,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
    mixed_precision: str = "no",
    use_ema: bool = True,
    optim: str = "adamw_torch_fused",
    optim_args: Mapping[str, Any] | None = None,
    gradient_release: bool = False,
    alternatives: bool = True,
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
        optim: the optimizer, as in the training arguments.
        optim_args: its further settings, as there; those of other methods keep their defaults.
        gradient_release: update each parameter as its gradient arrives, and free that at once.
        alternatives: add what other methods hold (``memory_alternatives``).
        objective: as in ``DiffusionBlocksTrainer``; without a teacher, whose weights would come on top.
        device: where training runs (its kernels decide what is saved); by default the GPU if there is one.
        **batch_settings: for the family's ``dummy_batch``.

    Returns:
        A ``MemoryPlan``; every parameter is trained. End to end is plain training of all layers; of a language
        model, on next tokens, whatever the readout of the blocks is.

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
    _check_settings(batch_size, dtype, mixed_precision, optim)
    check_optimizer(optim, optim_args or {})
    given = model_or_config.config if isinstance(model_or_config, BlockedPreTrainedModel) else model_or_config
    if isinstance(given, (str, os.PathLike, Mapping)):
        given = blocked_config_of(given, num_blocks)
    if not isinstance(given, DiffusionBlocksConfig):
        raise ValueError(
            f"plan_memory takes a blocked model, its config, a directory or Hub id, or a base's config as a dict, not "
            f"a {type(given).__name__}."
        )
    make = type(model_or_config) if isinstance(model_or_config, BlockedPreTrainedModel) else AutoModel.from_config
    target = _device(device)
    config = given if num_blocks in (None, given.num_blocks) else recut(given, num_blocks=num_blocks)
    plain = end_to_end_config(config)
    step = FakeStep(make, batch_size, dtype, mixed_precision, objective, target, batch_settings)
    blocked, end_to_end = step.build(config), step.build(plain)
    state: dict[str, Any] = {
        "use_ema": use_ema,
        "optim": optim,
        "optim_args": optim_args or {},
        "release": gradient_release,
    }
    rows = _predicted_rows(step, end_to_end, blocked, state)
    others = None
    if alternatives:
        largest = max((row for row in rows if row.method == BLOCKED), key=lambda row: row.total).block or 0
        name = f"one of {config.num_blocks} blocks" if config.num_blocks > 1 else "the only block"
        others = compare(step.job(end_to_end, 0, WHOLE, True), step.job(blocked, largest, name, False))
    settings = {
        "model": config.model_type,
        "num_layers": config.num_layers,
        "num_blocks": config.num_blocks,
        "batch_size": batch_size,
        "dtype": str(dtype).removeprefix("torch."),
        "mixed_precision": mixed_precision,
        "use_ema": use_ema,
        "optim": optim,
        **({"optim_args": dict(optim_args)} if optim_args else {}),
        "gradient_release": gradient_release,
        "device": target.type,
        **batch_settings,
    }
    return MemoryPlan(tuple(rows), settings, others)


def _check_settings(batch_size: Any, dtype: Any, mixed_precision: str, optim: str) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number of at least 1.")
    if mixed_precision not in MIXED_PRECISIONS:
        raise ValueError(unknown_name("mixed_precision", mixed_precision, MIXED_PRECISIONS))
    if optim not in OPTIMIZERS:
        raise ValueError(unknown_name("optim", optim, OPTIMIZERS))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be a floating point torch.dtype, such as torch.float32.")


def _predicted_rows(
    step: FakeStep, end_to_end: BlockedPreTrainedModel, blocked: BlockedPreTrainedModel, state: dict[str, Any]
) -> list[MemoryRow]:
    """What each way of training holds, with and without checkpointing; ratios are to plain end-to-end training."""
    blocks = range(blocked.config.num_blocks)
    ways = [(END_TO_END, end_to_end, [0], None), *((BLOCKED, blocked, [b], b) for b in blocks)]
    ways.append((ALL_BLOCKS, blocked, list(blocks), None))
    rows: list[MemoryRow] = []
    for method in (END_TO_END, BLOCKED, ALL_BLOCKS):
        for suffix in ("", CHECKPOINTING):
            for _, model, held, block in (way for way in ways if way[0] == method):
                use = step.predict(model, held, checkpointing=bool(suffix), **state)
                rows.append(
                    MemoryRow(
                        **asdict(use),
                        method=method + suffix,
                        block=block,
                        layers=sum(len(model.partition.layers(b)) for b in held),
                        parameters=sum(t.numel() for t in resident(model, held) if isinstance(t, nn.Parameter)),
                        ratio=use.total / rows[0].total if rows else 1.0,
                    )
                )
    return rows


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = str(device).partition(":")[0]
    backend: Any = getattr(torch, kind, None)
    if kind != "cpu" and not (hasattr(backend, "is_available") and backend.is_available()):
        raise ValueError(
            f"device={str(device)!r} is not available here, and its kernels decide what a step saves. Plan on a "
            "machine that has it, or with device='cpu' for CPU kernels."
        )
    return torch.device(device)


def end_to_end_config(config: DiffusionBlocksConfig) -> DiffusionBlocksConfig:
    """The config of the same layers in one block; of a language model or classifier, an ordinary one."""
    plain: dict[str, Any] = {"num_blocks": 1, "partition": "equal_probability"}
    if isinstance(config, CategoricalConfig):
        plain |= PLAIN
    return recut(config, **plain)


__all__ = ["MemoryPlan", "MemoryRow", "MemoryUse", "measure_memory", "measure_step", "plan_memory"]
