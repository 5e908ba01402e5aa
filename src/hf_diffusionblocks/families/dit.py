"""Blocked DiT: each block is a diffusers `DiTTransformer2DModel` of its own layers.

A block owns its patch embedding, positions and output head (they are small), so a blocked DiT is B small denoisers in
one checkpoint and blocks share nothing (arXiv 2506.14202, section 4.2). The block's modules are diffusers' own; noise
reaches the layers through the timestep conditioning that they have.

Label dropout for classifier-free guidance is drawn once per sample by the objective. Inside diffusers' DiT every layer
and the head embed the label for themselves and would each drop it independently, so it is switched off there.
"""

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import (
    LabelEmbedding,
    PatchEmbed,
    TimestepEmbedding,
    get_2d_sincos_pos_embed,
)
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers import initialization as init
from transformers.utils import logging

from ..agreement import hub_name, weights_digest
from ..config_checks import MAX_POSITIONS, check_sizes
from ..configuration import DiffusionBlocksConfig
from ..modeling import BlockedPreTrainedModel
from ..suggest import unknown_name
from .base_loading import part_settings
from .dit_conversion import base_preconditioning, load_base

logger = logging.get_logger(__name__)

_SIZES = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "sample_size",
    "patch_size",
    "num_embeds_ada_norm",
)
# What the configs of older checkpoints (of `Transformer2DModel`, DiT's first class) hold besides, with the values that
# mean "not used". Other values describe a network that is not a DiT.
_LEGACY_SETTINGS = {
    "cross_attention_dim": None,
    "num_vector_embeds": None,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "double_self_attention": False,
    "attention_type": "default",
    "caption_channels": None,
    "interpolation_scale": None,
    "use_additional_conditions": None,
}


