"""Weights from a transformers image classifier to a blocked one, and back."""

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from ..adapter_checks import check_no_adapter
from .base_loading import empty_base
from .image_classification_block import ANATOMIES, classifier_class
from .image_classification_config import MEND

if TYPE_CHECKING:
    from .image_classification import BlockedForImageClassification


@torch.no_grad()
def copy_weights(base: PreTrainedModel, model: "BlockedForImageClassification") -> None:
    """Copy a base's weights into the blocks: to each its layers, and a copy of the norm and the head.

    Raises:
        ValueError: if the base is not the classifier that its config stands for.
    """
    expected = classifier_class(base.config)
    if hasattr(base, "cls_classifier") and hasattr(base, "deit"):
        raise ValueError(
            f"a {type(base).__name__} cannot be cut: its logits are the mean of two heads. Give its layers and the "
            f"head on [CLS] as a {expected.__name__}: base = {expected.__name__}(model.config); "
            "base.deit.load_state_dict(model.deit.state_dict()); "
            "base.classifier.load_state_dict(model.cls_classifier.state_dict())."
        )
    if not isinstance(base, expected):
        raise ValueError(f"a {type(base).__name__} cannot be cut: load it as {expected.__name__}. {MEND}")
    trunk = base.base_model
    sources = ANATOMIES[model.config.base_config["model_type"]].layers_of(base)
    for b in model.resident_blocks:
        module, layers = model.block(b), model.partition.layers(b)
        if module.embeddings is not None:
            module.embeddings.load_state_dict(trunk.embeddings.state_dict())
        for layer, i in zip(module.layers, layers, strict=True):
            layer.load_state_dict(sources[i].state_dict())
        for k, layer in enumerate(module.auxiliary_layers):
            layer.load_state_dict(sources[min(layers[-1] + 1 + k, len(sources) - 1)].state_dict())
        module.norm.load_state_dict(trunk.layernorm.state_dict())
        module.classifier.load_state_dict(base.classifier.state_dict())


@torch.no_grad()
def check_same_function(base: PreTrainedModel, model: "BlockedForImageClassification") -> None:
    """Raise a ``ValueError`` if the chain of blocks gives other logits than the base, on one image."""
    if base.device.type == "meta":
        return
    training = base.training
    base.eval()
    model.eval()
    config = model.config
    image = torch.linspace(-1, 1, config.num_channels * config.image_size[0] * config.image_size[1])
    image = image.view(1, config.num_channels, *config.image_size).to(base.device, base.dtype)
    hidden = model.start(image)
    for b in range(model.partition.num_blocks):
        hidden = model.clean_block(hidden, b)
    module = model.block(b)
    mine, theirs = module.classifier(module.features(hidden)).float(), base(pixel_values=image).logits.float()
    base.train(training)
    if not torch.allclose(mine, theirs, rtol=0, atol=1e-2 * float(theirs.abs().max()), equal_nan=True):
        raise ValueError(
            f"{type(base).__name__} cannot be cut: its layers one after the other do not give its logits. {MEND}"
        )


def classifier_of(model: "BlockedForImageClassification") -> PreTrainedModel:
    """The transformers image classifier whose layers a cascade's blocks hold; see ``to_base``."""
    check_no_adapter(model.blocks, "give the base back")
    if model.config.two_stream or (model.config.context != "cascade" and model.partition.num_blocks > 1):
        raise ValueError(
            f"a model with readout={model.config.readout!r} and context={model.config.context!r} cannot be given "
            "back as one classifier: its blocks do not feed each other, or read noisy labels. Only readout='clean' "
            "with context='cascade' (or one block) can."
        )
    config = model.config.make_base_config()
    config.id2label, config.label2id = dict(model.config.id2label), dict(model.config.label2id)
    base = empty_base(classifier_class(config)._from_config, config, model)
    targets = ANATOMIES[model.config.base_config["model_type"]].layers_of(base)
    with torch.no_grad():
        base.base_model.embeddings.load_state_dict(model.block(0).embeddings.state_dict())
        for b in range(model.partition.num_blocks):
            module = model.block(b)
            for layer, i in zip(module.layers, model.partition.layers(b), strict=True):
                targets[i].load_state_dict(layer.state_dict())
        base.base_model.layernorm.load_state_dict(module.norm.state_dict())
        base.classifier.load_state_dict(module.classifier.state_dict())
    return base.train(model.training)
