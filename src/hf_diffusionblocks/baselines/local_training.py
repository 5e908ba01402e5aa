"""One loop for the rivals that train a classifier by local losses: each loss has a part of the network of its own.

An update goes through the losses of the batch one by one. Each is computed, its gradient taken, its part stepped by an
optimizer of its own and the gradient dropped before the next loss is computed, so that activations and gradients of one
part exist at a time. Parameters that belong to no part (a classifier after all of them, a table of label embeddings)
collect the gradients of all losses and step last.

Arguments, optimizers, schedules and the order of the samples are those of ``DiffusionBlocksTrainer``: a rival sees
the samples that block 0 of a blocked model sees, in the same order.
"""

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..families.image_checks import labels_of_dataset
from ..memory_counting import MemoryUse, SavedTensors, held_bytes, state_of
from ..training.arguments import DiffusionBlocksTrainingArguments
from ..training.data_stream import SampleOrder, derive_seed
from ..training.optimizers import make_optimizer, plain_tensors
from .local_checks import ImageShape, check_samples, check_settings

Images = Float[Tensor, "batch channels height width"]
Labels = Int64[Tensor, "batch"]
LocalLoss = tuple[int | None, Tensor]
"""The part whose loss it is, None for what belongs to no part, and the loss."""


class LocalClassifier(nn.Module, ABC):
    """A classifier of images whose parts are trained by losses of their own."""

    @abstractmethod
    def parts(self) -> Sequence[Sequence[nn.Module]]:
        """The modules of each part; a module stands in one part only."""

    @abstractmethod
    def losses(self, images: Images, labels: Labels, generator: torch.Generator) -> Iterator[LocalLoss]:
        """The losses of a batch, computed one at a time, each when it is asked for.

        Args:
            images: pixels in [-1, 1].
            labels: classes.
            generator: of the noise, on the CPU.
        """

    @abstractmethod
    def predict(self, images: Images, generator: torch.Generator) -> Labels:
        """The class of each image, without gradients. ``generator`` as in ``losses``."""

    def takes(self) -> ImageShape | None:
        """What it takes, for a trainer to check the data by; None leaves them unchecked."""
        return None

    def resident(self, part: int) -> Sequence[nn.Module]:
        """What a job that trains one part alone must hold: the part, unless it needs others to run."""
        return self.parts()[part]

    def parameters_of(self, part: int | None) -> list[nn.Parameter]:
        """The trained parameters of a part; with None those of no part."""
        inside = [{p for module in modules for p in module.parameters()} for modules in self.parts()]
        if part is not None:
            return [p for p in self.parameters() if p in inside[part] and p.requires_grad]
        return [p for p in self.parameters() if p.requires_grad and not any(p in found for found in inside)]


