"""What training costs, in FLOPs: counted on the real modules and the real objective, from a config alone.

Of L layers, end-to-end training runs each forward (1) and backward (2): 3 L layer passes per update. Block b of B runs
its own layers, its auxiliary layers and its head forward and backward; a cascade's block also runs the layers below it
forward, without gradient, on each batch (unless their outputs are kept on disk, when they are computed once)::

    cascade of 2, 2 and 2 layers, one auxiliary layer    3 (2 + 1) + [3 (2 + 1) + 2] + [3 * 2 + 4] = 30 passes
    end to end                                           3 * 6                                     = 18

so an update of every block costs 1.67 end-to-end updates, not 1. Noisy targets are a second stream of tokens through
the block's layers. Heads are counted too: with large vocabularies, B of them are no longer small.

A step runs on the meta device, whose tensors have shapes but no memory; torch's counter sees its matrix products, and
attention by its mathematical definition (all pairs, no saving from causality). Two things are left out: what is not a
matrix product, and a teacher. The loss is counted at all T positions, though the last one has no label.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from .configuration import DiffusionBlocksConfig
from .families.categorical_config import CategoricalConfig
from .memory import end_to_end_config
from .memory_counting import set_mode
from .memory_fake_steps import AnyValue, few_chunks, recut
from .objectives import default_objective
from .suggest import unknown_name
from .training.arguments import LOWER_OUTPUTS


@dataclass(frozen=True)
class BlockCompute:
    """What an update of one block runs.

    Attributes:
        block: its number.
        layers: layers of its own, forward and backward.
        auxiliary_layers: layers that only its loss sees, forward and backward.
        lower_layers: layers of blocks below it, forward only.
        flops: of one update.
    """

    block: int
    layers: int
    auxiliary_layers: int
    lower_layers: int
    flops: float

    @property
    def layer_passes(self) -> int:
        """In units of one layer's forward pass: 3 per trained layer, 1 per lower one. Heads and a second stream are not
        in it."""
        return 3 * (self.layers + self.auxiliary_layers) + self.lower_layers


@dataclass(frozen=True)
class TrainingCompute:
    """What training costs.

    Attributes:
        blocks: what an update of each block runs.
        end_to_end: FLOPs of an update of all L layers at once, without blocks' extras.
        batch_size: samples per update.
    """

    blocks: tuple[BlockCompute, ...]
    end_to_end: float
    batch_size: int

    @property
    def flops(self) -> float:
        """FLOPs of one update of every block."""
        return sum(block.flops for block in self.blocks)

    @property
    def ratio(self) -> float:
        """One update of every block, in end-to-end updates."""
        return self.flops / self.end_to_end

    def total(self, updates: int) -> float:
        """FLOPs of a run in which every block gets so many updates."""
        return updates * self.flops

    def format(self) -> str:
        """A table, a line per block."""
        lines = [
            f"{'block':<8}{'layers':>8}{'auxiliary':>11}{'forward only':>14}{'FLOPs of an update':>22}{'ratio':>8}"
        ]
        for b in self.blocks:
            lines.append(
                f"{b.block:<8}{b.layers:>8}{b.auxiliary_layers:>11}{b.lower_layers:>14}{b.flops:>22.4g}"
                f"{b.flops / self.end_to_end:>8.2f}"
            )
        lines.append(f"{'all':<41}{self.flops:>22.4g}{self.ratio:>8.2f}")
        lines.append(f"{'end to end':<41}{self.end_to_end:>22.4g}{1.0:>8.2f}")
        return "\n".join(lines)

    __str__ = format


def training_flops(
    config: DiffusionBlocksConfig,
    *,
    batch_size: int = 1,
    lower_outputs: str = "recompute",
    passes: float | None = None,
    gradient_checkpointing: bool = False,
    **batch_settings: Any,
) -> TrainingCompute:
    """Count what training a blocked model costs, without allocating it.

    Args:
        config: of the model.
        batch_size: samples per update.
        lower_outputs: as in the training arguments: with ``disk``, lower layers run once per sample of the data set.
        passes: over the data set, of each block; needed for ``disk`` only.
        gradient_checkpointing: count the forward passes that are done again.
        **batch_settings: for the family's ``dummy_batch``, such as ``tokens``.

    Raises:
        ValueError: for a setting that is not allowed.

    Example:
        >>> from hf_diffusionblocks import BlockedCausalLMConfig
        >>> base = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        ...         "num_attention_heads": 4, "vocab_size": 10}
        >>> config = BlockedCausalLMConfig(base_config=base, num_blocks=3, layers_per_block=[2, 2, 2])
        >>> cost = training_flops(config, tokens=16)
        >>> tuple(block.layer_passes for block in cost.blocks)
        (9, 11, 10)
        >>> round(cost.ratio, 2)
        1.67
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number of at least 1.")
    if lower_outputs not in LOWER_OUTPUTS:
        raise ValueError(unknown_name("lower_outputs", lower_outputs, LOWER_OUTPUTS))
    if lower_outputs == "disk" and not (passes and passes > 0):
        raise ValueError(f"passes={passes!r} with lower_outputs='disk': say how often each block reads the data set.")
    times = 1 / passes if lower_outputs == "disk" and passes else 1.0
    plain, given = end_to_end_config(config), (batch_size, gradient_checkpointing, batch_settings)
    whole = _whole(plain, *given)
    counted = [(whole, 0)] if plain.to_dict() == config.to_dict() else _count(config, *given)
    cascade = getattr(config, "context", "independent") == "cascade"
    rows, below = [], 0
    for block, (own, lower) in enumerate(counted):
        layers = config.layers_per_block[block]
        auxiliary = config.auxiliary_layers_of(block) if isinstance(config, CategoricalConfig) else 0
        rows.append(BlockCompute(block, layers, auxiliary, below if cascade else 0, own + times * lower))
        below += layers
    return TrainingCompute(tuple(rows), float(whole), batch_size)


