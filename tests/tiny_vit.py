"""Tiny image classifiers for the tests: one of each kind of base that can be cut."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig

from hf_diffusionblocks.families.image_classification import BlockedForImageClassification
from hf_diffusionblocks.families.image_classification_block import classifier_class
from tiny import IMAGE_SIZE, NUM_CLASSES, perturbed

WIDTH = 16
SHAPE = {
    "hidden_size": WIDTH,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": 2,
    "num_channels": 1,
    "num_labels": NUM_CLASSES,
}
POSITIONS = {"vit": 17, "deit": 18, "dinov2": 17, "dinov2_with_registers": 21}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit": {"model_type": "vit", "intermediate_size": 24},
    "deit": {"model_type": "deit", "intermediate_size": 24},
    "dinov2": {"model_type": "dinov2", "mlp_ratio": 2, "use_swiglu_ffn": True},
    "dinov2_with_registers": {"model_type": "dinov2_with_registers", "mlp_ratio": 2, "num_register_tokens": 4},
}
# DINOv2 needs layers as transformers builds them since 5.18; for older ones there is an error that says so.
_OLD = Version(transformers.__version__) < Version("5.18")
_NEEDS_NEW = pytest.mark.skipif(_OLD, reason=f"DINOv2 needs transformers 5.18; this is {transformers.__version__}")
EACH_ARCHITECTURE = pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=_NEEDS_NEW if "dino" in name else ()) for name in ARCHITECTURES]
)


def vit_config(architecture: str = "vit", num_layers: int = 6, **settings: Any) -> dict[str, Any]:
    """The config of a classifier of width 16 with 6 layers for images of 8 x 8 x 1 in 10 classes, as a mapping."""
    return SHAPE | ARCHITECTURES[architecture] | {"num_hidden_layers": num_layers} | settings


def base_vit(architecture: str = "vit", num_layers: int = 6, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A transformers classifier with random weights; norms and biases are random too."""
    config = AutoConfig.for_model(**vit_config(architecture, num_layers, **settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = classifier_class(config)(config)
    return perturbed(model, 0.2, seed).eval()


def new_vit(
    num_blocks: int = 3,
    *,
    architecture: str = "vit",
    blocks: Sequence[int] | None = None,
    seed: int = 0,
    perturbation: float = 0.0,
    base: dict[str, Any] | None = None,
    **settings: Any,
) -> BlockedForImageClassification:
    """A blocked classifier as made from a config; with a perturbation, nothing is zero any more."""
    kind = BlockedForImageClassification
    config = kind.config_from(vit_config(architecture, **(base or {})), num_blocks, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config, blocks=blocks)
    return perturbed(model, perturbation, seed) if perturbation else model


def blocked_vit(
    num_blocks: int = 3, *, architecture: str = "vit", seed: int = 0, perturbation: float = 0.1, **settings: Any
) -> BlockedForImageClassification:
    """A blocked classifier cut from :func:`base_vit`, in which nothing is zero-initialised any more."""
    model = BlockedForImageClassification.from_base(base_vit(architecture, seed=seed), num_blocks, **settings)
    return perturbed(model, perturbation, seed).eval()


def images(batch: int = 4, seed: int = 0, channels: int = 1) -> Tensor:
    """Noise in [-1, 1], [batch, channels, 8, 8]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, channels, IMAGE_SIZE, IMAGE_SIZE, generator=generator) * 2 - 1
