"""The network of NoProp's blocks, and the label embeddings that they denoise (Li, Teh, Pascanu, arXiv 2503.24322).

Each block looks at the image with a small stack of convolutions of its own, at the noisy label embedding with a small
MLP, joins the two and gives one number per class or per dimension (the paper's appendix, the figure of the models).
The continuous-time forms have a third branch for the time.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..conditioning import NoiseEmbedding
from ..suggest import unknown_name
from .local_checks import ImageShape, check_kind
from .local_training import LocalClassifier

EMBEDDINGS = ("one_hot", "learned")


@dataclass(frozen=True)
class CNNConfig:
    """Shape of NoProp's network; the defaults are the paper's.

    Args:
        num_classes: K, at least 2.
        image_size: side of the images in pixels, at least 8: three poolings halve it.
        channels: of the images.
        widths: channels of the three convolutions.
        hidden: width of the branches.
        dropout: after each pooling.
        embedding: of the labels: ``one_hot``, which is fixed, or ``learned`` from an orthogonal start.
        embedding_dim: d of learned embeddings; K unless given.

    Raises:
        ValueError: naming the value and what is allowed.
    """

    num_classes: int
    image_size: int
    channels: int = 1
    widths: tuple[int, int, int] = (32, 64, 128)
    hidden: int = 256
    dropout: float = 0.2
    embedding: str = "one_hot"
    embedding_dim: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("num_classes", 2), ("image_size", 8), ("channels", 1), ("hidden", 2), ("embedding_dim", 1)):
            value = getattr(self, name)
            optional = value is None and name == "embedding_dim"
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ValueError(f"{name}={value!r} must be a whole number of at least {low}.")
        if len(self.widths) != 3 or any(not isinstance(w, int) or w < 1 for w in self.widths):
            raise ValueError(f"widths={self.widths!r} must be three positive whole numbers, one per convolution.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must lie in [0, 1).")
        if self.embedding not in EMBEDDINGS:
            raise ValueError(unknown_name("embedding", self.embedding, EMBEDDINGS))
        if self.embedding == "one_hot" and self.embedding_dim not in (None, self.num_classes):
            raise ValueError(
                f"embedding_dim={self.embedding_dim} does not fit one-hot embeddings, which have num_classes="
                f"{self.num_classes} dimensions: leave it out, or use embedding='learned'."
            )

    @property
    def dim(self) -> int:
        """d, the dimensions of a label embedding."""
        return self.embedding_dim or self.num_classes


class LabelEmbedding(nn.Module):
    """u_y: one vector per class, W_embed in the paper. One-hot vectors are a buffer and never trained."""

    def __init__(self, config: CNNConfig):
        super().__init__()
        if config.embedding == "one_hot":
            self.register_buffer("weight", torch.eye(config.num_classes))
        else:
            self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(config.num_classes, config.dim)))

    def forward(self, labels: Int64[Tensor, "batch"]) -> Float[Tensor, "batch dim"]:
        """The embedding of each label."""
        return self.weight[labels]

    def expected(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch dim"]:
        """The mean embedding under a network's class probabilities: how the paper writes its estimate of u_y."""
        return logits.softmax(-1) @ self.weight

    def nearest(self, z: Float[Tensor, "batch dim"]) -> Int64[Tensor, "batch"]:
        """The class whose embedding is nearest (the paper's radial parameterisation, at its mode)."""
        return torch.cdist(z, self.weight).argmin(-1)


class DenoisingCNN(nn.Module):
    """One block: image, noisy label embedding and, if ``timed``, time to ``out`` numbers.

    Args:
        config: its shape.
        out: how many numbers; K unless given.
        timed: whether it has a branch for the time (NoProp-CT and -FM) or noise level.
    """

    def __init__(self, config: CNNConfig, out: int | None = None, timed: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        channels, side = config.channels, config.image_size
        for width in config.widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(config.dropout)]
            channels, side = width, side // 2
        hidden = config.hidden
        self.image = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels * side * side, hidden), nn.BatchNorm1d(hidden)
        )
        self.label = nn.Sequential(nn.Linear(config.dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.label_residual = nn.Sequential(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden))
        self.time = NoiseEmbedding(hidden) if timed else None
        self.joint = nn.Sequential(
            nn.Linear(hidden * (3 if timed else 2), hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden // 2),
            nn.BatchNorm1d(hidden // 2),
            nn.ReLU(),
            nn.Linear(hidden // 2, out or config.num_classes),
        )

    def encode(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch hidden"]:
        """What the block sees of the images; the same at every step of a sampler."""
        return self.image(images)

    def head(
        self,
        features: Float[Tensor, "batch hidden"],
        z: Float[Tensor, "batch dim"],
        time: Float[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch out"]:
        """The rest of the block, given the images' features."""
        label = self.label(z)
        branches = [features, label + self.label_residual(label)]
        if self.time is not None:
            branches.append(self.time(time))
        return self.joint(F.relu(torch.cat(branches, dim=-1)))

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        z: Float[Tensor, "batch dim"],
        time: Float[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch out"]:
        """Both: [batch, out]."""
        return self.head(self.encode(images), z, time)


class CNNClassifier(LocalClassifier):
    """A classifier of ``DenoisingCNN`` blocks.

    Args:
        config: shape of the network.

    Raises:
        ValueError: for a config of another kind.
    """

    def __init__(self, config: CNNConfig):
        super().__init__()
        check_kind("config", config, CNNConfig)
        self.config = config

    def takes(self) -> ImageShape:
        config = self.config
        return ImageShape(config.num_classes, config.channels, config.image_size, config.image_size)


def standard_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of a tensor's shape, device and dtype, drawn on the CPU."""
    return torch.randn(like.shape, generator=generator).to(like)
