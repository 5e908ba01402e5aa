"""The trainer of one block. It knows nothing of other blocks: stepping several is a loop over such trainers."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from ..modeling import BlockedPreTrainedModel
from ..objectives import ObjectiveResult
from .arguments import DiffusionBlocksTrainingArguments
from .data_stream import batches, derive_seed, reader_of
from .optimizers import GradientRelease, make_optimizer
from .parallel import Group, as_sharded, clip_gradients, total_norm, whole

Objective = Callable[[BlockedPreTrainedModel, int, dict[str, Tensor], torch.Generator], ObjectiveResult]


class BadSampleError(ValueError):
    """A batch holds samples that cannot be learned from; the weights are those before the update."""


@contextlib.contextmanager
def _frozen(parameters: list[Tensor]) -> Iterator[None]:
    """What other blocks train collects no gradient in this one's step: they would add it to their own."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class BlockTrainer:
    """One block's optimizer, schedule, moving average and random stream.

    Everything random in part p (a forward pass, of one process or of several) of update u of block b follows from
    (seed, b, u, p), so a run can stop and go on anywhere, and a job that trains block b alone draws what one process
    that trains all blocks draws.
    """

    def __init__(
        self,
        model: BlockedPreTrainedModel,
        block: int,
        objective: Objective,
        dataset: Any,
        args: DiffusionBlocksTrainingArguments,
        accelerator: Accelerator,
        num_updates: int,
        shared: bool = False,
        group: Group | None = None,
    ):
        self.group = group or Group([block])
        self.model, self.block, self.objective = model, block, objective
        self.dataset, self.args, self.accelerator = dataset, args, accelerator
        named = [(n, p) for n, p in model.block_parameters(block) if p.requires_grad]
        if shared and named:
            named += [(n, p) for n, p in model.shared_parameters() if p.requires_grad]
        if not named:
            raise ValueError(f"block {block} has no parameter to train: all are frozen.")
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        own = set(self.names)
        self._foreign = [p for n, p in model.shared_parameters() if n not in own and p.requires_grad]
        self._finish_gradients = self.group.average_gradients([] if args.gradient_release else self.parameters)
        self.optimizer = make_optimizer(named, args)
        # Not prepared by Accelerate, which would step it once per process (huggingface/accelerate#2773).
        self.lr_scheduler = args.make_schedule(self.optimizer, num_updates)
        self.ema: Any = self._make_ema() if args.use_ema else None
        self.updates = 0
        self._batches: Iterator[dict[str, Tensor]] | None = None

    def restart_average(self) -> None:
        """Begin the moving average anew, after the weights were set from outside."""
        if self.ema is not None:
            self.ema = self._make_ema()

    def _make_ema(self) -> EMAModel:
        return EMAModel(
            self.parameters,
            decay=self.args.ema_max_decay,
            use_ema_warmup=True,
            inv_gamma=self.args.ema_inv_gamma,
            power=self.args.ema_power,
            foreach=not self.group.sharded,
        )

    def _describe(self, batch: dict[str, Tensor], wrong: Tensor, part: int) -> str:
        """What is wrong with which rows of the data set; ``part`` of the update's forward passes met them."""
        args, (dataset, order) = self.args, reader_of(self.dataset, self.args.seed, self.block)
        size = args.per_device_train_batch_size
        start = (self.updates * self._parts + self._part(part)) * size
        rows = [order.indices(start, size)[i] for i in wrong.nonzero().flatten().tolist()]
        named = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        values = [n for n, v in batch.items() if v.is_floating_point() and not bool(torch.isfinite(v[wrong]).all())]
        what = f"have non-finite {' and '.join(values)}" if values else "have labels out of range"
        return (
            f"{len(rows)} of {len(wrong)} samples in a batch {what}: rows {named} of the training data ({len(dataset)} "
            "rows). Correct or remove them."
        )

    def _next_batch(self, part: int) -> dict[str, Tensor]:
        args = self.args
        if self._batches is None:
            dataset, order = reader_of(self.dataset, args.seed, self.block)
            size = args.per_device_train_batch_size
            self._batches = batches(
                dataset,
                order,
                (self.updates * self._parts + self._part(0)) * size,
                size,
                args.dataloader_num_workers,
                pin_memory=self.accelerator.device.type == "cuda",
                stride=self.group.size * size,
            )
        batch = next(self._batches)
        wrong = self.model.wrong_rows(batch)
        bad = bool(wrong.any())
        if self.group.any(bad)[0]:
            self.optimizer.zero_grad(set_to_none=True)
            raise BadSampleError(
                self._describe(batch, wrong, part)
                if bad
                else "another process of the group met samples that cannot be learned from, and names them."
            )
        return {k: v.to(self.accelerator.device, non_blocking=True) for k, v in batch.items()}

    def step(self) -> dict[str, Tensor | float | int]:
        """One update of the block. Returns tensors for the log, not yet synchronised with the device."""
        args, accelerator, group = self.args, self.accelerator, self.group
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        sigmas, count = [], args.gradient_accumulation_steps
        total: Any = None
        parts: dict[str, Any] = {}
        release: Any = contextlib.nullcontext()
        if args.gradient_release:
            release = GradientRelease(self.optimizer, group.average if group.size > 1 else None)
        with torch.random.fork_rng(devices=devices), _frozen(self._foreign), release:
            for part in range(count):
                place = self._part(part)
                seed = derive_seed(args.seed, "update", self.block, self.updates, *([place] if place else []))
                generator = torch.Generator().manual_seed(seed)
                torch.manual_seed(seed)  # dropout inside the layers
                batch = self._next_batch(part)
                if group.size > 1:
                    group.set_accumulating(self.model, self.block, part < count - 1)
                with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                    result = self.objective(self.model, self.block, batch, generator)
                accelerator.backward(result.loss / count)
                share = result.loss.detach() / count
                total = share if total is None else total + share
                sigmas.append(result.sigma)
                for name, value in result.parts.items():
                    parts[name] = parts.get(name, 0) + value / count
        self._finish_gradients()
        group.reshard(self.model, self.block)
        if group.size > 1:
            total = group.mean_(total.clone())
            parts = {name: group.mean_(torch.as_tensor(value).clone()) for name, value in sorted(parts.items())}
        if args.gradient_release:
            grad_norm = release.total_norm(self.parameters)
        elif args.max_grad_norm > 0:
            grad_norm = clip_gradients(self.parameters, args.max_grad_norm)
        else:
            grad_norm = total_norm([p.grad for p in self.parameters if p.grad is not None])
        lr = self.lr_scheduler.get_last_lr()[0]
        if not args.gradient_release:
            self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.updates += 1
        return {
            "block": self.block,
            "update": self.updates,
            "loss": total,
            "grad_norm": grad_norm,
            "learning_rate": lr,
            "sigma": torch.cat(sigmas),
            **parts,
        }

    @property
    def _parts(self) -> int:
        """Forward passes of an update, of all processes that train the block."""
        return self.args.gradient_accumulation_steps * self.group.size

    def _part(self, part: int) -> int:
        """The place of this process's forward pass among those of an update."""
        return part * self.group.size + self.group.rank

    # -- state ---------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Any]:
        """The optimizer's state, as ``torch.optim`` gives it; what is sharded as whole tensors."""
        return whole(self.optimizer.state_dict())

    def scalars(self) -> dict[str, Any]:
        """Counters and the schedule's state, JSON-ready."""
        schedule = self.lr_scheduler.state_dict()
        return {
            "updates": self.updates,
            "lr_scheduler": {k: v for k, v in schedule.items() if isinstance(v, (int, float, list, bool)) or v is None},
            "ema_step": self.ema.optimization_step if self.ema is not None else None,
        }

    def ema_tensors(self) -> dict[str, Tensor]:
        """The averaged weights under their names in the model's state dict; empty without an average."""
        return whole(dict(zip(self.names, self.ema.shadow_params, strict=True))) if self.ema is not None else {}

    def load(self, optimizer: dict[str, Any], scalars: dict[str, Any], ema: dict[str, Tensor]) -> None:
        """Take over a saved state; the weights are loaded by the caller."""
        if self.group.sharded:
            ordered = [p for values in self.optimizer.param_groups for p in values["params"]]
            for i, state in optimizer["state"].items():
                optimizer["state"][i] = {k: as_sharded(v, ordered[i]) for k, v in state.items()}
        self.optimizer.load_state_dict(optimizer)
        self.lr_scheduler.load_state_dict(self.lr_scheduler.state_dict() | scalars["lr_scheduler"])
        self.updates = scalars["updates"]
        self._batches = None
        if self.ema is not None:
            self.ema.optimization_step = scalars["ema_step"]
            for name, shadow in zip(self.names, self.ema.shadow_params, strict=True):
                shadow.copy_(as_sharded(ema[name], shadow))
