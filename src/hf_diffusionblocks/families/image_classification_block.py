"""One block of an image classifier: the base's own modules, and what its training or a noisy label needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from ..conditioning import Modulation, NoiseEmbedding
from .categorical import zero_branches
from .image_classification_config import MEND, BlockedImageClassificationConfig


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a base lie.

    Attributes:
        layers: path from the base model (without head) to its layers.
        norms: of a layer, before the attention and before the MLP.
        after: of a layer, what the outputs of the two pass before they are added.
        patches: whether the head also reads the mean of the patches.
    """

    layers: str
    norms: tuple[str, str]
    after: tuple[tuple[str, ...], tuple[str, ...]]
    patches: bool = False

    def layers_of(self, network: PreTrainedModel) -> nn.ModuleList:
        """The layers of a classifier of transformers."""
        return network.base_model.get_submodule(self.layers)


_VIT = Anatomy("layers", ("layernorm_before", "layernorm_after"), (("dropout",), ("dropout",)))
_DINO = Anatomy(
    "encoder.layer", ("norm1", "norm2"), (("layer_scale1", "drop_path"), ("layer_scale2", "drop_path")), True
)
ANATOMIES = {"vit": _VIT, "deit": _VIT, "dinov2": _DINO, "dinov2_with_registers": _DINO}


class ImageClassificationBlock(nn.Module):
    """One block: embeddings of the image if it reads it, the base's layers, norm and head."""

    def __init__(
        self, config: BlockedImageClassificationConfig, layers: Sequence[int], block: int, attention: str | None
    ):
        super().__init__()
        self.is_first = layers[0] == 0
        self.anatomy = ANATOMIES[config.base_config["model_type"]]
        self.num_prefix = config.num_prefix
        network = make_network(config, layers, attention)
        reads_image = self.is_first or config.context == "independent"
        self.embeddings = network.base_model.embeddings if reads_image else None
        self.layers = self.anatomy.layers_of(network)
        self.norm = network.base_model.layernorm
        self.classifier = network.classifier
        count = config.auxiliary_layers_of(block)
        beyond = range(layers[-1] + 1, layers[-1] + 1 + count)
        self.auxiliary = self.anatomy.layers_of(make_network(config, beyond, attention)) if count else None
        self.noise_embedding: Any = None  # the noisy label's parts
        self.modulations: Any = None
        self.noisy_in: Any = None
        if config.two_stream:
            width, hidden = config.noise_embedding_dim, config.hidden_size
            self.noise_embedding = NoiseEmbedding(width)
            self.modulations = nn.ModuleList(Modulation(width, hidden) for _ in layers)
            self.noisy_in = nn.Linear(hidden, hidden)  # the bias is the label's place

    @property
    def auxiliary_layers(self) -> Sequence[nn.Module]:
        """Layers that only the block's training loss sees."""
        return () if self.auxiliary is None else self.auxiliary

    def features(self, hidden: Float[Tensor, "batch positions width"]) -> Float[Tensor, "batch features"]:
        """What the head reads of an output: the normed [CLS], in DINOv2 beside the mean of the normed patches."""
        hidden = self.norm(hidden)
        if not self.anatomy.patches:
            return hidden[:, 0, :]
        return torch.cat([hidden[:, 0], hidden[:, self.num_prefix :].mean(dim=1)], dim=1)

    def noisy_features(
        self,
        hidden: Float[Tensor, "batch positions width"],
        scaled: Float[Tensor, "batch width"],
        c_noise: Float[Tensor, "batch"],
    ) -> Float[Tensor, "batch features"]:
        """What the head reads after the layers have seen image and noisy label, modulated by the noise level.

        Args:
            hidden: of the image: [CLS] and patches.
            scaled: the noisy label times ``c_in``; it becomes one more token at the end.
            c_noise: of the noise level.
        """
        embedded = self.noise_embedding(c_noise)[:, None]
        hidden = torch.cat([hidden, self.noisy_in(scaled.to(hidden.dtype))[:, None]], dim=1)
        for layer, modulation in zip(self.layers, self.modulations, strict=True):
            if self.training and layer.gradient_checkpointing:
                arguments = (self.anatomy, layer, hidden, modulation, embedded)
                hidden = checkpoint(modulated_layer, *arguments, use_reentrant=False)
            else:
                hidden = modulated_layer(self.anatomy, layer, hidden, modulation, embedded)
        return self.features(hidden[:, :-1])

    def zero_branches(self) -> None:
        """Make each layer the identity: what its branches add is zero."""
        zero_branches(self.layers, _outputs(self.layers))

    def zero_auxiliary_branches(self) -> None:
        """The same for the auxiliary layers."""
        zero_branches(self.auxiliary_layers, _outputs(self.auxiliary_layers))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each layer: no one calls a block as a whole. With a noisy label, the MLPs."""
        for layer in (*self.layers, *self.auxiliary_layers):
            (layer if self.modulations is None else layer.mlp).compile(*args, **kwargs)


def modulated_layer(
    anatomy: Anatomy,
    layer: nn.Module,
    hidden: Float[Tensor, "batch positions width"],
    modulation: Modulation,
    embedded: Float[Tensor, "batch 1 dim"],
) -> Float[Tensor, "batch positions width"]:
    """A layer of the base under AdaLN: shift and scale after each norm, a gate on what each branch adds.

    All zero, it is the layer itself, bit for bit.
    """
    parts = modulation(embedded)
    for i, branch in enumerate((layer.attention, layer.mlp)):
        shift, scale, gate = parts[3 * i : 3 * i + 3]
        x = branch(getattr(layer, anatomy.norms[i])(hidden) * (1 + scale) + shift)
        x = x[0] if isinstance(x, tuple) else x
        for name in anatomy.after[i]:
            x = getattr(layer, name)(x)
        hidden = (1 + gate) * x + hidden
    return hidden


def classifier_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' classifier of a base's config: of DeiT's two, the one without a distilled head."""
    kinds = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    return kinds[0] if isinstance(kinds, (list, tuple)) else kinds


def make_network(
    config: BlockedImageClassificationConfig, layers: Sequence[int], attention: str | None
) -> PreTrainedModel:
    """transformers' classifier of these layers of the base, with weights that are still to be initialised.

    Raises:
        ValueError: if it cannot be built, or lacks a part that a block is made of.
    """
    base = config.make_base_config(layers)
    base._attn_implementation = attention
    kind = base.model_type
    try:
        with init.no_init_weights():  # the model initialises each block from a random stream of its own
            network = classifier_class(base)._from_config(base)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"the base's config does not describe a {kind!r} model that can be built: {error!r}"
        ) from error
    missing = [name for name in ("embeddings", "layernorm") if not hasattr(network.base_model, name)]
    if missing or not isinstance(network.classifier, nn.Linear):
        raise ValueError(f"a model of type {kind!r} cannot be cut: it lacks {missing or ['a linear head']}. {MEND}")
    if not hasattr(ANATOMIES[kind].layers_of(network)[0].attention, "o_proj"):  # its names are those on the disk too
        raise ValueError(
            f"transformers {transformers.__version__} builds the layers of a {kind!r} model in a way that cannot be "
            "cut: this kind needs transformers 5.18 or newer (pip install -U transformers). ViT and DeiT work as it is."
        )
    return network


def _outputs(layers: Sequence[nn.Module]) -> tuple[tuple[str, str], ...]:
    """The linear maps that a layer's branches end in: of a gated MLP, ``down_proj``."""
    gated = bool(layers) and hasattr(layers[0].mlp, "down_proj")
    return (("attention", "o_proj"), ("mlp", "down_proj" if gated else "fc2"))
