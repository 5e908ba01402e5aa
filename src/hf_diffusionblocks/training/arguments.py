"""Settings of a training run, under the names of transformers' `TrainingArguments` wherever they mean the same."""

import math
from dataclasses import asdict, dataclass, field, fields
from functools import wraps
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import SchedulerType, get_scheduler

from ..config_checks import settle
from ..suggest import unknown_name

ORDERS = ("simultaneous", "sequential")
LOWER_OUTPUTS = ("recompute", "disk")
TRAIN_SHARED = ("first", "all", "none")
RESIDENCIES = ("device", "host", "disk")
GRADIENTS = ("local", "exact")
PARALLELISMS = ("blocks", "data")
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "adafactor")
BLOCK_ORDERS = ("random", "round_robin", "sequential")
MIXED_PRECISIONS = ("no", "bf16")
# Those of transformers that depend on the number of updates alone, not on a measured loss.
LR_SCHEDULES = tuple(s.value for s in SchedulerType if s.value not in ("reduce_lr_on_plateau", "greedy"))


@dataclass
class DiffusionBlocksTrainingArguments:
    """Settings of ``DiffusionBlocksTrainer``.

    Budgets, warm-up and schedules count *per block*: each block gets as many updates as the end-to-end model would
    (B blocks x K updates x L / B layers is the compute of K end-to-end updates).

    Raises:
        ValueError: naming the value, what is allowed and how to mend it.
    """

    output_dir: str = field(default="runs/diffusionblocks", metadata={"help": "where checkpoints and logs go"})
    max_steps: int = field(default=-1, metadata={"help": "updates of each block; -1: from num_train_epochs"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes of each block over the data"})
    blocks: list[int] | None = field(default=None, metadata={"help": "train these blocks only; default all resident"})
    order: str | None = field(
        default=None,
        metadata={
            "help": f"{' or '.join(ORDERS)}: train the blocks side by side, or one after the other, each on what the "
            "trained blocks below it give; default: sequential for a cascade, else simultaneous"
        },
    )
    hand_over: bool = field(
        default=False, metadata={"help": "sequential: a block's auxiliary layers become the next block's first layers"}
    )
    lower_outputs: str = field(
        default="recompute",
        metadata={"help": f"cascade: what lower blocks give is one of {', '.join(LOWER_OUTPUTS)} (computed once)"},
    )
    train_shared: str = field(
        default="first",
        metadata={"help": f"what blocks share (token embeddings) trains with: {', '.join(TRAIN_SHARED)} block(s)"},
    )
    block_order: str = field(default="random", metadata={"help": f"which block steps next: {', '.join(BLOCK_ORDERS)}"})
    steps_per_visit: int = field(default=1, metadata={"help": "consecutive updates of a block per visit"})
    residency: str = field(
        default="device",
        metadata={
            "help": f"where blocks rest while others train: {', '.join(RESIDENCIES)}; the last two keep one there"
        },
    )
    residency_dir: str | None = field(
        default=None, metadata={"help": "folder of residency=disk for scratch files; default: in output_dir"}
    )
    gradient: str | None = field(
        default=None,
        metadata={
            "help": f"{' or '.join(GRADIENTS)}: of the block's own loss; or of the last block's, through the blocks "
            "above, which run again one at a time (clean cascades; an update costs about an end-to-end one); default: "
            "exact for the blocks of a trained base without auxiliary layers, if all are loaded, else local"
        },
    )
    parallelism: str | None = field(
        default=None,
        metadata={
            "help": f"several processes: {' or '.join(PARALLELISMS)}: each trains blocks of its own, or all train the "
            "same block, each on its part of the samples; default: blocks where they are independent, else data"
        },
    )
    per_device_train_batch_size: int = field(default=128, metadata={"help": "samples per forward pass"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "forward passes per update"})
    optim: str = field(
        default="adamw_torch_fused",
        metadata={
            "help": f"one of {', '.join(OPTIMIZERS)}: torch's AdamW (fused, foreach), bitsandbytes' 8-bit AdamW, "
            "torch's Adafactor (give it a learning rate of about 1e-2: it is relative to a parameter's size)"
        },
    )
    optim_args: dict = field(default_factory=dict, metadata={"help": "further keyword arguments of the optimizer"})
    gradient_release: bool = field(
        default=False,
        metadata={
            "help": "update each parameter inside the backward pass, as its gradient arrives, and free that at once; "
            "needs max_grad_norm=0 and gradient_accumulation_steps=1"
        },
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "a transformers schedule, per block"}
    )
    lr_scheduler_kwargs: dict = field(default_factory=dict, metadata={"help": "further settings of the schedule"})
    warmup_steps: int = field(default=0, metadata={"help": "warm-up updates of each block"})
    weight_decay: float = field(default=0.0, metadata={"help": "of weight matrices; biases and norms have none"})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW beta1"})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW beta2"})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW epsilon"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "clip a block's gradient norm; 0: no clipping"})
    use_ema: bool = field(default=True, metadata={"help": "keep a moving average of the weights; it is what is saved"})
    ema_max_decay: float = field(default=0.9999, metadata={"help": "largest decay of the average"})
    ema_inv_gamma: float = field(default=8.0, metadata={"help": "decay = 1 - (1 + update / inv_gamma)^-power"})
    ema_power: float = field(default=1.0, metadata={"help": "1: the average spans a fixed share of the run so far"})
    mixed_precision: str = field(default="no", metadata={"help": f"autocast: {', '.join(MIXED_PRECISIONS)}"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute activations inside a block"})
    torch_compile: bool = field(default=False, metadata={"help": "compile each block"})
    hidden_weight: float = field(
        default=0.0, metadata={"help": "language models: pull towards the base's hidden state"}
    )
    distillation_weight: float = field(default=0.0, metadata={"help": "share of the loss against a frozen base"})
    horizontal_flip: bool = field(default=False, metadata={"help": "mirror images at random"})
    rand_augment: bool = field(
        default=False,
        metadata={"help": "classifiers: change images by RandAugment, 2 operations of strength 9 of 30"},
    )
    seed: int = field(default=0, metadata={"help": "of everything random"})
    dataloader_num_workers: int = field(default=0, metadata={"help": "worker processes per block's data stream"})
    logging_steps: int = field(default=50, metadata={"help": "log every so many iterations (updates of any block)"})
    save_steps: int = field(default=500, metadata={"help": "checkpoint every so many iterations; 0: only at the end"})
    save_total_limit: int | None = field(default=2, metadata={"help": "keep the newest checkpoints only"})
    eval_steps: int = field(default=0, metadata={"help": "held-out loss every so many iterations; 0: at the end"})
    eval_samples: int | None = field(default=1024, metadata={"help": "held-out samples to score during the run"})
    report_to: list[str] = field(default_factory=list, metadata={"help": "Accelerate trackers, such as tensorboard"})
    disable_tqdm: bool = field(default=False, metadata={"help": "no progress bar"})
    cpu: bool = field(default=False, metadata={"help": "use the CPU even where there is an accelerator"})

    def __post_init__(self) -> None:
        if self.mixed_precision in (False, None):  # type: ignore[comparison-overlap]  # YAML reads no as False
            self.mixed_precision = "no"
        if isinstance(self.report_to, str):
            self.report_to = [] if self.report_to in ("none", "") else [self.report_to]
        for name, allowed in (
            ("train_shared", TRAIN_SHARED),
            ("lower_outputs", LOWER_OUTPUTS),
            ("residency", RESIDENCIES),
        ):
            if isinstance(getattr(self, name), bool):  # YAML reads no and yes so
                raise ValueError(unknown_name(name, getattr(self, name), allowed))
        settle(self)
        if not str(self.output_dir):
            raise ValueError("output_dir is empty: give a directory; '.' is the current one.")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must lie between -2^63 and 2^63 - 1.")
        for name, low in (
            ("steps_per_visit", 1),
            ("per_device_train_batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("logging_steps", 1),
            ("warmup_steps", 0),
            ("save_steps", 0),
            ("eval_steps", 0),
            ("dataloader_num_workers", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {low}.")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps} must be at least 1 update per block, or -1 for epochs.")
        if self.max_steps == -1 and not (math.isfinite(self.num_train_epochs) and self.num_train_epochs > 0):
            raise ValueError(f"num_train_epochs={self.num_train_epochs} must be positive.")
        for name in ("learning_rate", "adam_epsilon", "ema_inv_gamma", "ema_power"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value!r} must be a positive number.")
        for name in ("weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must not be negative.")
        for name in ("adam_beta1", "adam_beta2", "ema_max_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must lie in [0, 1).")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ValueError(f"save_total_limit={self.save_total_limit} must be at least 1, or None to keep all.")
        self._check_names()
        self._check_release()
        try:
            parameter = torch.nn.Parameter(torch.zeros(1, device="cpu"))
            self.make_schedule(torch.optim.SGD([parameter], lr=self.learning_rate), max(self.warmup_steps + 1, 2))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"lr_scheduler_type={self.lr_scheduler_type!r} cannot be made with "
                f"lr_scheduler_kwargs={self.lr_scheduler_kwargs}: {error}. Give what transformers' schedule asks for."
            ) from error

    def _check_names(self) -> None:
        for name, allowed in (
            ("order", (None, *ORDERS)),
            ("lower_outputs", LOWER_OUTPUTS),
            ("train_shared", TRAIN_SHARED),
            ("block_order", BLOCK_ORDERS),
            ("residency", RESIDENCIES),
            ("gradient", (None, *GRADIENTS)),
            ("parallelism", (None, *PARALLELISMS)),
            ("optim", OPTIMIZERS),
            ("mixed_precision", MIXED_PRECISIONS),
            ("lr_scheduler_type", LR_SCHEDULES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(unknown_name(name, getattr(self, name), allowed))
        if not isinstance(self.optim_args, dict):
            raise ValueError(f"optim_args={self.optim_args!r} must be a dict, such as {{'amsgrad': True}}.")

    def _check_release(self) -> None:
        if self.gradient_release and self.max_grad_norm > 0:
            raise ValueError(
                f"gradient_release=True with max_grad_norm={self.max_grad_norm}: parameters are updated before the "
                "norm of the whole gradient is known. Set max_grad_norm=0, or gradient_release=False."
            )
        if self.gradient_release and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_release=True with gradient_accumulation_steps={self.gradient_accumulation_steps}: a "
                "freed gradient cannot be added to. Set gradient_accumulation_steps=1, or gradient_release=False."
            )

    def make_schedule(self, optimizer: torch.optim.Optimizer, num_updates: int) -> LRScheduler:
        """transformers' learning-rate schedule over a block's updates."""
        return get_scheduler(
            self.lr_scheduler_type,
            optimizer,
            num_warmup_steps=self.warmup_steps,
            num_training_steps=num_updates,
            scheduler_specific_kwargs=self.lr_scheduler_kwargs,
        )

    def updates_per_block(self, num_samples: int, num_processes: int = 1) -> int:
        """K, the number of updates that each block gets on a data set of so many samples, by so many processes."""
        if self.max_steps > 0:
            return self.max_steps
        per_update = self.per_device_train_batch_size * self.gradient_accumulation_steps * num_processes
        return max(1, math.ceil(self.num_train_epochs * num_samples / per_update))

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """The settings that a run must keep when it goes on from a checkpoint."""
        kept = {name: value for name, value in self.to_dict().items() if name not in RESUMABLE_CHANGES}
        if not kept["rand_augment"]:  # older checkpoints do not know it
            del kept["rand_augment"]
        return kept

    def objective_settings(self) -> dict[str, Any]:
        """The settings that are the objective's."""
        names = ("distillation_weight", "hidden_weight", "horizontal_flip", "rand_augment")
        return {name: getattr(self, name) for name in names}


def _name_unknown_settings(cls: type) -> type:
    """Turn the ``TypeError`` of a misspelt keyword into a ``ValueError`` that names the nearest setting."""
    known = [entry.name for entry in fields(cls)]
    make: Any = cls.__init__  # type: ignore[misc]  # of a class, not of an instance

    @wraps(make)
    def __init__(self: Any, *args: Any, **settings: Any) -> None:  # noqa: N807
        for name in settings:
            if name not in known:
                raise ValueError(unknown_name("training argument", name, known))
        make(self, *args, **settings)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


_name_unknown_settings(DiffusionBlocksTrainingArguments)

# Settings that may differ when a run is resumed: they change what is written and where, never the weights.
RESUMABLE_CHANGES = frozenset(
    {
        "output_dir",
        "gradient_release",
        "residency",
        "residency_dir",
        "dataloader_num_workers",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "eval_steps",
        "eval_samples",
        "report_to",
        "disable_tqdm",
    }
)