class LocalTrainer:
    """Trains a ``LocalClassifier``; see the module's docstring.

    Args:
        model: trained in place.
        args: batch size, budget, optimizer, schedule, clipping and seed are used.
        train_dataset: gives ``pixel_values`` and ``class_labels`` for a list of indices, as
            ``ImageDataset`` does.

    Raises:
        ValueError: for a model that is none, settings that mean nothing here, and samples that do not fit the model.
    """

    def __init__(self, model: LocalClassifier, args: DiffusionBlocksTrainingArguments, train_dataset: Any):
        if not isinstance(model, LocalClassifier):
            raise ValueError(
                f"a {type(model).__name__} is no LocalClassifier: give one of baselines.noprop, forward_forward or "
                "blocked_cnn, or derive one that names its parts and their losses."
            )
        check_settings(args)
        if not len(train_dataset):
            raise ValueError("train_dataset is empty: give at least one sample.")
        if (takes := model.takes()) is not None:
            check_samples(takes, train_dataset[[0]]["pixel_values"], labels_of_dataset(train_dataset))
        self.model, self.args, self.dataset = model, args, train_dataset
        self.num_updates = args.updates_per_block(len(train_dataset), 1)
        self.order = SampleOrder(len(train_dataset), args.seed, 0)
        keys = [*range(len(model.parts())), None]
        self.parameters = {key: held for key in keys if (held := model.parameters_of(key))}
        self.optimizers = {
            key: make_optimizer([(str(i), p) for i, p in enumerate(held)], args)
            for key, held in self.parameters.items()
        }
        self.schedules = {key: args.make_schedule(one, self.num_updates) for key, one in self.optimizers.items()}
        self.update = 0

    @property
    def updates_per_epoch(self) -> float:
        """How many updates see as many samples as there are."""
        return len(self.dataset) / self.args.per_device_train_batch_size

    def batch(self, update: int) -> tuple[Tensor, Tensor, torch.Generator]:
        """Images, labels and noise of an update: a function of the seed and the number alone."""
        size = self.args.per_device_train_batch_size
        batch = self.dataset[self.order.indices(update * size, size)]
        generator = torch.Generator().manual_seed(derive_seed(self.args.seed, "rival", update))
        if (takes := self.model.takes()) is not None:
            check_samples(takes, batch["pixel_values"], batch["class_labels"])
        device = next(self.model.parameters()).device
        return batch["pixel_values"].to(device), batch["class_labels"].to(device), generator

    def step(self) -> dict[int | None, float]:
        """One update of all parts; returns their losses."""
        self.model.train()
        values = {}
        for part, loss in self.model.losses(*self.batch(self.update)):
            loss.backward()
            values[part] = float(loss.detach())
            if part is not None:
                self.apply(part)
        if None in self.optimizers:
            self.apply(None)
        self.update += 1
        return values

    def apply(self, part: int | None) -> None:
        """Step a part's optimizer and drop its gradients."""
        if self.args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.parameters[part], self.args.max_grad_norm)
        self.optimizers[part].step()
        self.optimizers[part].zero_grad(set_to_none=True)
        self.schedules[part].step()

    def train(self, after_update: Callable[[int], Any] | None = None) -> "LocalTrainingResult":
        """Make all updates.

        Args:
            after_update: called with the number of updates made.

        Raises:
            FloatingPointError: naming the part and update whose loss is not finite.
        """
        seconds: list[float] = []
        last: list[Any] = []
        while self.update < self.num_updates:
            start = time.perf_counter()
            values = self.step()
            seconds.append(time.perf_counter() - start)
            bad = [part for part, value in values.items() if not value - value == 0]
            if bad:
                raise FloatingPointError(f"the loss of part {bad[0]} is not finite at update {self.update}.")
            last = [*last[-49:], values]
            if after_update is not None:
                after_update(self.update)
        means = {part: statistics.fmean(v[part] for v in last if part in v) for part in (last[-1] if last else {})}
        return LocalTrainingResult(
            updates=self.update,
            losses=means,
            seconds=sum(seconds),
            seconds_per_epoch=statistics.median(seconds) * self.updates_per_epoch if seconds else 0.0,
        )

    def measure(self) -> dict[int | None, MemoryUse]:
        """Count what a real update holds, by part: what a job that trains the part alone needs.

        The update is an ordinary one: weights and moments move on. The entry None is the whole process: all weights and
        moments, and the largest gradients and activations of any part. The kinds are those of
        ``memory_counting``; what belongs to no part counts for every part.
        """
        model = self.model.train()
        found = {}
        losses = model.losses(*self.batch(self.update))
        while True:
            with SavedTensors([model]) as saved:
                part, loss = next(losses, (None, None))
                if loss is None:
                    break
                loss.backward()
            gradients = held_bytes(p.grad for p in model.parameters() if p.grad is not None)
            found[part] = (gradients, saved.peak)
            if part is not None:
                self.apply(part)
            del loss
        if None in self.optimizers:
            self.apply(None)
        self.update += 1
        outside, moments = model.parameters_of(None), self._moments
        uses: dict[int | None, MemoryUse] = {}
        for part in range(len(model.parts())):
            gradients, activations = (max(values) for values in zip(found[part], found.get(None, (0, 0)), strict=True))
            held = [tensor for module in model.resident(part) for tensor in state_of(module)]
            weights = held_bytes([*held, *outside])
            uses[part] = MemoryUse(weights, gradients, moments(part) + moments(None), 0, activations)
        peaks = [max(values) for values in zip(*found.values(), strict=True)]
        everything = sum(moments(key) for key in self.optimizers)
        uses[None] = MemoryUse(held_bytes(state_of(model)), peaks[0], everything, 0, peaks[1])
        return uses

    def _moments(self, part: int | None) -> int:
        if part not in self.optimizers:
            return 0
        states = (value for state in self.optimizers[part].state.values() for value in state.values())
        return held_bytes(tensor for value in states for tensor in plain_tensors(value))


@dataclass(frozen=True)
class LocalTrainingResult:
    """What a run gave.

    Attributes:
        updates: how many of each part.
        losses: of each part, the mean of the last 50 updates.
        seconds: of all updates.
        seconds_per_epoch: from the median update, so that an interruption of the machine does not count.
    """

    updates: int
    losses: dict[int | None, float]
    seconds: float
    seconds_per_epoch: float


@torch.no_grad()
def accuracy(model: LocalClassifier, dataset: Any, batch_size: int = 256, seed: int = 0) -> float:
    """Share of a data set that a classifier gets right, in evaluation mode.

    Args:
        model: left in evaluation mode.
        dataset: as in ``LocalTrainer``.
        batch_size: images at a time.
        seed: of the noise that sampling starts from.
    """
    model.eval()
    generator = torch.Generator().manual_seed(derive_seed(seed, "rival", "test"))
    device, right = next(model.parameters()).device, 0
    for start in range(0, len(dataset), batch_size):
        batch = dataset[list(range(start, min(start + batch_size, len(dataset))))]
        found = model.predict(batch["pixel_values"].to(device), generator)
        right += int((found == batch["class_labels"].to(device)).sum())
    return right / len(dataset)
