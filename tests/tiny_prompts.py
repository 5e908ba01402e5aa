"""Tiny models of prompts: PixArt, SD3 and Flux of diffusers, whole and in blocks, and what they are conditioned on."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, ModelMixin, PixArtTransformer2DModel, SD3Transformer2DModel
from torch import Tensor

from hf_diffusionblocks.families.dit import BlockedDiTConfig, BlockedDiTModel
from hf_diffusionblocks.families.transformer_classes import TRANSFORMER_CLASSES
from tiny import IMAGE_SIZE, perturbed

BATCH, LENGTH, WIDTH, POOLED = 4, 3, 12, 10
PIXART, SD3, FLUX = "PixArtTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"

# Width 16 (2 heads of 8), six layers, images of 8 x 8 x 1 (x 2 for PixArt, whose pipeline wants a learned variance).
CONFIGS: dict[str, dict[str, Any]] = {
    PIXART: {
        "num_layers": 6,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 1,
        "out_channels": 2,
        "sample_size": IMAGE_SIZE,
        "cross_attention_dim": 16,
        "caption_channels": WIDTH,
    },
    SD3: {
        "num_layers": 6,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 1,
        "out_channels": 1,
        "sample_size": IMAGE_SIZE,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": 16,
        "pooled_projection_dim": POOLED,
        "pos_embed_max_size": 8,
        "dual_attention_layers": [0, 1, 2],
        "qk_norm": "rms_norm",
    },
    FLUX: {
        "num_layers": 4,
        "num_single_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": POOLED,
        "guidance_embeds": True,
        "axes_dims_rope": [2, 2, 4],
    },
}
CLASSES: dict[str, type[ModelMixin]] = {
    PIXART: PixArtTransformer2DModel,
    SD3: SD3Transformer2DModel,
    FLUX: FluxTransformer2DModel,
}


def base_of(name: str, seed: int = 0, **settings: Any) -> ModelMixin:
    """A small transformer of diffusers' own, nothing zero-initialised."""
    torch.manual_seed(seed)
    return perturbed(CLASSES[name](**(CONFIGS[name] | settings)), seed=seed).eval()


def tiny_prompted(
    name: str, num_blocks: int = 3, *, blocks: Sequence[int] | None = None, seed: int = 0, **settings: Any
) -> BlockedDiTModel:
    """A tiny blocked model of a class in which nothing is zero-initialised."""
    base = CONFIGS[name] | settings.pop("base_config", {})
    if name == FLUX:
        settings.setdefault("default_sample_size", IMAGE_SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = BlockedDiTConfig(base_class=name, base_config=base, num_blocks=num_blocks, **settings)
        model = BlockedDiTModel(config, blocks=blocks)
    return perturbed(model, 0.1, seed)


tiny_pixart, tiny_sd3, tiny_flux = (partial(tiny_prompted, name) for name in (PIXART, SD3, FLUX))


def prompts(name: str, batch: int = BATCH, seed: int = 3) -> dict[str, Tensor]:
    """What a tiny model of a class is conditioned on: embeddings of prompts that are all different."""
    generator = torch.Generator().manual_seed(seed)
    columns = TRANSFORMER_CLASSES[name].columns(TRANSFORMER_CLASSES[name].defaults | CONFIGS[name])
    given = {}
    for column, (shape, integer, _) in columns.items():
        size = (batch, *(LENGTH if n is None else n for n in shape))
        given[column] = torch.randn(size, generator=generator)
        if integer:  # a mask: the last words of some prompts are padding
            given[column] = torch.ones(size, dtype=torch.int64)
            given[column][1:, -1] = 0
    return given


class TinyPrompts:
    """Images of 8 x 8 with embeddings of prompts; `ds[list]` gives a batch, as `datasets` does."""

    def __init__(self, name: str, num_samples: int = 16, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(num_samples, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator) * 2 - 1
        self.columns = {"pixel_values": images} | prompts(name, num_samples)

    def __len__(self) -> int:
        return len(self.columns["pixel_values"])

    def __getitem__(self, indices: int | slice | Sequence[int]) -> dict[str, Tensor]:
        return {name: value[indices] for name, value in self.columns.items()}
