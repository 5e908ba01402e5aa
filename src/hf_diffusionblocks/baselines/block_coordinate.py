"""Block-coordinate updates with the whole network's forward pass: BAdam and LISA.

Both train a few layers at a time by the loss of the whole network, the others frozen: gradients and moments exist for
the active layers only, as with blocks, but every layer's weights and the activations between the active layers and the
loss must be held, and the gradient goes through all layers above.

BAdam (Luo, Yu, Li, arXiv 2404.02827, Alg. 1)
    the blocks in turn, K updates each, with Adam's moments anew at each turn. The default order of its code is from the
    last block to the first.
LISA (Pan et al., arXiv 2403.17919, Alg. 1)
    gamma layers drawn uniformly for K updates at a time; embedding and head always train, and keep their moments. A
    layer's moments are dropped here when it is frozen: kept ones would hold the memory that the method saves.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from ..suggest import unknown_name
from ..training.data_stream import derive_seed

ORDERS = ("descending", "ascending", "random")

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class BlockCoordinate:
    """Which parameters train now, and the optimizers that hold their moments.

    Use ``badam`` or ``lisa``. ``step()`` after the backward pass updates what is active, drops the gradients and goes
    on to the next visit when that is due: a loop of backward passes and ``step()`` is all that is needed. A loop that
    counts updates itself calls ``start(update)`` before each forward pass, which says when other blocks become active.

    Args:
        blocks: the parameters of each block.
        make_optimizer: an optimizer of given parameters.
        visits: for each visit, which blocks are active; endless.
        switch: K, updates of a visit.
        always: parameters that always train.

    Raises:
        ValueError: for no blocks, a block without parameters, a parameter in two places, or a switch below 1.
    """

    def __init__(
        self,
        blocks: Sequence[Iterable[nn.Parameter]],
        make_optimizer: MakeOptimizer,
        visits: Iterator[Sequence[int]],
        switch: int,
        always: Iterable[nn.Parameter] = (),
    ):
        self.blocks, self.always = [list(block) for block in blocks], list(always)
        if not self.blocks or not all(self.blocks):
            raise ValueError(
                f"blocks have {[len(b) for b in self.blocks]} parameters: give at least one to each block."
            )
        everything = [p for block in [*self.blocks, self.always] for p in block]
        if len({id(p) for p in everything}) != len(everything):
            raise ValueError("a parameter stands in two blocks, or in a block and in always: give it once.")
        if isinstance(switch, bool) or not isinstance(switch, int) or switch < 1:
            raise ValueError(f"switch={switch!r} must be a whole number of updates, at least 1.")
        self.make_optimizer, self.visits, self.switch = make_optimizer, visits, switch
        self.lasting = make_optimizer(self.always) if self.always else None
        self.optimizer: torch.optim.Optimizer | None = None
        self.active: tuple[int, ...] = ()
        self.update = 0
        self._counted_outside = False

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Of the active blocks, and of what always trains."""
        return [one for one in (self.optimizer, self.lasting) if one is not None]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What trains now."""
        return [p for one in self.optimizers for group in one.param_groups for p in group["params"]]

    def start(self, update: int) -> bool:
        """To be called before update 0, 1, 2, ...: goes on to the next visit when that is due.

        Returns:
            Whether other blocks are active now.
        """
        self._counted_outside = True
        return self._go_on(update)

    def _go_on(self, update: int) -> bool:
        if self.optimizer is not None and update % self.switch:
            return False
        self.activate(next(self.visits))
        return True

    def activate(self, blocks: Sequence[int]) -> None:
        """Freeze all blocks but these, which get an optimizer with no moments yet; drop the gradients of the others."""
        self.active = tuple(blocks)
        for b, parameters in enumerate(self.blocks):
            for p in parameters:
                p.requires_grad_(b in self.active)
                if b not in self.active:
                    p.grad = None
        self.optimizer = self.make_optimizer([p for b in self.active for p in self.blocks[b]])

    def set_learning_rate(self, lr: float) -> None:
        """For a schedule that outlives the optimizers of the visits."""
        for one in self.optimizers:
            for group in one.param_groups:
                group["lr"] = lr

    def step(self) -> None:
        """Update what is active, and drop the gradients; then go on to the next visit if nobody calls ``start``."""
        if self.optimizer is None:  # the first backward pass gave gradients to all
            self._go_on(self.update)
        for one in self.optimizers:
            one.step()
        self.zero_grad()
        if not self._counted_outside:
            self.update += 1
            self._go_on(self.update)

    def zero_grad(self) -> None:
        """Drop all gradients, as ``step`` does by itself."""
        for p in (p for block in [*self.blocks, self.always] for p in block):
            p.grad = None


def badam(
    blocks: Sequence[Iterable[nn.Parameter]],
    make_optimizer: MakeOptimizer,
    switch: int,
    order: str = "descending",
    seed: int = 0,
) -> BlockCoordinate:
    """BAdam (arXiv 2404.02827, Alg. 1): block after block, ``switch`` updates each.

    Args:
        blocks: the parameters of each block, first layers first. What stands in none stays as the caller left it.
        make_optimizer: an Adam of given parameters.
        switch: K.
        order: ``descending`` from the last block to the first, ``ascending``, or ``random``: a permutation per round.
        seed: of the random order.

    Raises:
        ValueError: for an unknown order, and as ``BlockCoordinate``.
    """
    if order not in ORDERS:
        raise ValueError(unknown_name("order", order, ORDERS))
    return BlockCoordinate(blocks, make_optimizer, _rounds(len(blocks), order, seed), switch)


def lisa(
    layers: Sequence[Iterable[nn.Parameter]],
    make_optimizer: MakeOptimizer,
    switch: int,
    active: int,
    always: Iterable[nn.Parameter] = (),
    seed: int = 0,
) -> BlockCoordinate:
    """LISA (arXiv 2403.17919, Alg. 1): ``active`` layers, drawn uniformly anew every ``switch`` updates.

    Args:
        layers: the parameters of each layer between embedding and head.
        make_optimizer: an Adam of given parameters.
        switch: K, the sampling period.
        active: gamma, layers at a time.
        always: of embedding and head.
        seed: of the draws.

    Raises:
        ValueError: for more active layers than there are, and as ``BlockCoordinate``.
    """
    if not 1 <= active <= len(layers):
        raise ValueError(f"active={active} must lie between 1 and the {len(layers)} layers.")
    return BlockCoordinate(layers, make_optimizer, _draws(len(layers), active, seed), switch, always)


def _rounds(count: int, order: str, seed: int) -> Iterator[Sequence[int]]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "badam"))
    while True:
        if order == "random":
            row = torch.randperm(count, generator=generator).tolist()
        else:
            row = list(range(count))[:: -1 if order == "descending" else 1]
        yield from ([b] for b in row)


def _draws(count: int, active: int, seed: int) -> Iterator[Sequence[int]]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "lisa"))
    while True:
        yield sorted(torch.randperm(count, generator=generator)[:active].tolist())