def _whole(config: DiffusionBlocksConfig, batch_size: int, checkpointing: bool, batch_settings: dict[str, Any]) -> int:
    """FLOPs of an update of the only block, from blocks of one and two of its layers: each further one costs the same.

    A layer's products depend on its sizes alone, which are those of every other layer.
    """
    if config.num_layers <= 2 or getattr(config, "indivisible", False):
        return _count(config, batch_size, checkpointing, batch_settings)[0][0]
    cuts = [
        recut(config, num_blocks=2, layers_per_block=[n, config.num_layers - n], partition="equal_probability")
        for n in (1, 2)
    ]
    one, two = (_count(cut, batch_size, checkpointing, batch_settings, blocks=[0])[0][0] for cut in cuts)
    return one + (config.num_layers - 1) * (two - one)


def _count(
    config: DiffusionBlocksConfig,
    batch_size: int,
    checkpointing: bool,
    batch_settings: dict[str, Any],
    blocks: Sequence[int] | None = None,
) -> list[tuple[int, int]]:
    """FLOPs of an update of each block, and of the forward pass of the layers below it."""
    objective = default_objective(config)
    with torch.device("meta"):
        model = AutoModel.from_config(config, blocks=blocks)
    set_mode(model, checkpointing, preserve_rng_state=False)
    # Products are linear in the number of samples; two chunks of the loss are recomputed as a hundred are.
    few = few_chunks(model, batch_size, 2, batch_settings)
    batch = {name: value.to("meta") for name, value in model.dummy_batch(few, **batch_settings).items()}
    batch.pop("hidden_states", None)  # what lower blocks give is computed here
    cascade = getattr(config, "context", "independent") == "cascade"
    known: dict[tuple, int] = {}
    result, below = [], 0
    with AnyValue():
        hidden = model.context_of(0, batch[model.main_input_name]) if cascade else None
        for block in model.resident_blocks:
            key = tuple(tuple(p.shape) for _, p in model.block_parameters(block))
            if key not in known:
                given = {"hidden_states": hidden} if cascade and block > 0 else {}
                with _counting() as counter:
                    objective(model, block, batch | given, torch.Generator()).loss.backward()
                known[key] = counter.get_total_flops()
            result.append((known[key] * batch_size // few, below * batch_size // few))
            if cascade and block < config.num_blocks - 1:
                with _counting() as counter, torch.no_grad():
                    hidden = model.clean_block(hidden, block)
                below += counter.get_total_flops()
    return result


@contextlib.contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


__all__ = ["BlockCompute", "TrainingCompute", "training_flops"]
