"""Counts what a training step holds, in bytes, by kind.

Kinds, each counted over distinct storages:

- weights: parameters and buffers of the resident blocks and of what they share;
- gradients: of the trained parameters, as the optimizer finds them; with gradient release the most that exist at a
  time, those included that wait inside autograd for another use of their parameter (a tied table's);
- moments: the optimizer's state after an update (AdamW: two tensors and a four-byte counter per parameter);
- EMA: the moving average of the trained parameters;
- activations: what autograd keeps for the backward pass, weights aside, at its peak during the step. With checkpointing
  that is the layers' inputs and one layer's recomputed tensors; under autocast it includes the cast weights.

Not counted: a kernel's workspace, gradients that flow between layers, the allocator's rounding, the device's context.
Plans are for eager execution: torch.compile fuses layers and chooses for itself what to save and what to recompute.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from .modeling import BlockedPreTrainedModel, enable_checkpointing
from .objectives import ObjectiveResult, default_objective
from .training.arguments import DiffusionBlocksTrainingArguments
from .training.block_trainer import BlockTrainer, Objective
from .training.optimizers import plain_tensors
from .training.trainer import DiffusionBlocksTrainer

KINDS = ("weights", "gradients", "moments", "ema", "activations")


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that a training step holds, by kind; the module's docstring defines the kinds."""

    weights: int
    gradients: int
    moments: int
    ema: int
    activations: int

    @property
    def total(self) -> int:
        """All kinds together, in bytes."""
        return sum(getattr(self, kind) for kind in KINDS)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the total, as plain values."""
        return asdict(self) | {"total": self.total}


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of some tensors."""
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def state_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


