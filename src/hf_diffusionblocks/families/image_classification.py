"""Blocked image classifiers: ViT, DeiT, DINOv2 with a head (arXiv 2506.14202, section 4).

x is the image, y the embedding of its label: a row e_k of a table of fixed random unit vectors. They are not trained,
so blocks share nothing that changes, and each block may be trained by a job of its own. (The paper normalises a label's
embedding; a table that is trained would have to be frozen for such jobs.)

Each block holds transformers' own layers, norm and head; blocks that read the image have embeddings of their own.

Three readouts, from the [CLS] features f to the distribution of the label:

``clean``
    ``softmax(f(x))``: no noisy label at all. z = y + sigma eps says nothing about the image, so the best ``f`` of the
    exact form is ``log p(k | x)`` at every noise level: ordinary cross-entropy.
``exact``
    ``softmax(f(x, z, sigma) + <z, e_k> / sigma^2)``: the likelihood of z under label k is known in closed form.
``edm``
    the paper's: ``softmax(f(c_in z, c_noise, x))``, cross-entropy on [CLS]; the noisy label is one more token, and
    AdaLN modulation by the noise level, zero at the start, conditions all tokens.

Two contexts: ``independent`` (the paper's: each block reads the image through its own layers only) and ``cascade``
(block b reads what block b - 1 made of it, without gradient).

A prediction reads f of the last block (``clean``), or walks down the noise levels: D = sum_k p_k e_k,
z <- (sigma' / sigma) z + (1 - sigma' / sigma) D, and the last level's p is the answer, averaged over noise draws.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput

from ..conditioning import Modulation
from .base_loading import convert
from .categorical import BlockedCategoricalModel
from .categorical_config import family_settings
from .image_checks import check_image_batch, check_images, check_keywords, check_labels, labels_of_dataset
from .image_classification_block import ImageClassificationBlock, make_network
from .image_classification_config import PRESETS, BlockedImageClassificationConfig
from .image_classification_conversion import check_same_function, classifier_of, copy_weights
from .image_classification_prediction import clean_prediction, walk


class LabelTable(nn.Module):
    """e_k: one row per class, of norm 1 where it is used. Not trained."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.register_buffer("weight", torch.empty(num_classes, width))


