r"""Forward-Forward (Hinton, arXiv 2212.13345) for a vision transformer: each layer is trained alone, by its goodness.

A layer's goodness G is the mean of the squares of its output at [CLS] (the paper's sum over the number of units, so
that one threshold serves all widths). An image is positive with its own label in the input and negative with another
one, and the layer tells the two apart (section 2, Eq. 1; s = 1 in the paper, whose sum is larger than the mean):

.. math:: p(positive) = \sigma(s (G - \theta)), \qquad
          L = \log(1 + e^{s (\theta - G_{pos})}) + \log(1 + e^{s (G_{neg} - \theta)}).

Between layers each token is normalised to length sqrt(width), so that the next layer cannot read the goodness off the
length (section 2). The label's embedding is added to [CLS], where Hinton overwrites border pixels (section 3.3). [CLS]
is where label and image meet: a goodness of all tokens hardly depends on the label at first, and such layers stayed at
chance for as long as was tried (scikit-learn's digits, 450 updates). The class of an image is the label under which the
goodness, summed over all layers but the first, is largest (section 3.3): K runs of the network.

``objective="contrastive"`` is the adaptation to ViT that DiffusionBlocks compares with (arXiv 2506.14202, App. E.1):
Contrastive Forward-Forward (Aghagolzadeh and Ezoji, arXiv 2502.00571). No label is put in; the two forward passes are
two batches of images, and a layer draws images of one class together and others apart (supervised contrastive loss,
Khosla et al., arXiv 2004.11362, Eq. 2; that paper's margin, which grows over the layers, is left out):

.. math:: L = -\frac{1}{N} \sum_i \frac{1}{|P(i)|} \sum_{p \in P(i)}
          \log \frac{e^{\langle h_i, h_p \rangle / \tau}}{\sum_{a \ne i} e^{\langle h_i, h_a \rangle / \tau}},

h the layer's mean token, normalised; P(i) the other images of i's class. A linear classifier of the last layer's mean
token, whose gradient stops there, gives the class.

Hinton's second way to classify, and peer normalisation, are not here.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from ..suggest import unknown_name
from .local_checks import ImageShape, check_kind
from .local_training import Images, Labels, LocalClassifier, LocalLoss

OBJECTIVES = ("goodness", "contrastive")


def goodness(hidden: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch"]:
    """Mean of the squares of a layer's output at [CLS], its first token."""
    return hidden[:, 0].square().mean(-1)


def goodness_loss(
    positive: Float[Tensor, "batch"], negative: Float[Tensor, "batch"], threshold: float, scale: float = 1.0
) -> Float[Tensor, ""]:
    """``-ln p(positive) - ln(1 - p(positive))`` of both kinds of input, ``p = sigmoid(scale (G - threshold))``."""
    return F.softplus(scale * (threshold - positive)).mean() + F.softplus(scale * (negative - threshold)).mean()