class BlockedDiTConfig(DiffusionBlocksConfig):
    """Config of ``BlockedDiTModel``: ``DiffusionBlocksConfig`` and

    Args:
        label_dropout: share of training samples whose label is replaced by the null class (classifier-free guidance).
        id2label: names of the classes.

    Example:
        >>> config = BlockedDiTConfig(base_config={"num_layers": 6, "sample_size": 8, "in_channels": 1}, num_blocks=3)
        >>> config.layers_per_block
        [2, 2, 2]
    """

    model_type = "blocked_dit"

    label_dropout: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout={self.label_dropout} must lie in [0, 1); DiT uses 0.1.")
        base = self.base_config
        if base["sample_size"] % base["patch_size"]:
            raise ValueError(f"sample_size={base['sample_size']} is not a multiple of patch_size={base['patch_size']}.")
        if (base["num_attention_heads"] * base["attention_head_dim"]) % 4:
            raise ValueError(
                f"the width num_attention_heads * attention_head_dim = "
                f"{base['num_attention_heads'] * base['attention_head_dim']} must be a multiple of 4 (2-D positions)."
            )
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"out_channels={self.out_channels} must be in_channels={self.in_channels}, or twice that for a "
                "learned variance."
            )

    def complete_base_config(self, base_config: dict) -> dict:
        defaults = base_config_defaults()
        base_config = {
            k: v
            for k, v in base_config.items()
            if not k.startswith("_") and not (k in _LEGACY_SETTINGS and v in (_LEGACY_SETTINGS[k], None, False))
        }
        for name in base_config:
            if name not in defaults:
                raise ValueError(unknown_name("DiT setting", name, defaults))
        base = defaults | base_config
        check_sizes(base, _SIZES)
        check_sizes(base, ("out_channels",), optional=True)
        if (base["sample_size"] // base["patch_size"]) ** 2 > MAX_POSITIONS:
            raise ValueError(
                f"sample_size={base['sample_size']} with patch_size={base['patch_size']} gives more than "
                f"{MAX_POSITIONS} positions."
            )
        return base

    @property
    def in_channels(self) -> int:
        """Channels of images or latents."""
        return self.base_config["in_channels"]

    @property
    def out_channels(self) -> int:
        """Channels of the network's output: ``in_channels``, or twice that with a learned variance."""
        return self.base_config["out_channels"] or self.in_channels

    @property
    def sample_size(self) -> int:
        """Height and width of images or latents, in pixels."""
        return self.base_config["sample_size"]

    @property
    def num_classes(self) -> int:
        """Number of classes without the null class; also the null class's index."""
        return self.base_config["num_embeds_ada_norm"]


@lru_cache(maxsize=1)
def base_config_defaults() -> dict:
    """Settings of diffusers' DiT and their defaults."""
    import inspect

    signature = inspect.signature(DiTTransformer2DModel.__init__)
    return {n: p.default for n, p in signature.parameters.items() if n != "self"}


class BlockedDiTModel(BlockedPreTrainedModel):
    """A DiT cut into blocks, each a complete small denoiser for its own noise range (arXiv 2506.14202, section 4.2).

    Example:
        >>> config = BlockedDiTConfig(
        ...     base_config={"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8,
        ...                  "in_channels": 1, "patch_size": 2, "num_embeds_ada_norm": 10},
        ...     num_blocks=3,
        ... )
        >>> model = BlockedDiTModel(config)
        >>> z = 80.0 * torch.randn(4, 1, 8, 8)
        >>> model.denoise(z, 80.0, class_labels=torch.arange(4)).shape
        torch.Size([4, 1, 8, 8])
    """

    config_class = BlockedDiTConfig
    main_input_name = "sample"
    _no_split_modules = ["BasicTransformerBlock", "PatchEmbed"]

    def make_block(self, block: int) -> DiTTransformer2DModel:
        settings = self.config.base_config | {"num_layers": len(self.partition.layers(block))}
        module = DiTTransformer2DModel(**settings)
        for child in module.modules():
            if isinstance(child, LabelEmbedding):
                child.dropout_prob = 0.0  # the null class's row stays; see the module's docstring
        return module

    def run_block(self, block: int, scaled: Tensor, c_noise: Tensor, class_labels: Tensor) -> Tensor:
        output = self.block(block)(scaled, timestep=c_noise, class_labels=class_labels).sample
        return output[:, : self.config.in_channels]  # a learned variance is not part of the denoiser

    def layer_modules(self, block: int) -> Iterator[nn.Module]:
        for layer in self.block(block).transformer_blocks:
            yield from (layer.norm1.linear, layer.attn1, layer.ff)  # the head reads the first one's norm1.emb

    def dummy_batch(self, batch_size: int) -> dict[str, Tensor]:
        size = self.config.sample_size
        return {
            "pixel_values": torch.zeros(batch_size, self.config.in_channels, size, size),
            "class_labels": torch.zeros(batch_size, dtype=torch.int64),
        }

    def check_batch(self, batch: dict[str, Tensor]) -> None:
        if "pixel_values" not in batch or "class_labels" not in batch:
            raise ValueError(
                f"a batch holds {sorted(batch)}; the trainer needs 'pixel_values' and 'class_labels'. "
                "Load it with load_image_dataset(image_column=…, label_column=…) or rename its columns."
            )
        pixels, labels = (_as_tensor(batch[name], name) for name in ("pixel_values", "class_labels"))
        self.check_input(pixels, class_labels=labels)
        if not pixels.is_floating_point():
            raise ValueError(
                f"pixel_values are {pixels.dtype}; the model learns from floating point values: scale pixels of 0 to "
                "255 to [-1, 1] with pixel_values.float() / 127.5 - 1."
            )
        largest = float(pixels.abs().max()) if len(pixels) else 0.0
        if self.config.in_channels in (1, 3) and 16 < largest < float("inf"):
            raise ValueError(
                f"pixel_values reach {largest:g}; pixels must lie in [-1, 1]: scale those of 0 to 255 with "
                "pixel_values / 127.5 - 1."
            )
        self._check_labels(labels)

    def check_dataset(self, dataset: Any) -> None:
        """Raise a ``ValueError`` for a label out of range anywhere, where labels can be read without the images."""
        labels = getattr(dataset, "labels", None)
        if labels is None and "class_labels" in (getattr(dataset, "column_names", None) or ()):
            labels = dataset.select_columns("class_labels").with_format("torch")[:]["class_labels"]
        if isinstance(labels, Tensor) and labels.ndim == 1 and len(labels):
            self._check_labels(labels)

    def wrong_rows(self, batch: dict[str, Tensor]) -> Tensor:
        """Samples whose label is out of range, besides those that are not finite; see the base class."""
        labels = batch["class_labels"]
        return super().wrong_rows(batch) | (labels < 0) | (labels >= self.config.num_classes)

    def _check_labels(self, labels: Tensor) -> None:
        """The null class is drawn by label dropout; data must not have it."""
        wrong = (labels < 0) | (labels >= self.config.num_classes)
        if len(labels) and bool(wrong.any()):
            row = int(wrong.int().argmax())
            raise ValueError(
                f"class_labels run from {int(labels.min())} to {int(labels.max())} (row {row} is the first out of "
                f"range); data of this model have labels of 0 to {self.config.num_classes - 1}. Correct the labels, or "
                "set num_embeds_ada_norm (the number of classes) of the model."
            )

    def check_input(self, z: Tensor, class_labels: Tensor | None = None) -> None:
        """Raise a ``ValueError`` for images of another shape than the model's or labels out of range."""
        wanted = (self.config.in_channels, self.config.sample_size, self.config.sample_size)
        if not isinstance(z, Tensor):
            raise ValueError(
                f"the input is of type {type(z).__name__}: give a tensor [batch, channels, height, width]."
            )
        if z.ndim != 4 or tuple(z.shape[1:]) != wanted:
            raise ValueError(
                f"the input has shape {list(z.shape)}; this model takes [batch, {', '.join(map(str, wanted))}] "
                "(channels, height, width). Resize or convert the images, or change sample_size / in_channels."
            )
        if class_labels is None:
            raise ValueError(f"class_labels is missing: give one label of 0 to {self.config.num_classes} per sample.")
        if not isinstance(class_labels, Tensor):
            raise ValueError(f"class_labels is of type {type(class_labels).__name__}: give a tensor [{len(z)}].")
        if class_labels.shape != z.shape[:1] or class_labels.is_floating_point():
            raise ValueError(
                f"class_labels has shape {list(class_labels.shape)} and dtype {class_labels.dtype}: "
                f"give whole numbers of shape [{len(z)}]."
            )
        if len(z) and not (0 <= int(class_labels.min()) and int(class_labels.max()) <= self.config.num_classes):
            raise ValueError(
                f"class_labels run from {int(class_labels.min())} to {int(class_labels.max())}; allowed are 0 to "
                f"{self.config.num_classes - 1}, and {self.config.num_classes} for no class."
            )

    def _init_weights(self, module: nn.Module) -> None:
        # DiT (arXiv 2212.09748), section 3.2, adaLN-Zero: modulation and output start at zero.
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, TimestepEmbedding):
            init.normal_(module.linear_1.weight, std=0.02)
            init.normal_(module.linear_2.weight, std=0.02)
        elif isinstance(module, AdaLayerNormZero):
            init.zeros_(module.linear.weight)
            init.zeros_(module.linear.bias)
        elif isinstance(module, PatchEmbed):
            if not getattr(module.proj.weight, "_is_hf_initialized", False):
                flat = torch.empty(module.proj.weight.shape[0], module.proj.weight[0].numel())
                init.xavier_uniform_(flat)
                module.proj.weight.copy_(flat.view_as(module.proj.weight))
            init.zeros_(module.proj.bias)
            _set_positions(module)
        elif isinstance(module, DiTTransformer2DModel):
            for head in (module.proj_out_1, module.proj_out_2):
                init.zeros_(head.weight)
                init.zeros_(head.bias)

    # -- conversion ----------------------------------------------------------------------------------------------

    @classmethod
    def from_base(
        cls,
        base: DiTTransformer2DModel | str | os.PathLike | Mapping[str, Any],
        num_blocks: int | None = None,
        **settings: Any,
    ) -> "BlockedDiTModel":
        """Cut a DiT into blocks.

        Args:
            base: a diffusers ``DiTTransformer2DModel``, a ``DiTPipeline``, the directory or Hub id of either (weights
                are copied), or a mapping with the base's config (weights are new).
            num_blocks: B, default 3.
            **settings: fields of ``BlockedDiTConfig``. Of a pipeline whose scheduler predicts epsilon,
                ``preconditioning="vp_epsilon"`` and the scheduler's ``noise_schedule`` are the default; of a bare DiT,
                ``edm``, with a warning. For a base that is loaded by name also ``dtype``, ``revision``, ``token`` and
                ``cache_dir``.

        Returns:
            The blocked model in the base's dtype. Every block gets its own layers and a copy of the base's stem and
            head. With B = 1 it computes what the base computes.

        Raises:
            ValueError: if the base is not a DiT, or a setting is not allowed.
        """
        loading, settings = part_settings(base, settings)
        if isinstance(base, Mapping):
            return cls(cls.config_from(base, num_blocks, **settings))
        base_model = hub_name(base)
        base, scheduler = load_base(base, **loading)
        settings = base_preconditioning(settings, scheduler)
        if "preconditioning" not in settings:
            logger.warning_once(
                "this DiT came without a scheduler, so how it was trained is unknown: preconditioning='edm' is taken, "
                "under which a network that predicts epsilon has to be trained anew. For such a one convert its "
                "DiTPipeline, or give preconditioning='vp_epsilon' and noise_schedule."
            )
        config = cls.config_from(dict(base.config), num_blocks, **settings)
        with torch.device("meta"):
            model = cls(config)
        weights = base.state_dict()
        config.base_model, config.base_revision = base_model, weights_digest(weights)
        for block in model.resident_blocks:
            part = {}
            for key in model.block(block).state_dict():
                source = key
                if key.startswith("transformer_blocks."):
                    _, i, rest = key.split(".", 2)
                    source = f"transformer_blocks.{model.partition.layers(block)[int(i)]}.{rest}"
                part[key] = weights[source].detach().clone()
            model.block(block).load_state_dict(part, assign=True)
            for module in model.block(block).modules():
                if isinstance(module, PatchEmbed):
                    _set_positions(module, weights["proj_out_1.weight"].device)
        return model.train(base.training)

    @classmethod
    def config_from(
        cls, base_config: Mapping[str, Any], num_blocks: int | None = None, **settings: Any
    ) -> BlockedDiTConfig:
        """The config of a blocked model from the base's config and settings, as in ``from_base``."""
        unknown = [n for n in settings if n not in config_fields()]
        if unknown:
            raise ValueError(unknown_name("setting", unknown[0], config_fields()))
        if num_blocks is None:
            num_blocks = len(settings["layers_per_block"]) if settings.get("layers_per_block") else 3
        return BlockedDiTConfig(base_config=dict(base_config), num_blocks=num_blocks, **settings)

    def to_base(self, block: int | None = None) -> DiTTransformer2DModel:
        """Give back a diffusers ``DiTTransformer2DModel``.

        Args:
            block: a block, to get it as a DiT of its own layers. Not needed for B = 1, where the result is bitwise
                the network that was converted.

        Raises:
            ValueError: for B > 1 without ``block``: every block has a stem and a head of its own and expects noisy
                images, not another block's hidden states, so the blocks do not add up to one DiT.
        """
        if block is None:
            if self.partition.num_blocks > 1:
                raise ValueError(
                    f"a model of {self.partition.num_blocks} blocks cannot be given back as one DiT: each has its "
                    "own patch embedding and head and expects noisy images, not hidden states. Use to_base(block=b) "
                    "for one block as a DiT of its own layers, or sample with BlockedDiTPipeline."
                )
            block = 0
        source = self.block(block)
        with torch.device("meta"):
            base = DiTTransformer2DModel(**dict(source.config))
        base.load_state_dict({k: v.detach().clone() for k, v in source.state_dict().items()}, assign=True)
        _set_positions(base.pos_embed, source.proj_out_1.weight.device)
        return base.train(self.training)


