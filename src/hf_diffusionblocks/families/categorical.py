"""Blocked models whose targets are categorical: what trainer, planner and exact gradients need of such a family.

In symbols (clean stream)::

    h_0 = start(x),    h_{b+1} = clean_block(sg(h_b), b),    loss_b = CE(head_b(training_hidden(h_{b+1}, b)), y)

sg = stop-gradient; with ``context="independent"`` every block starts from ``start(x)`` instead.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init

from ..modeling import BlockedPreTrainedModel
from .categorical_config import CategoricalConfig


class BlockedCategoricalModel(BlockedPreTrainedModel):
    """A network with categorical targets, cut into blocks.

    A family's block is a module with ``layers`` (the base's own), ``auxiliary_layers`` (perhaps none) and what
    ``handed_on`` names.
    """

    config_class = CategoricalConfig
    # What a cascade's block starts from the block below it with; those that are None are left out.
    handed_on: tuple[str, ...] = ("norm",)

    # -- what a family defines -----------------------------------------------------------------------------------

    def start(self, inputs: Tensor, block: int = 0) -> Float[Tensor, "batch positions width"]:
        """What the clean stream of a block that builds on no other one starts from, with its gradient.

        Args:
            inputs: the batch's ``main_input_name``.
            block: whose; block 0's in a cascade.
        """
        raise TypeError(f"{type(self).__name__} must define start().")

    def clean_block(
        self, hidden: Float[Tensor, "batch positions width"], block: int, **places: Any
    ) -> Float[Tensor, "batch positions width"]:
        """A block's layers on a clean hidden state, before its norm."""
        raise TypeError(f"{type(self).__name__} must define clean_block().")

    def places(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of a batch a block's layers need besides the hidden state, such as positions."""
        return {}

    def num_positions(self, inputs: Tensor) -> int:
        """Length of the hidden states of so many inputs."""
        raise TypeError(f"{type(self).__name__} must define num_positions().")

    def tied_table(self) -> nn.Parameter | None:
        """A parameter that block 0 trains and that the last block's head reads too; None if there is none."""
        return None

    # -- cascades ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def context_of(self, block: int, inputs: Tensor, **places: Any) -> Float[Tensor, "batch positions width"]:
        """What a block's clean stream starts from, without gradient: ``start``, or the lower blocks' output.

        Lower blocks run as they will when the model is used, without dropout, whatever mode they are in.
        """
        if self.config.context != "cascade" or block == 0:
            return self.start(inputs, block)
        with evaluating(self.block(0)):
            hidden = self.start(inputs)
        for lower in range(block):
            with evaluating(self.block(lower)):
                hidden = self.clean_block(hidden, lower, **places)
        return hidden

    def start_of(self, block: int, batch: dict[str, Tensor]) -> Float[Tensor, "batch positions width"]:
        """What a block's clean stream starts from in training: with a gradient where the start is its own.

        Of a cascade's other blocks, ``hidden_states`` of the batch if it holds them.
        """
        if self.config.context == "independent" or block == 0:
            return self.start(batch[self.main_input_name], block)
        if "hidden_states" in batch:
            return batch["hidden_states"].to(self.dtype)
        return self.context_of(block, batch[self.main_input_name], **self.places(batch))

    @torch.no_grad()
    def begin_block(self, block: int, hand_over: bool = False) -> None:
        """Start a cascade's block from the block below it: its norm and head, and with ``hand_over`` its auxiliary
        layers as this block's first layers. Blocks of a pretrained base keep the base's weights."""
        if block == 0 or self.config.pretrained or self.config.context != "cascade":
            return
        module, below = self.block(block), self.block(block - 1)
        for name in self.handed_on:
            if getattr(module, name) is not None:
                getattr(module, name).load_state_dict(getattr(below, name).state_dict())
        if hand_over:
            for mine, theirs in zip(module.layers, below.auxiliary_layers, strict=False):
                mine.load_state_dict(theirs.state_dict())


def zero_branches(layers: Sequence[nn.Module], outputs: Sequence[Sequence[str]]) -> None:
    """Make each layer the identity: what its branches add is zero.

    Args:
        layers: of a base.
        outputs: paths from a layer to the linear maps that its branches end in, such as ``("mlp", "fc2")``.
    """
    for layer in layers:
        for path in outputs:
            module = layer.get_submodule(".".join(path))
            init.zeros_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in eval mode (no dropout, no checkpointing), and then in the mode that it was in."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
