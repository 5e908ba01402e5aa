"""Blocked DiT: each block is a diffusers transformer of its own layers (`DiTTransformer2DModel`, PixArt, SD3 or Flux).

A block owns its patch embedding, positions and output head (they are small), so a blocked DiT is B small denoisers in
one checkpoint and blocks share nothing (arXiv 2506.14202, section 4.2). The block's modules are diffusers' own; noise
reaches the layers through the timestep conditioning that they have. What differs between the classes stands in the
table of ``transformer_classes``.

Label dropout for classifier-free guidance is drawn once per sample by the objective. Inside diffusers' DiT every layer
and the head embed the label for themselves and would each drop it independently, so it is switched off there.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from ..adapter_checks import check_no_adapter
from ..agreement import hub_name, weights_digest
from ..modeling import BlockedPreTrainedModel
from ..suggest import unknown_name
from .base_config import fields_of
from .base_loading import part_settings
from .dit_config import BlockedDiTConfig, base_config_defaults, config_fields
from .dit_conversion import base_preconditioning, load_base
from .dit_initialization import fill_positions, init_module
from .dit_inputs import (
    check_columns,
    check_images,
    check_labels,
    check_pixels,
    check_training_labels,
    column_of,
    drop_prompts,
    dummy_columns,
)
from .routed_transformer import RoutedTransformer
from .transformer_classes import TRANSFORMER_CLASSES, class_of, cuttable

logger = logging.get_logger(__name__)


class BlockedDiTModel(BlockedPreTrainedModel):
    """A DiT cut into blocks, each a complete small denoiser for its own noise range (arXiv 2506.14202, section 4.2).

    Of the base's class (``config.base_class``) follows what the model is conditioned on: ``class_labels`` for DiT;
    ``encoder_hidden_states`` [batch, length, width] and what else its pipeline passes for PixArt
    (``encoder_attention_mask``), SD3 (``pooled_projections``) and Flux (``pooled_projections``, ``guidance``). In SD3
    and Flux the text flows through the layers beside the image; each block embeds it anew: blocks share nothing.
    Those models sample in diffusers' own pipelines, through ``as_transformer``.

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
    scored_by = "held_out_loss"
    main_input_name = "sample"
    _no_split_modules = [
        "BasicTransformerBlock",
        "PatchEmbed",
        "JointTransformerBlock",
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
    ]

    def make_block(self, block: int) -> ModelMixin:
        config = self.config
        module = config.transformer_class.make_block(config.base_config, self.partition.layers(block))
        for child in module.modules():
            if isinstance(child, LabelEmbedding):
                child.dropout_prob = 0.0  # the null class's row stays; see the module's docstring
        return module

    def run_block(self, block: int, scaled: Tensor, c_noise: Tensor, **conditioning: Tensor) -> Tensor:
        given = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in conditioning.items() if v is not None}
        output = self.config.transformer_class.run(self.block(block), scaled, c_noise, given)
        return output[:, : self.config.in_channels]  # a learned variance is not part of the denoiser

    def as_transformer(self) -> RoutedTransformer:
        """The model as the transformer of a diffusers pipeline, which calls the block that owns each timestep::

            pipe = StableDiffusion3Pipeline.from_pretrained(base)
            pipe.transformer = blocked.as_transformer()

        Its output is the network's own (a velocity or noise), so the pipeline's scheduler is the one that belongs to
        ``config.preconditioning``. With B = 1 images are the base's, bit for bit.
        """
        return RoutedTransformer(self)

    def layer_modules(self, block: int) -> Iterator[nn.Module]:
        module = self.block(block)
        for attribute, parts in self.config.transformer_class.layer_parts.items():
            for layer in getattr(module, attribute):
                for path in parts:
                    part = layer
                    for name in path.split("."):
                        part = getattr(part, name, None)
                    if part is not None and next(part.parameters(), None) is not None:
                        yield part

    def dummy_batch(  # type: ignore[override]  # a family names its settings
        self, batch_size: int, text_length: int | None = None
    ) -> dict[str, Tensor]:
        size, kind = self.config.sample_size, self.config.transformer_class
        batch = {"pixel_values": torch.zeros(batch_size, self.config.in_channels, size, size)}
        if kind.has_labels:
            return batch | {"class_labels": torch.zeros(batch_size, dtype=torch.int64)}
        return batch | dummy_columns(self.config.columns, batch_size, text_length or kind.text_length)

    def conditioning(self, batch: dict[str, Tensor], drop: Tensor | None = None, null: Any = None) -> dict[str, Tensor]:
        """What ``denoise`` takes of a training batch besides the images.

        Args:
            batch: ``class_labels`` [batch], or the columns of the model's class, such as the prompts' embeddings.
            drop: samples [batch], as booleans, whose label or prompt is replaced by none.
            null: the empty prompt's embeddings by column, each of one sample; without it prompts are not dropped.

        Raises:
            ValueError: for embeddings of the empty prompt that do not fit the batch's.
        """
        if self.config.transformer_class.has_labels:
            labels = batch["class_labels"]
            return {"class_labels": labels if drop is None else torch.where(drop, self.config.num_classes, labels)}
        given = {name: batch[name] for name in self.config.columns if name in batch}
        return given if drop is None or not null else drop_prompts(given, drop, null)

    def check_batch(self, batch: dict[str, Tensor]) -> None:
        labelled = self.config.transformer_class.has_labels
        columns = {"class_labels": False} if labelled else {k: c.optional for k, c in self.config.columns.items()}
        names = ["pixel_values", *(name for name, optional in columns.items() if not optional)]
        if any(name not in batch for name in names):
            how = "Load it with load_image_dataset(image_column=…, label_column=…) or rename its columns."
            if not labelled:
                how = "Encode the prompts beforehand, with encode_prompt of the base's pipeline, or rename the columns."
            needed = f"{', '.join(map(repr, names[:-1]))} and {names[-1]!r}"
            raise ValueError(f"a batch holds {sorted(batch)}; the trainer needs {needed}. {how}")
        pixels = column_of(batch, "pixel_values")
        given = {name: column_of(batch, name) for name in columns if name in batch}
        self.check_input(pixels, **given)
        check_pixels(pixels, self.config.in_channels)
        if labelled:
            check_training_labels(given["class_labels"], self.config.num_classes)

    def check_dataset(self, dataset: Any) -> None:
        """Raise a ``ValueError`` for a label out of range anywhere, where labels can be read without the images."""
        labels = getattr(dataset, "labels", None)
        if labels is None and "class_labels" in (getattr(dataset, "column_names", None) or ()):
            labels = dataset.select_columns("class_labels").with_format("torch")[:]["class_labels"]
        if isinstance(labels, Tensor) and labels.ndim == 1 and len(labels):
            check_training_labels(labels, self.config.num_classes)

    def wrong_rows(self, batch: dict[str, Tensor]) -> Tensor:
        """Samples whose label is out of range, besides those that are not finite; see the base class."""
        if not self.config.transformer_class.has_labels:
            return super().wrong_rows({k: v[:, None] if v.ndim == 1 else v for k, v in batch.items()})
        labels = batch["class_labels"]
        return super().wrong_rows(batch) | (labels < 0) | (labels >= self.config.num_classes)

    def check_input(self, z: Tensor, **conditioning: Tensor | None) -> None:
        """Raise a ``ValueError`` for images of another shape than the model's, labels out of range or conditioning of
        another form."""
        config, kind = self.config, self.config.transformer_class
        if kind.has_labels:
            check_images(z, config.in_channels, config.sample_size)
            unknown = sorted(conditioning.keys() - {"class_labels"})
            if unknown:
                raise ValueError(unknown_name("conditioning", unknown[0], ["class_labels"]))
            check_labels(conditioning.get("class_labels"), len(z), config.num_classes)
            return
        patch = config.base_config["patch_size"] * kind.packing
        largest = config.base_config.get("pos_embed_max_size", 0) * patch
        check_images(z, config.in_channels, None, patch, largest or None)
        check_columns(conditioning, len(z), config.columns)

    def _init_weights(self, module: nn.Module) -> None:
        init_module(module)

    # -- conversion ----------------------------------------------------------------------------------------------

    @classmethod
    def from_base(
        cls,
        base: ModelMixin | str | os.PathLike | Mapping[str, Any],
        num_blocks: int | None = None,
        **settings: Any,
    ) -> "BlockedDiTModel":
        """Cut a DiT into blocks.

        Args:
            base: a diffusers ``DiTTransformer2DModel``, ``PixArtTransformer2DModel``, ``SD3Transformer2DModel`` or
                ``FluxTransformer2DModel``, a pipeline of one, the directory or Hub id of either (weights are copied),
                or a mapping with the base's config (weights are new; ``_class_name`` names its class).
            num_blocks: B, default 3.
            **settings: fields of ``BlockedDiTConfig``. Of a pipeline whose scheduler predicts epsilon,
                ``preconditioning="vp_epsilon"`` and the scheduler's ``noise_schedule`` are the default; with a
                flow-matching scheduler, and for SD3 and Flux, ``rectified_flow``; of a bare DiT or PixArt ``edm``, with
                a warning. For a base that is loaded by name also ``dtype``, ``revision``, ``token`` and ``cache_dir``.

        Returns:
            The blocked model in the base's dtype. Every block gets its own layers and a copy of the base's stem and
            head. With B = 1 it computes what the base computes.

        Raises:
            ValueError: if the base's class cannot be cut, or a setting is not allowed.
        """
        loading, settings = part_settings(base, settings)
        if isinstance(base, Mapping):
            return cls(cls.config_from(base, num_blocks, **settings))
        base_model = hub_name(base)
        base, scheduler = load_base(base, **loading)
        kind = TRANSFORMER_CLASSES[type(base).__name__]
        settings = base_preconditioning(settings, scheduler) | {"base_class": kind.name}
        if "preconditioning" not in settings and kind.preconditioning is None:
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
            module = model.block(block)
            part = kind.block_weights(config.base_config, model.partition.layers(block), module, weights)
            module.load_state_dict(part, assign=True)
            fill_positions(module, next(iter(part.values())).device)
        return model.train(base.training)

    @classmethod
    def config_from(
        cls, base_config: Mapping[str, Any], num_blocks: int | None = None, **settings: Any
    ) -> BlockedDiTConfig:
        """The config of a blocked model from the base's config and settings, as in ``from_base``."""
        allowed = config_fields() | fields_of(cls.config_class)
        unknown = [n for n in settings if n not in allowed]
        if unknown:
            raise ValueError(unknown_name("setting", unknown[0], allowed))
        if "base_class" not in settings:
            kind = class_of(base_config)
            if kind is None:
                raise ValueError(f"{base_config['_class_name']} cannot be cut by BlockedDiTModel: give {cuttable()}.")
            settings["base_class"] = kind.name
        kind = TRANSFORMER_CLASSES.get(settings["base_class"])
        if kind is not None and kind.preconditioning is not None:
            settings.setdefault("preconditioning", kind.preconditioning)
        if num_blocks is None:
            num_blocks = len(settings["layers_per_block"]) if settings.get("layers_per_block") else 3
        return cls.config_class(base_config=dict(base_config), num_blocks=num_blocks, **settings)

    def to_base(self, block: int | None = None) -> ModelMixin:
        """Give back a diffusers transformer of the base's class.

        Args:
            block: a block, to get it as a network of its own layers. Not needed for B = 1, where the result is bitwise
                the network that was converted.

        Raises:
            ValueError: for B > 1 without ``block``: every block has a stem and a head of its own and expects noisy
                images, not another block's hidden states, so the blocks do not add up to one network.
        """
        if block is None:
            if self.partition.num_blocks > 1:
                kind = self.config.transformer_class
                name, sample = "DiT", "sample with BlockedDiTPipeline"
                if not kind.has_labels:
                    name = kind.name
                    sample = "give as_transformer() to its diffusers pipeline in the place of the transformer"
                raise ValueError(
                    f"a model of {self.partition.num_blocks} blocks cannot be given back as one {name}: each has its "
                    "own patch embedding and head and expects noisy images, not hidden states. Use to_base(block=b) "
                    f"for one block as a {name} of its own layers, or {sample}."
                )
            block = 0
        source = self.block(block)
        check_no_adapter(self.blocks, "give the base back", [block])
        with torch.device("meta"):
            base = type(source)(**{k: v for k, v in dict(source.config).items() if not k.startswith("_")})
        device = next(source.parameters()).device
        weights = {k: v.detach().clone() for k, v in source.state_dict().items()}
        for key, value in base.state_dict().items():
            if key not in weights:  # of a Flux block, what only later blocks' text would need
                weights[key] = torch.zeros(value.shape, dtype=self.dtype, device=device)
        base.load_state_dict(weights, assign=True)
        fill_positions(base, device)
        return base.train(self.training)


AutoConfig.register("blocked_dit", BlockedDiTConfig)
AutoModel.register(BlockedDiTConfig, BlockedDiTModel)

__all__ = ["BlockedDiTConfig", "BlockedDiTModel", "base_config_defaults", "config_fields"]
