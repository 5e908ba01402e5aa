"""Whether blocks pay, for images: what ``diffusionblocks plan`` says of DiT and ViT models.

As for text (``advice``), the rival is the network that needs the memory of one block and trains for the same compute.
How far it is from saturated is measured by the patches that it reads per parameter of its layers. What was measured
stands in ``MEASURED``, with the study that it is from; nothing is said beyond it.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..baselines.end_to_end import resolve_method
from ..configuration import DiffusionBlocksConfig
from ..families.categorical_config import CategoricalConfig
from ..memory import end_to_end_config
from ..memory_alternatives import layers_of
from ..memory_fake_steps import recut
from ..recipes import Recipe
from .advice import SmallModel, advice_values, small_model
from .planning import Plan, compute_lines, compute_values, planned_compute, planned_memory


@dataclass(frozen=True)
class Measured:
    """Comparisons at equal memory and compute, by the patches that the small network read per parameter of its layers.

    Attributes:
        small_wins: up to here the small network was ahead.
        blocks_win: from here on the blocks were; None if no run was long enough to tell.
        where: the data, the network and the file with the figures.
    """

    small_wins: float
    blocks_win: float | None
    where: str


MEASURED = {
    "dit": Measured(27, 269, "Fashion-MNIST, a DiT of width 32, three seeds; docs/experiments.md"),
    "image_classification": Measured(
        51, None, "Fashion-MNIST, ViTs of width 32 and 64; docs/experiments.md and docs/experiments-classifiers.md"
    ),
}


def image_advice(recipe: Recipe, config: DiffusionBlocksConfig) -> tuple[list[str], dict[str, Any]]:
    """Lines on a run's compute and on whether blocks pay, and the figures behind them, JSON-ready.

    Args:
        recipe: of the run, with its method resolved.
        config: of its model.
    """
    cost = planned_compute(config, recipe)
    values, small = compute_values(cost), None
    if config.num_blocks > 1 and not _is_pretrained(recipe, config) and not getattr(config, "indivisible", False):
        layers = min(config.num_layers, max(_held_layers(config)))
        plain = _shallow(recipe, config, layers)
        read = _patches_read(recipe, config)
        with torch.device("meta"):
            model = recipe.kind.model_class(plain)
        layer = sum(p.numel() for p in layers_of(model.block(0))[0].parameters())
        small = small_model(layer, cost, planned_compute(plain, recipe), layers, read)
        values = dict(advice_values(cost, small))
        values["small_model_patches_per_parameter"] = values.pop("small_model_tokens_per_parameter")
    said = _advice(recipe, config, small)
    return [*compute_lines(cost), "", said], {"compute": values, "advice": said}


def plan_images(recipe: Recipe) -> Plan:
    """What ``diffusionblocks plan`` prints of a model of images."""
    recipe = resolve_method(recipe)
    config = recipe.config()
    memory = planned_memory(config, recipe)
    with torch.device("meta"):
        model = recipe.kind.model_class(config)
    return Plan(recipe, model, memory, [], *image_advice(recipe, config))


def _is_pretrained(recipe: Recipe, config: DiffusionBlocksConfig) -> bool:
    return "base" in recipe.model or bool(getattr(config, "pretrained", False))


def _held_layers(config: DiffusionBlocksConfig) -> list[int]:
    """Layers that each block holds in training."""
    if isinstance(config, CategoricalConfig):
        return [n + config.auxiliary_layers_of(b) for b, n in enumerate(config.layers_per_block)]
    return list(config.layers_per_block)


def _shallow(recipe: Recipe, config: DiffusionBlocksConfig, layers: int) -> DiffusionBlocksConfig:
    """The ordinary network of fewer layers."""
    plain = end_to_end_config(config)
    return recut(plain, base_config=plain.base_config | {recipe.kind.layers_key: layers})


def patches_per_image(config: DiffusionBlocksConfig) -> int:
    """Patches that an image, or its latent, is cut into."""
    size = config.base_config.get("patch_size", 1)
    across = (size, size) if isinstance(size, int) else size
    given = getattr(config, "image_size", None) or (config.sample_size, config.sample_size)
    packing = getattr(getattr(config, "transformer_class", None), "packing", 1)
    return (given[0] // (across[0] * packing)) * (given[1] // (across[1] * packing))


def _patches_read(recipe: Recipe, config: DiffusionBlocksConfig) -> float | None:
    """Patches that each block reads in the whole run; None if its length is not known before the data are."""
    args, rows = recipe.training_arguments(), recipe.data.max_samples
    if args.max_steps <= 0 and not rows:
        return None
    updates = args.updates_per_block(rows or 1)
    images = updates * args.per_device_train_batch_size * args.gradient_accumulation_steps
    return float(images * patches_per_image(config))


def _advice(recipe: Recipe, config: DiffusionBlocksConfig, small: SmallModel | None) -> str:
    """One paragraph on whether blocks pay here."""
    if _is_pretrained(recipe, config):
        return (
            "Do blocks pay here? A pretrained model cannot be made smaller: blocks pay where training all of it does "
            "not fit in memory. Where it does, train it whole."
        )
    if config.num_blocks == 1:
        return "Do blocks pay here? There is one block: this is end-to-end training."
    if small is None:
        return (
            "Do blocks pay here? No smaller network was compared with blocks of this kind of transformer. Where all of "
            "it fits in memory, train it whole."
        )
    measured = None if getattr(config, "columns", None) else MEASURED.get(recipe.family)
    return (
        f"Do blocks pay here? In the memory of one block, a network of {small.layers} layers can be trained end to "
        f"end, and for the compute of the blocks it gets {small.updates:.2f} times their updates. "
        f"{_verdict(small, measured)} Where all {config.num_layers} layers fit in memory, train them whole."
    )


def _verdict(small: SmallModel, measured: Measured | None) -> str:
    try_both = "train both for a while (--method shallow --match compute) and look."
    if measured is None:
        return f"Which is better was not measured for this kind of transformer: {try_both}"
    won = f"up to {measured.small_wins:g} the small network was ahead"
    if measured.blocks_win is not None:
        won += f", from {measured.blocks_win:g} on the blocks were"
    known = f"In our runs ({measured.where}) {won}"
    per = small.tokens_per_parameter
    if per is None:
        return (
            "Whether it saturates depends on how long that is, in patches per parameter of its layers: set "
            f"training.max_steps to see. {known}."
        )
    read = f"It would read {small.tokens:.3g} patches, {per:.3g} per parameter of its layers."
    if per <= measured.small_wins:
        return (
            f"{read} {known}: it is most likely better than the blocks here too. Train it instead (--method shallow "
            "--match compute), or train much longer."
        )
    if measured.blocks_win is not None and per >= measured.blocks_win:
        return f"{read} {known}: it is then saturated, and more layers, trained as blocks, are most likely better."
    if measured.blocks_win is None:
        return f"{read} {known}, and longer ones were not made: {try_both}"
    return f"{read} {known}, and they met between: {try_both}"


__all__ = ["MEASURED", "Measured", "image_advice", "patches_per_image"]
