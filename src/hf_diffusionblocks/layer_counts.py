"""How many layers each block holds (arXiv 2506.14202, section 3.1: equally many); which ones, ``partition`` says."""

from collections.abc import Sequence


def spread_layers(num_blocks: int, num_layers: int, layers_per_block: Sequence[int] | None = None) -> tuple[int, ...]:
    """Layers of each block: those that are given, or equally many, the first blocks with one more of a remainder.

    Args:
        num_blocks: B, between 1 and ``num_layers``.
        num_layers: L.
        layers_per_block: numbers that sum to L.

    Raises:
        ValueError: for numbers that do not fit each other.

    Example:
        >>> spread_layers(3, 8)
        (3, 3, 2)
    """
    for name, value in (("num_blocks", num_blocks), ("num_layers", num_layers)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    if num_blocks > num_layers:
        raise ValueError(
            f"num_blocks={num_blocks} is more than the {num_layers} layers of the model: "
            f"use between 1 and {num_layers} blocks."
        )
    if layers_per_block is None:
        whole, rest = divmod(num_layers, num_blocks)
        return tuple(whole + (b < rest) for b in range(num_blocks))
    layers = tuple(layers_per_block)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in layers)
    if not whole or len(layers) != num_blocks or sum(layers) != num_layers:
        raise ValueError(
            f"layers_per_block={list(layers)} must name {num_blocks} numbers that sum to the {num_layers} layers."
        )
    return layers


def balanced_layers(num_layers: int, extra: Sequence[int]) -> tuple[int, ...] | None:
    """Layers per block such that what each block holds in training is even.

    A block that trains with auxiliary layers holds them too, so it gets fewer of the model's own; a remainder goes to
    the last blocks, whose loss is the model's.

    Args:
        num_layers: L.
        extra: number of auxiliary layers of each block.

    Returns:
        Layers of each block, or None if a block would be left without one.

    Example:
        >>> balanced_layers(6, (1, 1, 0))
        (1, 2, 3)
    """
    whole, rest = divmod(num_layers + sum(extra), len(extra))
    held = [whole + (b >= len(extra) - rest) for b in range(len(extra))]
    layers = tuple(h - e for h, e in zip(held, extra, strict=True))
    return layers if min(layers) > 0 else None