def _as_tensor(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} of a batch is of type {type(value).__name__}, not a tensor: a `datasets.Dataset` gives tensors "
            'after dataset.with_format("torch").'
        )
    return value


def _set_positions(module: PatchEmbed, device: torch.device | str | None = None) -> None:
    # A non-persistent buffer, which loading leaves without content.
    positions = get_2d_sincos_pos_embed(
        module.pos_embed.shape[-1],
        int(module.pos_embed.shape[1] ** 0.5),
        base_size=module.base_size,
        interpolation_scale=module.interpolation_scale,
        output_type="pt",
        device=torch.device("cpu"),
    )
    old = module.pos_embed
    if device is None:
        device = old.device
    if torch.device(device).type != "meta":
        module.pos_embed = positions.float().unsqueeze(0).to(device, old.dtype)


@lru_cache(maxsize=1)
def config_fields() -> frozenset[str]:
    """Settings of a blocked DiT besides its base and number of blocks."""
    fields = set(BlockedDiTConfig.__annotations__) | set(DiffusionBlocksConfig.__annotations__)
    return frozenset(fields - {"base_config", "num_blocks"} | {"id2label", "label2id"})


AutoConfig.register("blocked_dit", BlockedDiTConfig)
AutoModel.register(BlockedDiTConfig, BlockedDiTModel)

__all__ = ["BlockedDiTConfig", "BlockedDiTModel"]