class LiveStorages:
    """Counts the bytes of the storages that it was shown, each once and in full, until they are freed.

    Attributes:
        live: bytes that are held now.
        peak: the most that was held at a time.
        history: ``live`` after each new storage.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.history: list[int] = []
        self._storages: dict[int, weakref.ref] = {}

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, if it does not yet."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:

            def freed(_: weakref.ref) -> None:
                del self._storages[key]
                self.live -= size

            # The Python object of a storage lives as long as the storage.
            self._storages[key] = weakref.ref(storage, freed)
            self.live += size
            self.peak = max(self.peak, self.live)
            self.history.append(self.live)


class SavedTensors(LiveStorages):
    """Counts the bytes that autograd keeps for the backward pass while it is active; works on real and fake tensors.

    A storage counts from when a first tensor on it is saved, whatever part of it the tensor shows. Checkpointed layers
    (non-reentrant) count with what their recomputation saves.

    Args:
        modules: their parameters and buffers do not count.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self._modules = modules
        self._known = {tensor.untyped_storage()._cdata for module in modules for tensor in state_of(module)}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "SavedTensors":
        self._stack.enter_context(saved_tensors_hooks(self._pack, lambda tensor: tensor))
        for module in {m for top in self._modules for m in _checkpointed(top)}:
            function = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = functools.partial(function, context_fn=self._checkpoint_contexts)
            self._stack.callback(setattr, module, "_gradient_checkpointing_func", function)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in self._known:
            self.add(tensor)
        return tensor

    def _checkpoint_contexts(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        return contextlib.nullcontext(), self._watch_recomputation()

    @contextlib.contextmanager
    def _watch_recomputation(self) -> Iterator[None]:
        # The recomputation has hooks of its own, and only the innermost ones are called: pass on to them.
        pack, unpack = torch._C._autograd._top_saved_tensors_default_hooks(True)
        with saved_tensors_hooks(lambda tensor: pack(self._pack(tensor)), unpack):
            yield


def watch_gradients(loss: Tensor, parameters: Iterable[Tensor], counts: LiveStorages) -> None:
    """Have the backward pass from a loss show the parameters' gradients, complete or not, to a counter."""
    ends = {get_gradient_edge(p).node for p in parameters if p.requires_grad}
    nodes, found = [loss.grad_fn], {loss.grad_fn}
    while nodes:
        node = nodes.pop()
        places = [i for i, (following, _) in enumerate(node.next_functions) if following in ends]
        if places:
            node.register_hook(functools.partial(_show, counts, places))
        fresh = {following for following, _ in node.next_functions if following is not None} - found - ends
        found |= fresh
        nodes += fresh


def _show(counts: LiveStorages, places: list[int], gradients: tuple[Tensor | None, ...], _: Any) -> None:
    for place in places:
        if gradients[place] is not None:
            counts.add(gradients[place])


def measure_step(trainer: BlockTrainer | DiffusionBlocksTrainer) -> MemoryUse:
    """Count what a real update holds. The update is an ordinary one: weights, moments and counters move on.

    Args:
        trainer: a block's trainer, for one update of its block; or a ``DiffusionBlocksTrainer``, for one update
            of each of its blocks: all their moments and averages, the largest gradients and activations of any.

    Returns:
        Bytes by kind. Weights are those of the whole resident model, and of the objective's teacher if it has one.
    """
    trainers = list(trainer.trainers.values()) if isinstance(trainer, DiffusionBlocksTrainer) else [trainer]
    model = trainer.model
    gradients, activations = LiveStorages(), 0

    def at_update(*_: Any) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                gradients.add(parameter.grad)

    modules = [model, *(v for v in getattr(trainer.objective, "__dict__", {}).values() if isinstance(v, nn.Module))]
    for one in trainers:
        hook, objective = one.optimizer.register_step_pre_hook(at_update), one.objective
        if one.args.gradient_release:
            one.objective = functools.partial(_watched, objective, one.parameters, gradients)
        try:
            with SavedTensors(modules) as saved:
                one.step()
        finally:
            hook.remove()
            one.objective = objective
        activations = max(activations, saved.peak)
    states = (value for one in trainers for state in one.optimizer.state.values() for value in state.values())
    return MemoryUse(
        weights=held_bytes(tensor for module in modules for tensor in state_of(module)),
        gradients=gradients.peak,
        moments=held_bytes(tensor for value in states for tensor in plain_tensors(value)),
        ema=held_bytes(tensor for one in trainers for tensor in one.ema_tensors().values()),
        activations=activations,
    )


def _watched(objective: Objective, parameters: list[Tensor], counts: LiveStorages, *args: Any) -> ObjectiveResult:
    result = objective(*args)
    watch_gradients(result.loss, parameters, counts)
    return result


class _Repeat:
    """A data set of one batch, over and over."""

    def __init__(self, batch: dict[str, Tensor]):
        self.batch = {name: value.cpu() for name, value in batch.items()}

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        return {name: value[rows] for name, value in self.batch.items()}


class Precision:
    """The part of an Accelerator that a block's trainer uses, without its process-wide state."""

    clip_grad_norm_ = staticmethod(nn.utils.clip_grad_norm_)

    def __init__(self, device: torch.device, mixed_precision: str):
        self.device, self.mixed_precision = device, mixed_precision

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def measure_memory(
    model: BlockedPreTrainedModel,
    block: int,
    batch: dict[str, Tensor],
    *,
    objective: Objective | None = None,
    mixed_precision: str = "no",
    gradient_checkpointing: bool = False,
    use_ema: bool = True,
    optim: str = "adamw_torch_fused",
    optim_args: Mapping[str, Any] | None = None,
    gradient_release: bool = False,
) -> MemoryUse:
    """Count what an update of a block holds, on a real batch. The weights stay as they are: the learning rate is 0.

    Args:
        model: a blocked model. All its resident blocks' weights count: load one with ``blocks=[block]``.
        block: which block.
        batch: one batch for the objective, such as ``model.dummy_batch(8)``.
        objective: as in ``DiffusionBlocksTrainer``.
        mixed_precision: ``no`` or ``bf16``, for autocast.
        gradient_checkpointing: recompute activations layer by layer.
        use_ema: keep a moving average of the weights.
        optim: the optimizer, as in the training arguments.
        optim_args: its further settings, as there.
        gradient_release: update each parameter as its gradient arrives.

    Raises:
        ValueError: for a block that is not loaded, an empty batch, or an unknown setting.
    """
    if not batch or len(next(iter(batch.values()))) == 0:
        raise ValueError("the batch is empty: give at least one sample, such as model.dummy_batch(1).")
    data = _Repeat(batch)
    args = DiffusionBlocksTrainingArguments(
        per_device_train_batch_size=len(data),
        warmup_steps=1,  # the first update of a warm-up has learning rate 0
        mixed_precision=mixed_precision,
        use_ema=use_ema,
        optim=optim,
        optim_args=dict(optim_args or {}),
        gradient_release=gradient_release,
        max_grad_norm=0.0 if gradient_release else 1.0,
    )
    training, was_checkpointing = model.training, bool(_checkpointed(model))
    set_mode(model, gradient_checkpointing)
    accelerator = Precision(model.device, args.mixed_precision)
    try:
        objective = objective or default_objective(model.config)
        shared = block == 0 and args.train_shared == "first"
        one = BlockTrainer(model, block, objective, data, args, accelerator, num_updates=1, shared=shared)
        return measure_step(one)
    finally:
        set_mode(model, was_checkpointing)
        model.train(training)


def set_mode(model: BlockedPreTrainedModel, checkpointing: bool, **kwargs: Any) -> None:
    """Training mode, with non-reentrant checkpointing or without."""
    model.train()
    if checkpointing:
        enable_checkpointing(model, **kwargs)
    else:
        for module in _checkpointed(model):
            module.gradient_checkpointing = False


def _checkpointed(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
