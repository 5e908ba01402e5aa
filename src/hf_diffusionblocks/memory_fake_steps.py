"""A training step on fake tensors, which have shapes but no memory: what ``memory`` predicts from.

The real modules and the real objective run, and are counted as ``memory_counting`` counts a real step. Of long
blocks only short ones are run: a layer more costs the same each time. So does a sample more, where the loss of a large
vocabulary is computed in more than a few chunks.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode

from . import losses
from .configuration import DiffusionBlocksConfig
from .memory_alternatives import Job, layers_of, matrices_of
from .memory_counting import LiveStorages, MemoryUse, Precision, SavedTensors, held_bytes, set_mode, watch_gradients
from .modeling import BlockedPreTrainedModel
from .objectives import default_objective
from .training.block_trainer import Objective
from .training.optimizers import state_bytes

# Longer blocks are extrapolated from blocks of so many layers and one fewer.
_PROBE_LAYERS = 2


def recut(config: DiffusionBlocksConfig, **changes: Any) -> DiffusionBlocksConfig:
    """The config with other blocks: edges and layers per block follow from the changes."""
    return type(config).from_dict(config.to_dict() | {"edges": None, "layers_per_block": None} | changes)


def few_chunks(model: BlockedPreTrainedModel, batch_size: int, chunks: int, batch_settings: dict[str, Any]) -> int:
    """The smallest batch whose loss is computed in so many full chunks (``losses``), or ``batch_size`` itself if
    that is smaller or its loss is not computed in chunks."""
    batch = model.dummy_batch(1, **batch_settings)
    if "input_ids" not in batch:
        return batch_size
    size = max(1, losses.CHUNK_ELEMENTS // model.config.vocab_size)
    tokens = batch["input_ids"].shape[1]
    return min(batch_size, math.ceil(chunks * size / tokens)) if batch_size * tokens > chunks * size else batch_size


def resident(model: BlockedPreTrainedModel, held: Sequence[int]) -> list[Tensor]:
    """Parameters and buffers of a job that holds some blocks: theirs and those of no block."""
    prefixes = tuple(f"blocks.{b}." for b in held)
    named = [*model.named_parameters(), *model.named_buffers()]
    return [tensor for name, tensor in named if not name.startswith("blocks.") or name.startswith(prefixes)]


class FakeStep:
    """A training step on fake tensors."""

    def __init__(
        self,
        make: Callable[..., BlockedPreTrainedModel],
        batch_size: int,
        dtype: torch.dtype,
        mixed_precision: str,
        objective: Objective | None,
        device: torch.device,
        batch_settings: dict[str, Any],
    ):
        self.make, self.batch_size, self.dtype, self.batch_settings = make, batch_size, dtype, batch_settings
        self.objective, self.device = objective, device
        self.precision = Precision(device, mixed_precision)
        self._known: dict[tuple, _Counts] = {}
        self._probes: dict[str, BlockedPreTrainedModel] = {}

    def objective_of(self, model: BlockedPreTrainedModel) -> Objective:
        """The objective that was given, or a model's own: end to end may have another than the blocks."""
        return self.objective or default_objective(model.config)

    def build(self, config: DiffusionBlocksConfig, blocks: Sequence[int] | None = None) -> BlockedPreTrainedModel:
        """A model without memory, on the meta device."""
        with torch.device("meta"):
            return self.make(config, blocks=blocks).to(self.dtype)

    def predict(
        self,
        model: BlockedPreTrainedModel,
        held: Sequence[int],
        *,
        checkpointing: bool,
        use_ema: bool,
        optim: str,
        optim_args: Mapping[str, Any],
        release: bool,
    ) -> MemoryUse:
        """Bytes of a job that holds some blocks and steps them in turn."""
        trained = {b: _trained(model, b) for b in held}
        counts = {b: self.counts(model, b) for b in held}
        parameters = [p for own in trained.values() for p in own]
        return MemoryUse(
            weights=held_bytes(resident(model, held)),
            gradients=max(counts[b].gradient if release else held_bytes(trained[b]) for b in held),
            moments=sum(state_bytes(optim, p.shape, p.dtype, optim_args) for p in parameters),
            ema=held_bytes(parameters) if use_ema else 0,
            activations=max(count.activations[checkpointing] for count in counts.values()),
        )

    def job(self, model: BlockedPreTrainedModel, block: int, name: str, frozen: bool) -> Job:
        """A block as ``memory_alternatives`` takes it; ``frozen``: count what frozen layers keep too."""
        module, counts = model.block(block), self.counts(model, block)
        return Job(
            name=name,
            trained=_trained(model, block),
            layers=[list(layer.parameters()) for layer in layers_of(module)],
            matrices=matrices_of(module),
            resident=held_bytes(resident(model, [block])),
            activations=counts.activations,
            one_gradient=counts.gradient,
            first_layers=self.first_layers(model) if frozen else None,
        )

    def first_layers(self, model: BlockedPreTrainedModel) -> tuple[int, int] | None:
        """Bytes of the only block's activations if its first layer, or its first two, and what is in none train."""
        layers = model.config.num_layers
        if layers < _PROBE_LAYERS or getattr(model.config, "indivisible", False):
            return None
        short, longer = self._probe(model.config, 0, 1), self._probe(model.config, 0, 2)
        if short is None or longer is None:
            return None
        one, two = (self.counts(*probe).activations[0] for probe in (short, longer))
        frozen = self._run(*longer, frozen=True).activations[0] - one
        return tuple(one + (n - 1) * (two - one) + (layers - n) * frozen for n in (1, 2))

    def counts(self, model: BlockedPreTrainedModel, block: int) -> "_Counts":
        """What a step of a block holds besides its state."""
        shapes = tuple(tuple(p.shape) for p in model.block(block).parameters())
        # What all share trains with the first block: the input of the others needs no gradient.
        first = block == 0 or next(model.shared_parameters(), None) is None
        key = (getattr(model.config, "readout", None), first, shapes)
        if key not in self._known:
            self._known[key] = self._extrapolate(model, block) or self._run(model, block)
        return self._known[key]

    def _probe(
        self, config: DiffusionBlocksConfig, block: int, layers: int
    ) -> tuple[BlockedPreTrainedModel, int] | None:
        """A model with a block of so many layers that is like a block of a config's, and its number; None if all layers
        are too few for that."""
        rest, extra = config.num_layers - layers, {}
        auxiliary = getattr(config, "auxiliary_layers", 0)
        if auxiliary and not config.auxiliary_layers_of(block):
            auxiliary, extra = 0, {"auxiliary_layers": 0}
        if block == 0:
            cut, number = ([layers, rest] if rest else [layers]), 0
        else:  # the last of a cascade has no auxiliary layers
            cut, number = ([1, layers, rest - 1] if auxiliary else [rest, layers]), 1
        if min(cut) < 1:
            return None
        key = json.dumps([config.to_dict(), cut, extra], default=str)
        if key not in self._probes:
            changes = {"num_blocks": len(cut), "layers_per_block": cut, "partition": "equal_probability"}
            self._probes[key] = self.build(recut(config, **changes, **extra), blocks=[number])
        return self._probes[key], number

    def _extrapolate(self, model: BlockedPreTrainedModel, block: int) -> "_Counts | None":
        """From two short blocks; None if these would take as long as the block itself, or if its layers differ in
        size."""
        layers = len(model.partition.layers(block))
        if layers <= _PROBE_LAYERS + 1 or getattr(model.config, "indivisible", False):
            return None
        probes = [self._probe(model.config, block, n) for n in (_PROBE_LAYERS - 1, _PROBE_LAYERS)]
        found = [probe for probe in probes if probe is not None]
        if len(found) < len(probes):
            return None
        sizes = [held_bytes(probe.block(number).parameters()) for probe, number in found]
        more = layers - _PROBE_LAYERS
        if held_bytes(model.block(block).parameters()) != sizes[1] + more * (sizes[1] - sizes[0]):
            return None
        short, long = (self.counts(*probe) for probe in found)
        plain, checkpointed = (b + more * (b - a) for a, b in zip(short.activations, long.activations, strict=True))
        return _Counts((plain, checkpointed), long.gradient)

    def _run(self, model: BlockedPreTrainedModel, block: int, frozen: bool = False) -> "_Counts":
        """``frozen``: of the block's layers, only the first one trains."""
        model = self.build(model.config, blocks=[block])
        for _, parameter in model.shared_parameters():
            parameter.requires_grad_(block == 0)
        if frozen:
            for layer in layers_of(model.block(block))[1:]:
                layer.requires_grad_(False)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                model.to_empty(device=self.device)
                with AnyValue():
                    plain, _ = self._peak(model, block, False)
                    lean, gradient = (plain, 0) if frozen else self._peak(model, block, True)
                    return _Counts((plain, lean), gradient)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"{type(self.objective_of(model)).__name__} decides by the values of tensors ({error.func}), which a "
                "plan does not have (a teacher's blocks are chosen so). Plan without it, or count a real step: "
                "measure_memory()."
            ) from error

    def _peak(self, model: BlockedPreTrainedModel, block: int, checkpointing: bool) -> tuple[int, int]:
        """Peak bytes that autograd keeps, and of gradients that are freed as they come."""
        few = few_chunks(model, self.batch_size, 3, self.batch_settings)
        if 2 * few >= self.batch_size:
            forward, backward, gradient = self._moments(model, block, checkpointing, self.batch_size)
            return max(forward + backward), gradient
        # At each moment the bytes grow evenly with the batch, though not those at the peak, which may be at another
        # moment then. The moments of both runs are the same but for the loss's chunks, at the end and the beginning.
        one, two = (self._moments(model, block, checkpointing, n) for n in (few, 2 * few))
        pairs = [*zip(one[0], two[0], strict=False), (one[0][-1], two[0][-1])]
        pairs += zip(reversed(one[1]), reversed(two[1]), strict=False)
        more = (self.batch_size - few) / few
        return max(a + round(more * (b - a)) for a, b in pairs), two[2]

    def _moments(
        self, model: BlockedPreTrainedModel, block: int, checkpointing: bool, batch_size: int
    ) -> tuple[list[int], list[int], int]:
        """Bytes at all moments of the forward and of the backward pass, and the peak of gradients."""
        # Fake tensors cannot hold the state of the random number generator, which autograd does not save anyway.
        set_mode(model, checkpointing, preserve_rng_state=False)
        batch = model.dummy_batch(batch_size, **self.batch_settings)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        gradients = LiveStorages()
        with SavedTensors([model]) as saved:
            with self.precision.autocast():
                loss = self.objective_of(model)(model, block, batch, torch.Generator()).loss
            forward, saved.history = [*saved.history, saved.live], []
            if checkpointing:  # otherwise nothing is saved after the forward pass
                watch_gradients(loss, model.parameters(), gradients)
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.register_post_accumulate_grad_hook(_drop_gradient)
                self.precision.backward(loss)
        return forward, saved.history, gradients.peak


class _Counts(NamedTuple):
    """Bytes of a block's activations, plain and with checkpointing, and the most of gradients that are freed as they
    come."""

    activations: tuple[int, int]
    gradient: int


def _trained(model: BlockedPreTrainedModel, block: int) -> list[Tensor]:
    """What a block trains: its own parameters, and the first block what all share."""
    shared = [p for _, p in model.shared_parameters()] if block == 0 else []
    return [*model.block(block).parameters(), *shared]


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class AnyValue(TorchFunctionMode):
    """Checks of values (labels, noise levels in range) read 1 from fake and meta tensors, which have none."""

    _READ = {"item": int, "__int__": int, "__index__": int, "__float__": float, "__bool__": bool}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], Tensor) and (isinstance(args[0], FakeTensor) or args[0].is_meta):
            if name in self._READ:
                return self._READ[name](1)
            if name in ("numpy", "tolist"):
                ones = np.ones(tuple(args[0].shape))
                return ones if name == "numpy" else ones.tolist()
        return func(*args, **(kwargs or {}))


__all__ = ["AnyValue", "FakeStep", "few_chunks", "recut", "resident"]
