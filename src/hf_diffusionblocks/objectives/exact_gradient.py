"""Exact end-to-end gradients of one block at a time: block-coordinate descent on the whole network's loss.

The blocks of a cascade with clean readout are one chain, so the last block's cross-entropy is the whole network's loss.
To update block b exactly, every block runs forward without gradient, keeping only what it starts from; then, from the
last block down to b + 1, each is run again and passes the gradient on to its input; then block b is run again. At any
moment one block's activations exist, and gradients of block b's weights alone.

What it costs: B forward passes, B - b recomputed ones and as many backward passes of blocks. An update of one block
costs about what an end-to-end update with checkpointing costs, so K updates of each of B blocks cost B times as much as
K updates end to end.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration import DiffusionBlocksConfig
from ..families.categorical import BlockedCategoricalModel
from ..families.causal_lm import BlockedForCausalLM
from ..losses import linear_cross_entropy
from .next_token import NextTokenPrediction, _by_row, next_tokens
from .result import ObjectiveResult


def check_exact(config: DiffusionBlocksConfig) -> None:
    """Raise a ``ValueError`` for a model whose blocks are not one chain that ends in its loss."""
    mend = "Use gradient='local'."
    if config.num_blocks == 1:
        return
    if getattr(config, "context", "independent") != "cascade":
        kind = getattr(config, "context", config.model_type)
        raise ValueError(
            f"gradient='exact' needs blocks that are one chain (context='cascade'); those of "
            f"{kind!r} do not feed each other, and each has a loss of its own. {mend}"
        )
    if config.readout != "clean":
        raise ValueError(
            f"gradient='exact' needs readout='clean'; with {config.readout!r} each block has a loss of its own. {mend}"
        )
    if config.auxiliary_layers:
        raise ValueError(
            f"gradient='exact' has no use for auxiliary layers, which only a local loss sees: set auxiliary_layers=0 "
            f"instead of {config.auxiliary_layers} when the model is made. Or: {mend.lower()}"
        )


class ExactGradient:
    """Makes an objective of a cascade's blocks that of the whole network, with its exact gradient in one block.

    Stands before a family's objective among the bases of a class.

    Raises:
        ValueError: for a teacher: only the data's loss is known.
    """

    teacher: Any
    prepare: Callable[..., dict[str, Tensor]]

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # of the objective that stands behind it
        if self.teacher is not None:
            raise ValueError(
                "gradient='exact' with a teacher is not known: set distillation_weight and hidden_weight to 0."
            )

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """The classes to predict."""
        raise TypeError(f"{type(self).__name__} must define targets().")

    def losses(self, model: BlockedCategoricalModel, output: Tensor, targets: Tensor, block: int, tied: bool) -> Tensor:
        """Cross-entropy of each target that counts, from the last block's output; ``tied``: its gradient reaches the
        table that the head is tied to."""
        raise TypeError(f"{type(self).__name__} must define losses().")

    def by_sample(self, losses: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of each sample, detached."""
        raise TypeError(f"{type(self).__name__} must define by_sample().")

    def __call__(
        self,
        model: BlockedCategoricalModel,
        block: int,
        batch: dict[str, Tensor],
        generator: torch.Generator | None = None,
    ) -> ObjectiveResult:
        """The whole network's loss on one batch, in nats; its gradient is that of the block's weights, and of a table
        that block 0 trains (token embeddings) if it can be had from there: block 0, or a head that is tied to it.

        Args:
            model: the model, with all blocks loaded.
            block: which block trains.
            batch: as the family's own objective takes it, without ``hidden_states``.
            generator: of what the objective draws (mirrored images).
        """
        batch = self.prepare(batch, generator)
        targets, places = self.targets(batch), model.places(batch)
        inputs = batch[model.main_input_name]
        last = model.partition.num_blocks - 1
        table = model.tied_table() if block == 0 else None
        tied = table is not None
        with model.expect_blocks([*range(last + 1), *reversed(range(block, last))]):
            starts, states = self._forward(model, inputs, places, last)
            if block == last:
                hidden = model.start(inputs) if block == 0 else starts[last]
                losses = self.losses(model, model.clean_block(hidden, last, **places), targets, last, tied)
                return ObjectiveResult(losses.mean(), torch.zeros(0), self.by_sample(losses, targets))
            with _frozen(model.block(last)):
                start = starts.pop().requires_grad_()
                losses = self.losses(model, model.clean_block(start, last, **places), targets, last, tied)
                gradient, *of_table = torch.autograd.grad(losses.mean(), [start, table] if tied else [start])
                losses = losses.detach()
            for upper in range(last - 1, block, -1):
                start = starts.pop().requires_grad_()
                with _frozen(model.block(upper)), _replayed(states[upper]):
                    output = model.clean_block(start, upper, **places)
                    (gradient,) = torch.autograd.grad(output, start, gradient)
                    del output
            with _replayed(states[block]):
                hidden = model.start(inputs) if block == 0 else starts[block]
                output = model.clean_block(hidden, block, **places)
            known = [(output, gradient), *zip([table], of_table, strict=False)]
            loss = _KnownGradient.apply(losses.mean(), *(t for pair in known for t in pair))
        return ObjectiveResult(loss, torch.zeros(0), self.by_sample(losses, targets))

    @staticmethod
    @torch.no_grad()
    def _forward(
        model: BlockedCategoricalModel, inputs: Tensor, places: dict[str, Tensor], last: int
    ) -> tuple[list[Tensor], list["_RandomState"]]:
        """What each block starts from, and the state of the random numbers (dropout) when it does; of the first block,
        before the dropout of the model's start."""
        states = [_RandomState(inputs.device)]
        starts = [model.start(inputs)]
        for b in range(last):
            if b > 0:
                states.append(_RandomState(inputs.device))
            starts.append(model.clean_block(starts[-1], b, **places))
        return starts, states


@dataclass
class ExactNextTokenPrediction(ExactGradient, NextTokenPrediction):
    """Cross-entropy of the last block's next token, in nats per token, with its exact gradient in one block.

    Raises:
        ValueError: for a teacher: only the data's loss is known.
    """

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        return next_tokens(batch)

    def losses(self, model: BlockedForCausalLM, output: Tensor, targets: Tensor, block: int, tied: bool) -> Tensor:
        weight = model.head_weight(block)
        if model.config.tied_head and not tied:
            weight = weight.detach()
        features = model.block(block).norm(output).flatten(0, 1)
        return linear_cross_entropy([(features, weight)], targets.flatten())

    def by_sample(self, losses: Tensor, targets: Tensor) -> Tensor:
        return _by_row(losses, targets)


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to some tensors has been computed already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs[1::2])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(g for known in ctx.saved_tensors for g in (known * grad.to(known.dtype), None)))


class _RandomState:
    """The state of the random numbers on the CPU and on a device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


@contextlib.contextmanager
def _replayed(state: _RandomState) -> Iterator[None]:
    """Draw the same random numbers as when the state was taken, then go on as before."""
    now = _RandomState(state.device)
    state.set()
    try:
        yield
    finally:
        now.set()


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Parameters that need no gradient, so that nothing is kept for it."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


__all__ = ["ExactGradient", "ExactNextTokenPrediction", "check_exact"]
