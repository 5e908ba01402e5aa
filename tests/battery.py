"""The families that pass the battery (test_modeling.py, test_battery.py): a family is one entry of `FAMILIES`.

What a check expects of noise levels, blocks and files follows from the entry and its model. A check that cannot apply
to a family is named in the entry, with the reason, and nowhere else; docs/families.md shows them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_diffusionblocks import BlockedForCausalLM, BlockedRecurrentForCausalLM
from hf_diffusionblocks.modeling import BlockedPreTrainedModel
from tiny import IMAGE_SIZE, NUM_CLASSES, TinyImages, perturbed, tiny_dit
from tiny_masked import MASK, blocked_mlm
from tiny_masked import base_config as masked_base
from tiny_prompts import FLUX, PIXART, SD3, TinyPrompts, prompts, tiny_flux, tiny_pixart, tiny_sd3
from tiny_text import TEXT_RECIPE, VOCAB_SIZE, TokenRows, base_config, tokens
from tiny_vit import WIDTH, images, new_vit

BATCH, LENGTH = 4, 12


@dataclass(frozen=True)
class Family:
    """A family of the battery.

    Attributes:
        build: ``build(num_blocks, blocks=None, seed=0)`` gives a tiny model in which nothing is zero-initialised.
        clean: a batch of clean samples; of tokens where they are hidden instead of noised.
        conditioning: what `denoise` takes besides, for that batch.
        mlp: how the name of a layer's MLP ends.
        dataset: to train on.
        num_blocks: B.
        recipe: name of one of its recipes with settings under which a command takes seconds; None if no recipe is of
            this entry.
        shares: whether blocks share a trained table; then a job alone must freeze it (``train_shared="none"``).
        not_applicable: names of checks that cannot apply, with the reason.
    """

    build: Callable[..., BlockedPreTrainedModel]
    clean: Callable[[], Tensor]
    conditioning: Callable[[], dict[str, Any]]
    mlp: str
    dataset: Callable[[], Any]
    num_blocks: int = 3
    recipe: tuple[str, ...] | None = None
    shares: bool = False
    not_applicable: Mapping[str, str] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """The block with the least noise."""
        return self.num_blocks - 1

    def noisy(self, level: float) -> Tensor:
        """The clean batch at a noise level: with noise, or a share of the tokens hidden."""
        clean, generator = self.clean(), torch.Generator().manual_seed(1)
        if clean.is_floating_point():
            return clean + level * torch.randn(clean.shape, generator=generator)
        return clean.masked_fill(torch.rand(clean.shape, generator=generator) < max(level, 0.3), MASK)

    def outside(self, model: BlockedPreTrainedModel) -> tuple[float, float]:
        """A level above a model's noise range and one below it."""
        return 1.25 * model.partition.noise.sigma_max, -0.5


def middle(model: BlockedPreTrainedModel, block: int) -> float:
    """A noise level well inside a block's range: of a linear one the mean, else the geometric mean."""
    low, high = model.partition.range(block)
    return (low + high) / 2 if model.partition.noise.symbol == "mask rate" else (low * high) ** 0.5


def owners_of_levels(model: BlockedPreTrainedModel) -> dict[float, int]:
    """Noise levels, on edges and just below them, with the blocks that own them."""
    edges, last = model.partition.edges, model.partition.num_blocks - 1
    owners = {edges[0]: 0, edges[-1]: last}
    for block in range(1, last + 1):
        owners |= {edges[block]: block - 1, edges[block] * 0.999: block}
    return owners


# -- what the entries are made of --------------------------------------------------------------------------------


def tiny_images() -> Tensor:
    return torch.rand(BATCH, 1, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def tiny_labels() -> dict[str, Tensor]:
    return {"class_labels": torch.tensor([0, 1, NUM_CLASSES - 1, NUM_CLASSES])}


def tiny_vit(num_blocks: int, blocks: Any = None, seed: int = 0) -> BlockedPreTrainedModel:
    return new_vit(num_blocks, blocks=blocks, seed=seed, perturbation=0.1, preset="paper").train()


def tiny_targets() -> Tensor:
    return torch.nn.functional.normalize(torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)


def tiny_pictures() -> dict[str, Any]:
    return {"pixel_values": images(BATCH)}


def tiny_causal_lm(num_blocks: int, blocks: Any = None, seed: int = 0) -> BlockedPreTrainedModel:
    config = BlockedForCausalLM.config_from(base_config(tie_word_embeddings=True), num_blocks, preset="paper")
    return _made(BlockedForCausalLM, config, blocks, seed)


def tiny_masked_lm(num_blocks: int, blocks: Any = None, seed: int = 0) -> BlockedPreTrainedModel:
    kind = type(blocked_mlm(num_blocks=1))
    config = kind.config_from(masked_base(), num_blocks, mask_token_id=MASK, time_conditioning=True)
    return _made(kind, config, blocks, seed)


def tiny_recurrent(num_blocks: int, blocks: Any = None, seed: int = 0) -> BlockedPreTrainedModel:
    base = base_config(num_layers=4, tie_word_embeddings=True)
    config = BlockedRecurrentForCausalLM.config_from(base, num_blocks, preset="paper")
    return _made(BlockedRecurrentForCausalLM, config, blocks, seed)


def _made(kind: type[BlockedPreTrainedModel], config: Any, blocks: Any, seed: int) -> BlockedPreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config, blocks=blocks)
    return perturbed(model, 0.1, seed).train()


