"""Where the blocks' state lives during training: all on the device, or one block there and the others at home.

``device`` keeps everything on the device: a process that steps all blocks then holds all weights, moments and averages,
and saves gradients and activations only. ``host`` and ``disk`` keep one block there, and the next one of the schedule,
which is known in advance, comes while it computes: ``(4 P + A) L / B`` and the next block's weights and moments
(and averages, if there are any). The numbers are the same, bit for bit.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..modeling import BlockedPreTrainedModel
from ..streaming import WEIGHTS, stream_blocks
from .arguments import DiffusionBlocksTrainingArguments
from .block_trainer import BlockTrainer
from .optimizers import plain_tensors
from .parallel import process_state

MOMENTS, CODES, AVERAGES = "moments", "codes", "ema"  # codes: moments of eight bits


class Residency:
    """Everything on the device.

    Attributes:
        trainers: the trainers of the blocks.
        active: the block whose state is on the device for training; None if that is not one.
    """

    def __init__(self, model: BlockedPreTrainedModel, device: torch.device):
        if model.streamer is not None:
            raise ValueError(
                "residency='device' with a model whose blocks are streamed: set residency to where they rest ('host' "
                "or 'disk'), or call model.disable_block_streaming() first."
            )
        self.model = model.to(device)
        self.trainers: dict[int, BlockTrainer] = {}

    @property
    def active(self) -> int | None:
        return None

    def pin(self, block: int, following: int | None = None) -> None:
        """Have a block's state on the device for training, and fetch the one of the following block meanwhile."""

    def release(self) -> None:
        """Send all blocks home."""

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[int], None]]:
        """Gives a function that has a block's whole state on the device to be read, one block at a time."""
        yield lambda block: None

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, for as long as it lasts."""
        averages = [t for t in self.trainers.values() if t.ema is not None]
        for trainer in averages:
            trainer.ema.store(trainer.parameters)
            trainer.ema.copy_to(trainer.parameters)
        try:
            yield
        finally:
            for trainer in reversed(averages):  # several may average what blocks share: the first stored the original
                trainer.ema.restore(trainer.parameters)


class StreamedResidency(Residency):
    """One block's weights, moments, gradients and averages on the device, the others at home.

    What blocks share stays on the device, and so do buffers and the optimizer's counters, which are small. Moments and
    averages of shared weights belong to the block whose trainer has them.

    Args:
        model: the model; its blocks are streamed from here on.
        device: where blocks compute.
        home: ``host`` or ``disk``.
        folder: for the scratch files on disk.

    Raises:
        ValueError: if the model's blocks are streamed already, to another home or device.
    """

    def __init__(self, model: BlockedPreTrainedModel, device: torch.device, home: str, folder: Path):
        self.model = model
        self.trainers = {}
        if model.streamer is None:
            model.enable_block_streaming(device, offload_to_disk_path=folder if home == "disk" else None)
        assert model.streamer is not None
        self.streamer = model.streamer
        is_at = ("disk" if self.streamer.to_disk else "host", self.streamer.device.type)
        if is_at != (home, device.type):
            raise ValueError(
                f"residency={home!r} on {device.type}, but this model's blocks rest in {is_at[0]!r} and compute on "
                f"{is_at[1]}: make it with stream_blocks({home!r}, device={device.type!r}), or without."
            )
        self.streamer.release()
        self.streamer.drop(MOMENTS, CODES, AVERAGES)
        self.streamer.sources = [self._state_of]

    def _state_of(self, block: int) -> dict[str, list[Tensor]]:
        trainer = self.trainers.get(block)
        if trainer is None:
            return {}
        values = (value for state in trainer.optimizer.state.values() for value in state.values())
        moments = list({id(t): t for value in values for t in _plain(value)}.values())  # some may serve many parameters
        return {
            MOMENTS: [t for t in moments if t.is_floating_point()],
            CODES: [t for t in moments if not t.is_floating_point()],  # apart: torch.save wants one dtype per storage
            AVERAGES: [] if trainer.ema is None else list(trainer.ema.shadow_params),
        }

    @property
    def active(self) -> int | None:
        return self.streamer.pinned

    def pin(self, block: int, following: int | None = None) -> None:
        self.streamer.pin(block, following)

    def release(self) -> None:
        self.streamer.release()

    @contextlib.contextmanager
    def _visits(self, kinds: tuple[str, ...], on_visit: Callable[[int], None] | None, prefetch: bool) -> Iterator[None]:
        streamer = self.streamer
        streamer.release()
        before = streamer.visit_kinds, streamer.on_visit, streamer.prefetch
        streamer.visit_kinds, streamer.on_visit, streamer.prefetch = kinds, on_visit, prefetch
        try:
            yield
        finally:
            streamer.release()
            streamer.visit_kinds, streamer.on_visit, streamer.prefetch = before

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[int], None]]:
        with self._visits((WEIGHTS, MOMENTS, CODES, AVERAGES), None, False):
            yield self.streamer.visit

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        originals: dict[str, tuple[Tensor, Tensor]] = {}
        with self._visits((WEIGHTS, AVERAGES), self._average_block, self.streamer.prefetch):
            self._average_shared(originals)
            try:
                yield
            finally:
                for parameter, original in originals.values():
                    parameter.data.copy_(original)

    @torch.no_grad()
    def _average_shared(self, originals: dict[str, tuple[Tensor, Tensor]]) -> None:
        for block, trainer in self.trainers.items():
            shared = [(n, p, s) for n, p, s in _averages(trainer) if not _is_of(n, block)]
            if shared:
                self.streamer.visit(block)
            for name, parameter, average in shared:
                originals.setdefault(name, (parameter, parameter.clone()))
                parameter.copy_(average)

    @torch.no_grad()
    def _average_block(self, block: int) -> None:
        """Overwrite a visitor's weights, which are a copy of its own, with their averages."""
        if block in self.trainers:
            for name, parameter, average in _averages(self.trainers[block]):
                if _is_of(name, block):
                    parameter.copy_(average)


def _averages(trainer: BlockTrainer) -> Iterator[tuple[str, Tensor, Tensor]]:
    averages = [] if trainer.ema is None else trainer.ema.shadow_params
    return zip(trainer.names, trainer.parameters, averages, strict=False)


def _is_of(name: str, block: int) -> bool:
    return name.startswith(f"blocks.{block}.")


def _plain(value: object) -> Iterator[Tensor]:
    """The tensors that hold a value of an optimizer's state; counters, which stay, are not among them."""
    return (tensor for tensor in plain_tensors(value) if tensor.numel() > 1)


def construction(args: DiffusionBlocksTrainingArguments) -> contextlib.AbstractContextManager:
    """A context in which a model made from a config is made where its blocks will rest, block by block."""
    if args.residency == "device":
        return contextlib.nullcontext()
    return stream_blocks(args.residency, device=process_state(args).device, folder=_folder(args))


def _folder(args: DiffusionBlocksTrainingArguments) -> Path:
    return Path(args.residency_dir or Path(args.output_dir) / "residency")


def make_residency(
    model: BlockedPreTrainedModel, args: DiffusionBlocksTrainingArguments, device: torch.device
) -> Residency:
    """The residency that the arguments ask for; moves the model there."""
    if args.residency == "device":
        return Residency(model, device)
    return StreamedResidency(model, device, args.residency, _folder(args))