def contrastive_loss(
    hidden: Float[Tensor, "batch dim"], labels: Int64[Tensor, "batch"], temperature: float
) -> Float[Tensor, ""]:
    """The supervised contrastive loss (arXiv 2004.11362, Eq. 2); images without another of their class do not count."""
    hidden = F.normalize(hidden, dim=-1)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    similarity = (hidden @ hidden.T / temperature).masked_fill(itself, float("-inf"))
    same = (labels[:, None] == labels) & ~itself
    log_p = similarity.log_softmax(-1).masked_fill(~same, 0.0).sum(-1)
    count = same.sum(-1)
    return -(log_p / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


def normalised(hidden: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
    """Each token with mean square 1: its direction is passed on, its length, the goodness, is not."""
    return hidden / (hidden.square().mean(-1, keepdim=True) + 1e-8).sqrt()


def _shape_of(config: ViTConfig, num_classes: int) -> ImageShape:
    side = config.image_size
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return ImageShape(num_classes, config.num_channels, height, width)


class ForwardForwardViT(LocalClassifier):
    """A vision transformer of transformers' layers, trained layer by layer; see the module's docstring.

    Args:
        config: of the transformer; ``image_size``, ``patch_size``, ``num_channels``, ``hidden_size``,
            ``num_hidden_layers`` and so on as for ``ViTModel``.
        num_classes: K, at least 2.
        objective: ``goodness`` (Hinton) or ``contrastive`` (Contrastive Forward-Forward).
        threshold: theta of the goodness.
        scale: s, factor on goodness minus threshold.
        temperature: tau of the contrastive loss.

    Raises:
        ValueError: for a config of another kind or without layers, an unknown objective, fewer than two classes or a
            temperature or scale that is not positive.
    """

    def __init__(
        self,
        config: ViTConfig,
        num_classes: int,
        objective: str = "goodness",
        threshold: float = 2.0,
        scale: float = 8.0,
        temperature: float = 0.1,
    ):
        super().__init__()
        check_kind("config", config, ViTConfig)
        if config.num_hidden_layers < 1:
            raise ValueError(
                f"num_hidden_layers={config.num_hidden_layers} leaves nothing to train: give at least one layer."
            )
        if objective not in OBJECTIVES:
            raise ValueError(unknown_name("objective", objective, OBJECTIVES))
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"num_classes={num_classes!r} must be a whole number of at least 2.")
        for name, value in (("scale", scale), ("temperature", temperature)):
            if not value > 0:
                raise ValueError(f"{name}={value!r} must be positive.")
        self.config, self.num_classes, self.objective = config, num_classes, objective
        self.threshold, self.scale, self.temperature = threshold, scale, temperature
        vit = ViTModel(config, add_pooling_layer=False)
        self.embeddings, self.layers = vit.embeddings, vit.layers
        width = config.hidden_size
        self.label_embedding: Any = nn.Embedding(num_classes, width) if objective == "goodness" else None
        self.classifier: Any = nn.Linear(width, num_classes) if objective == "contrastive" else None

    def parts(self) -> Sequence[Sequence[nn.Module]]:
        """A layer each; the embeddings belong to the first, whose loss alone reaches them."""
        labels = [] if self.label_embedding is None else [self.label_embedding]
        first = [self.embeddings, *labels, self.layers[0]]
        return [first, *([layer] for layer in self.layers[1:])]

    def takes(self) -> ImageShape:
        return _shape_of(self.config, self.num_classes)

    def resident(self, part: int) -> Sequence[nn.Module]:
        """A layer's input comes from all layers below, which run without gradients."""
        return [module for modules in self.parts()[: part + 1] for module in modules]

    def losses(self, images: Images, labels: Labels, generator: torch.Generator) -> Iterator[LocalLoss]:
        if self.objective == "goodness":
            # another label, uniformly
            step = torch.randint(1, self.num_classes, labels.shape, generator=generator).to(labels)
            given = torch.cat([labels, (labels + step) % self.num_classes])
            hidden = self.tokens(torch.cat([images, images]), given)
        else:
            hidden = self.tokens(images)
        for i, layer in enumerate(self.layers):
            hidden = layer(normalised(hidden))
            if self.objective == "goodness":
                positive, negative = goodness(hidden).chunk(2)
                yield i, goodness_loss(positive, negative, self.threshold, self.scale)
            else:
                yield i, contrastive_loss(hidden.mean(1), labels, self.temperature)
            hidden = hidden.detach()
        if self.classifier is not None:
            yield None, F.cross_entropy(self.classifier(normalised(hidden).mean(1)), labels)

    def tokens(self, images: Images, labels: Labels | None = None) -> Float[Tensor, "batch tokens dim"]:
        """[CLS] and patches, with labels put in if there are any."""
        tokens = self.embeddings(images)
        if labels is None:
            return tokens
        return torch.cat([tokens[:, :1] + self.label_embedding(labels)[:, None], tokens[:, 1:]], dim=1)

    def scores(self, images: Images) -> Float[Tensor, "batch classes"]:
        """Of each class: the goodness under its label, summed over all layers but the first; or the logits."""
        if self.objective == "contrastive":
            hidden = self.tokens(images)
            for layer in self.layers:
                hidden = layer(normalised(hidden))
            return self.classifier(normalised(hidden).mean(1))
        columns = []
        for label in range(self.num_classes):
            hidden = self.tokens(images, images.new_full((len(images),), label, dtype=torch.int64))
            total = images.new_zeros(len(images))
            for i, layer in enumerate(self.layers):
                hidden = layer(normalised(hidden))
                if i > 0 or len(self.layers) == 1:
                    total = total + goodness(hidden)
            columns.append(total)
        return torch.stack(columns, dim=-1)

    @torch.no_grad()
    def predict(self, images: Images, generator: torch.Generator) -> Int64[Tensor, "batch"]:
        return self.scores(images).argmax(-1)


class BackpropViT(LocalClassifier):
    """The same transformer trained end to end: ``ViTForImageClassification``, cross-entropy of its logits.

    Args:
        model: such a model.

    Raises:
        ValueError: for a model of another kind.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        check_kind("model", model, ViTForImageClassification)
        self.model = model

    def takes(self) -> ImageShape:
        return _shape_of(self.model.config, self.model.config.num_labels)

    def parts(self) -> Sequence[Sequence[nn.Module]]:
        return [[self.model]]

    def losses(self, images: Images, labels: Labels, generator: torch.Generator) -> Iterator[LocalLoss]:
        yield 0, F.cross_entropy(self.model(pixel_values=images).logits, labels)

    @torch.no_grad()
    def predict(self, images: Images, generator: torch.Generator) -> Int64[Tensor, "batch"]:
        return self.model(pixel_values=images).logits.argmax(-1)