def tiny_words() -> dict[str, Tensor]:
    return {"input_ids": tokens(BATCH, LENGTH)}


def next_words() -> Tensor:
    """Unit vectors, one per token."""
    noise = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(noise, dim=-1)


_CATEGORICAL = {
    "test_the_denoiser_is_the_preconditioned_network": "its estimate is a mean of the targets under its logits",
    "test_forward_gives_what_denoise_gives": "its forward is that of transformers' models of its task",
}
_FLOAT32 = {"test_float64_input_gives_a_float64_estimate": "probabilities of tokens are float32"}
_ALONE = {
    name: "it has one block, B = 1"
    for name in (
        "test_one_block_is_a_small_part_of_the_model",
        "test_some_blocks_load_in_order_and_once",
        "test_blocks_start_unequal",
        "test_levels_that_span_blocks_are_refused",
        "test_a_block_that_is_not_loaded_is_refused",
        "test_an_update_of_one_block_leaves_all_others_as_they_are",
    )
}
_NO_RECIPE = {"test_its_commands_plan_train_and_evaluate": "its prompts are encoded beforehand: trained from Python"}
_SMALL_IMAGES = [
    "data.max_samples=60",
    "training.max_steps=2",
    "training.warmup_steps=1",
    "training.per_device_train_batch_size=4",
]

FAMILIES = {
    "dit": Family(
        tiny_dit,
        tiny_images,
        tiny_labels,
        ".ff",
        TinyImages,
        recipe=(
            "digits-dit",
            *_SMALL_IMAGES,
            "model.num_layers=3",
            "evaluation.num_samples=40",
            "evaluation.num_draws=1",
            "evaluation.classifier_epochs=1",
            "sampling.num_inference_steps=3",
        ),
    ),
    "pixart": Family(
        tiny_pixart,
        tiny_images,
        partial(prompts, PIXART),
        ".ff",
        partial(TinyPrompts, PIXART),
        not_applicable=_NO_RECIPE,
    ),
    "sd3": Family(
        tiny_sd3, tiny_images, partial(prompts, SD3), ".ff", partial(TinyPrompts, SD3), not_applicable=_NO_RECIPE
    ),
    "flux": Family(
        tiny_flux, tiny_images, partial(prompts, FLUX), ".ff", partial(TinyPrompts, FLUX), not_applicable=_NO_RECIPE
    ),
    "image_classification": Family(
        tiny_vit,
        tiny_targets,
        tiny_pictures,
        ".mlp",
        TinyImages,
        recipe=("digits-vit", *_SMALL_IMAGES, "model.num_hidden_layers=3"),
        not_applicable=_CATEGORICAL,
    ),
    "causal_lm": Family(
        tiny_causal_lm,
        next_words,
        tiny_words,
        ".mlp",
        TokenRows,
        recipe=("pydoc-llama", *TEXT_RECIPE, "training.max_steps=2"),
        shares=True,
        not_applicable=_CATEGORICAL | _FLOAT32,
    ),
    "masked_lm": Family(
        tiny_masked_lm,
        partial(tokens, BATCH, LENGTH),
        dict,
        ".mlp",
        TokenRows,
        recipe=(
            "pydoc-md4",
            *TEXT_RECIPE,
            "training.max_steps=2",
            "sampling.steps=4",
            "model.num_key_value_heads=2",
            "model.layer_types=[sliding_attention, full_attention, full_attention]",
        ),
        shares=True,
        not_applicable=_CATEGORICAL | _FLOAT32,
    ),
    "recurrent": Family(
        tiny_recurrent,
        next_words,
        tiny_words,
        ".mlp",
        TokenRows,
        num_blocks=1,
        recipe=("pydoc-recurrent", *TEXT_RECIPE, "training.max_steps=2"),
        shares=True,
        not_applicable=_CATEGORICAL | _FLOAT32 | _ALONE,
    ),
}


def parametrize(metafunc: pytest.Metafunc, families: Mapping[str, Family] = FAMILIES) -> None:
    """Run each test that takes a `family` for every one, and for each of its blocks if it takes a `block`.

    What cannot apply to a family is skipped with the reason.
    """
    if "family" not in metafunc.fixturenames:
        return
    by_block, cases = "block" in metafunc.fixturenames, []
    for name, family in families.items():
        reason = family.not_applicable.get(metafunc.function.__name__)
        marks = [pytest.mark.skip(reason)] if reason else []
        for block in range(family.num_blocks) if by_block else (None,):
            values = (family, block) if by_block else (family,)
            cases.append(pytest.param(*values, id=name if block is None else f"{name}-{block}", marks=marks))
    metafunc.parametrize("family, block" if by_block else "family", cases)


assert VOCAB_SIZE == MASK + 1  # the masked models' tokens are those of TokenRows