class BlockedForImageClassification(BlockedCategoricalModel):
    """An image classifier cut into blocks that are trained alone.

    Example:
        >>> base = {"model_type": "vit", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        ...         "num_attention_heads": 4, "image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
        >>> model = BlockedForImageClassification.from_base(base, num_blocks=3)
        >>> model(torch.zeros(2, 1, 8, 8)).logits.shape
        torch.Size([2, 10])
    """

    config_class = BlockedImageClassificationConfig
    scored_by = "evaluation.score_classifier, or objectives.LabelPrediction().held_out for the loss of each block"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    handed_on = ("norm", "classifier")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: BlockedImageClassificationConfig, blocks: Sequence[int] | None = None):
        self._network: tuple[PreTrainedModel, ...] = ()  # initialises the base's modules; in a tuple: no submodule
        super().__init__(config, blocks)

    # -- building ------------------------------------------------------------------------------------------------

    def make_shared(self) -> None:
        self.label_table = LabelTable(self.config.num_classes, self.config.hidden_size)

    def make_block(self, block: int) -> ImageClassificationBlock:
        return ImageClassificationBlock(
            self.config, self.partition.layers(block), block, self.config._attn_implementation
        )

    def _init_weights(self, module: nn.Module) -> None:
        if not self._network:
            with torch.device("meta"):
                self._network = (make_network(self.config, range(1), None),)
        self._network[0]._init_weights(module)  # the base's own rule for its own modules
        if isinstance(module, LabelTable):
            init.normal_(module.weight)
        elif isinstance(module, Modulation):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ImageClassificationBlock) and self.config.initialization == "identity":
            if self.config.context == "cascade" and not module.is_first:
                module.zero_branches()
            module.zero_auxiliary_branches()

    # -- the clean stream ----------------------------------------------------------------------------------------

    def start(
        self, inputs: Float[Tensor, "batch channels height width"], block: int = 0
    ) -> Float[Tensor, "batch positions width"]:
        embeddings = self.block(block).embeddings
        inputs = inputs.to(embeddings.patch_embeddings.projection.weight.dtype)
        resized = tuple(inputs.shape[-2:]) != self.config.image_size and self.config.interpolation_is_asked
        return embeddings(inputs, interpolate_pos_encoding=True) if resized else embeddings(inputs)

    def clean_block(
        self, hidden: Float[Tensor, "batch positions width"], block: int, **places: Any
    ) -> Float[Tensor, "batch positions width"]:
        for layer in self.block(block).layers:
            hidden = layer(hidden, None)
        return hidden

    def num_positions(self, inputs: Tensor) -> int:
        return self.config.num_positions

    def training_logits(
        self, hidden: Float[Tensor, "batch positions width"], block: int
    ) -> Float[Tensor, "batch classes"]:
        """From a block's output through its auxiliary layers and head: what its local loss reads."""
        module = self.block(block)
        for layer in module.auxiliary_layers:
            hidden = layer(hidden, None)
        return module.classifier(module.features(hidden))

    # -- noisy labels --------------------------------------------------------------------------------------------

    def target_table(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "classes width"]:
        """e_k with rows of norm 1. Noisy targets are ``e_k + sigma * eps``."""
        return F.normalize(self.label_table.weight.to(dtype), dim=-1)

    def target_logits(
        self,
        hidden: Float[Tensor, "batch positions width"],
        z: Float[Tensor, "batch width"],
        sigma: Float[Tensor, "batch"],
        block: int,
    ) -> Float[Tensor, "batch classes"]:
        """The logits of a block for noisy labels, in z's dtype.

        Args:
            hidden: what the block's clean stream starts from.
            z: noisy labels.
            sigma: their noise levels.
            block: which.
        """
        module = self.block(block)
        if self.config.two_stream:
            c = self.preconditioning(sigma)
            features = module.noisy_features(hidden, c.c_in[:, None].to(z.dtype) * z, c.c_noise)
        else:
            features = module.features(self.clean_block(hidden, block))
        logits = module.classifier(features).to(z.dtype)
        if self.config.readout == "edm":
            return logits
        # log N(z; e_k, sigma^2) = <z, e_k> / sigma^2 + what does not depend on k, since all rows have norm 1.
        with torch.autocast(z.device.type, enabled=False):  # up to 1 / sigma_min^2: not for bfloat16
            return logits + (z / sigma[:, None].to(z.dtype) ** 2) @ self.target_table(z.dtype).T

    def posterior_mean(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch width"]:
        """``D = sum_k p_k e_k``, in the logits' dtype."""
        with torch.autocast(logits.device.type, enabled=False):
            return logits.softmax(-1) @ self.target_table(logits.dtype)

    def check_input(  # type: ignore[override]  # a label is denoised given its image
        self, z: Tensor, pixel_values: Tensor | None = None
    ) -> None:
        """Raise a ``ValueError`` for images or noisy labels of another shape than the model's."""
        if not isinstance(z, Tensor) or z.ndim != 2 or z.shape[1] != self.config.hidden_size:
            shape = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"z has shape {shape}; give noisy labels [batch, {self.config.hidden_size}].")
        if pixel_values is None:
            raise ValueError("pixel_values is missing: a label is denoised given its image.")
        if len(check_images(self.config, pixel_values)) != len(z):
            raise ValueError(f"{len(pixel_values)} images for {len(z)} noisy labels: give one image per label.")

    def _denoise(  # type: ignore[override]
        self, z: Tensor, sigma: Tensor, block: int, *, pixel_values: Tensor
    ) -> Tensor:
        """D_b = sum_k p_k e_k: the posterior mean of the label's embedding (arXiv 2506.14202, App. B)."""
        z = z.to(torch.float64 if z.dtype == torch.float64 else torch.float32)
        hidden = self.start_of(block, {"pixel_values": check_images(self.config, pixel_values)})
        return self.posterior_mean(self.target_logits(hidden, z, sigma, block))

    # -- the classifier ------------------------------------------------------------------------------------------

    def forward(  # type: ignore[override]  # images, as transformers' models
        self,
        pixel_values: Float[Tensor, "batch channels height width"] | None = None,
        labels: Int[Tensor, "batch"] | None = None,
        num_inference_steps: int | None = None,
        num_draws: int | None = None,
        generator: torch.Generator | None = None,
        block: int | None = None,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple:
        """The logits of each image, as of any image classifier in transformers.

        With ``readout="clean"`` they are f of a cascade's last block, or of one of independent blocks, each of which is
        a classifier of its own. Otherwise, and where ``num_inference_steps`` is given, the label is denoised, and the
        logits are the logarithms of the probabilities.

        Args:
            pixel_values: images in [-1, 1].
            labels: for the loss; -100 leaves a row out of it.
            num_inference_steps: noise levels of the walk; the config's unless given.
            num_draws: draws of the starting noise, over which probabilities are averaged; the config's unless given.
            generator: of the starting noise, which is the same for all images, so that the other images of a batch do
                not matter; by default one that starts anew in each call.
            block: for independent blocks without a walk, which; 0 by default.
            return_dict: False for a tuple.
            output_hidden_states: give ``hidden_states`` too, as the base does: the embedded image, and the output of
                each layer, [batch, positions, width] each. Not of a walk, in which layers run once per noise level.
            interpolate_pos_encoding: take images of another size, with position embeddings interpolated to it.
            **kwargs: none; what transformers' classifiers take besides is refused by name.

        Raises:
            ValueError: for images, labels or settings that do not fit the model, or an output that is not given.
        """
        check_keywords(kwargs)
        pixel_values = check_images(self.config, pixel_values, any_size=bool(interpolate_pos_encoding))
        if labels is not None:
            check_labels(self.config, labels, len(pixel_values), ignored=True)
        walks = self.config.two_stream or num_inference_steps is not None
        if walks and block is not None:
            raise ValueError(f"block={block}: a walk over the noise levels uses the block of each. Leave it out.")
        if walks and output_hidden_states:
            raise ValueError(
                "output_hidden_states=True: a walk over noise levels runs layers once per level, so there is no one "
                "state per layer. Leave it out, or use start() and clean_block() for a block's hidden states; models "
                "with readout='clean' give them, without num_inference_steps."
            )
        if not walks and (num_draws is not None or generator is not None):
            raise ValueError(
                "num_draws and generator are of a walk over noise levels, and readout='clean' reads the classes "
                "without noise: give num_inference_steps too, or leave them out."
            )
        states = None
        if walks:
            logits = walk(self, pixel_values, num_inference_steps, num_draws, generator)
        else:
            logits, states = clean_prediction(self, pixel_values, block, with_states=bool(output_hidden_states))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=states)
        return output.to_tuple() if return_dict is False else output

    # -- for trainer and planner ---------------------------------------------------------------------------------

    def check_batch(self, batch: dict[str, Tensor]) -> None:
        check_image_batch(self.config, batch)

    def check_dataset(self, dataset: Any) -> None:
        """Raise a ``ValueError`` for a label out of range anywhere, where labels can be read without the images."""
        labels = labels_of_dataset(dataset)
        if labels is not None:
            check_labels(self.config, labels)

    def wrong_rows(self, batch: dict[str, Tensor]) -> Tensor:
        """Samples whose label is out of range, besides those that are not finite; see the base class."""
        labels = batch["class_labels"]
        return super().wrong_rows(batch) | (labels < 0) | (labels >= self.config.num_classes)

    def layer_modules(self, block: int) -> Iterator[nn.Module]:
        module = self.block(block)
        for layer in (*module.layers, *module.auxiliary_layers):
            yield from (layer.attention, layer.mlp)  # with a noisy label, no layer is called as a whole

    def dummy_batch(self, batch_size: int) -> dict[str, Tensor]:  # type: ignore[override]  # no settings
        batch = {
            "pixel_values": torch.zeros(batch_size, self.config.num_channels, *self.config.image_size),
            "class_labels": torch.zeros(batch_size, dtype=torch.int64),
        }
        if self.config.context == "cascade":  # what the blocks below give, one of which is resident at a time
            batch["hidden_states"] = torch.zeros(batch_size, self.config.num_positions, self.config.hidden_size)
        return batch

    # -- conversion ----------------------------------------------------------------------------------------------

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel | PreTrainedConfig | str | os.PathLike | Mapping[str, Any],
        num_blocks: int | None = None,
        *,
        preset: str | None = None,
        **settings: Any,
    ) -> "BlockedForImageClassification":
        """Cut an image classifier into blocks.

        Args:
            base: a transformers image classifier (ViT, DeiT, DINOv2 with a head), its directory or Hub id (weights are
                copied), or its config as an object or mapping (weights are new).
            num_blocks: B, default 3.
            preset: ``default``, as without one, or ``paper`` for the paper's settings; ``settings`` override it.
            **settings: fields of ``BlockedImageClassificationConfig``; for a base that is loaded by name also
                ``dtype``, ``revision``, ``token`` and ``cache_dir``.

        Returns:
            The blocked model in the base's dtype. With ``readout="clean", context="cascade"`` its logits are the
            base's, bit for bit. Lower blocks' norms and heads start as copies of the base's; auxiliary layers as copies
            of the layers that follow.

        Raises:
            ValueError: if the base cannot be cut, or a setting is not allowed.
        """

        def fill(base: PreTrainedModel, model: BlockedForImageClassification) -> None:
            copy_weights(base, model)
            check_same_function(base, model)

        settings["preset"] = preset
        return convert(cls, base, num_blocks, settings, load=AutoModelForImageClassification.from_pretrained, fill=fill)

    @classmethod
    def config_from(
        cls,
        base_config: Mapping[str, Any] | PreTrainedConfig,
        num_blocks: int | None = None,
        *,
        preset: str | None = None,
        **settings: Any,
    ) -> BlockedImageClassificationConfig:
        """The config of a blocked model from the base's config and settings, as in ``from_base``."""
        names = {name: settings.pop(name) for name in ("id2label", "label2id") if name in settings}
        given = family_settings(cls.config_class, PRESETS, base_config, num_blocks, preset, settings)
        return cls.config_class(**given, **names)

    def to_base(self) -> PreTrainedModel:
        """Give back a transformers image classifier: a cascade's layers in order, without auxiliary layers.

        Raises:
            ValueError: for independent blocks, which do not add up to one network, or noisy labels, which the base has
                no place for.
        """
        return classifier_of(self)


AutoConfig.register("blocked_image_classification", BlockedImageClassificationConfig)
AutoModel.register(BlockedImageClassificationConfig, BlockedForImageClassification)
AutoModelForImageClassification.register(BlockedImageClassificationConfig, BlockedForImageClassification)

__all__ = ["PRESETS", "BlockedForImageClassification", "BlockedImageClassificationConfig"]
