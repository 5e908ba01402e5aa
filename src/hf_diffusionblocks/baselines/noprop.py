r"""NoProp (Li, Teh, Pascanu, arXiv 2503.24322): each block denoises a label embedding, given the image.

``NoPropDT``
    discrete time: T blocks of their own weights, a fixed cosine schedule; the loss is Eq. 8.
``NoPropCT``
    continuous time: one network for all times, a learned schedule; the loss is Eq. 9.
``NoPropFM``
    flow matching: one network that predicts the velocity from noise to the embedding.
``BackpropCNN``
    the blocks of NoProp-DT run in sequence, noise included, trained by the cross-entropy at the end alone.

Time runs from noise to label (``noprop_schedules``). Only NoProp-DT is trained block
by block: the other two have one network, whose every update goes through all of it.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from .local_training import Images, Labels, LocalLoss
from .noprop_network import CNNClassifier, CNNConfig, DenoisingCNN, LabelEmbedding, standard_normal
from .noprop_schedules import (
    LearnedSchedule,
    cosine_alpha_bar,
    divergence_from_prior,
    noised,
    signal_to_noise,
    step_coefficients,
)


class NoPropDT(CNNClassifier):
    r"""NoProp in discrete time (arXiv 2503.24322, Eq. 8).

    .. math:: L = E[-\log p(y | z_T)] + KL(q(z_0|y) \| N(0, I))
              + \tfrac{T}{2} \eta\, E_{t, z_{t-1}} (SNR(t) - SNR(t-1)) \|\hat u_t(z_{t-1}, x) - u_y\|^2

    Block t has the loss of its own t, so with fixed embeddings nothing is shared; the first two terms train the
    classifier, and learned embeddings, which the blocks' losses train too.

    Args:
        config: shape of the network.
        num_blocks: T; the paper's is 10.
        eta: the weight of the denoising loss.
    """

    def __init__(self, config: CNNConfig, num_blocks: int = 10, eta: float | int = 0.1):
        super().__init__(config)
        self.eta = _positive("eta", eta)
        self.register_buffer("alpha_bar", cosine_alpha_bar(num_blocks), persistent=False)
        self.blocks = nn.ModuleList(DenoisingCNN(config) for _ in range(num_blocks))
        self.embedding = LabelEmbedding(config)
        self.classifier = _classifier(self.embedding)

    def parts(self) -> Sequence[Sequence[nn.Module]]:
        return [[block] for block in self.blocks]

    def weights(self) -> Float[Tensor, "blocks"]:
        """``T / 2 eta (SNR(t) - SNR(t - 1))`` of each block."""
        return 0.5 * self.eta * len(self.blocks) * signal_to_noise(self.alpha_bar).diff()

    def losses(self, images: Images, labels: Labels, generator: torch.Generator) -> Iterator[LocalLoss]:
        weights = self.weights().tolist()
        for t, block in enumerate(self.blocks):  # the block of index t leads from z_t to z_{t + 1}
            u = self.embedding(labels)
            z = noised(u, self.alpha_bar[t : t + 1], standard_normal(u, generator))
            error = (self.embedding.expected(block(images, z)) - u).square().sum(-1)
            yield t, weights[t] * error.mean()
        u = self.embedding(labels)
        z = noised(u, self.alpha_bar[-1:], standard_normal(u, generator))
        divergence = divergence_from_prior(u, self.alpha_bar[0]).mean()
        yield None, F.cross_entropy(self.classifier(z), labels) + divergence

    def run(self, images: Images, generator: torch.Generator) -> Float[Tensor, "batch classes"]:
        """Logits at the end of ``z_t = a_t u_t(z_{t-1}, x) + b_t z_{t-1} + sqrt(c_t) noise`` (Eq. 3), from noise."""
        z = standard_normal(images.new_empty(len(images), self.embedding.weight.shape[1]), generator)
        for block, (a, b, c) in zip(self.blocks, step_coefficients(self.alpha_bar).T.tolist(), strict=True):
            z = a * self.embedding.expected(block(images, z)) + b * z + c**0.5 * standard_normal(z, generator)
        return self.classifier(z)

    @torch.no_grad()
    def predict(self, images: Images, generator: torch.Generator) -> Int64[Tensor, "batch"]:
        return self.run(images, generator).argmax(-1)


class BackpropCNN(NoPropDT):
    """The same blocks trained end to end: the cross-entropy of ``NoPropDT.run``, through all of its noisy steps.

    This is the backpropagation that the paper's tables compare with: NoProp-DT's inference as one residual network.
    """

    def parts(self) -> Sequence[Sequence[nn.Module]]:
        return [[self]]

    def losses(self, images: Images, labels: Labels, generator: torch.Generator) -> Iterator[LocalLoss]:
        yield 0, F.cross_entropy(self.run(images, generator), labels)


class NoPropCT(CNNClassifier):
    r"""NoProp in continuous time (arXiv 2503.24322, Eq. 9), t uniform in [0, 1].

    .. math:: L = E[-\log p(y | z_1)] + KL(q(z_0|y) \| N(0, I))
              + \tfrac{1}{2} \eta\, E_{t, z_t} SNR'(t) \|\hat u(z_t, x, t) - u_y\|^2

    Inference takes ``NoPropDT.run``'s steps on an even grid of the learned schedule, which is what the continuous
    process is the limit of.

    Args:
        config: shape of the network.
        num_steps: of inference; the paper's is 1000. The images are encoded once.
        eta: the weight of the denoising loss.
    """

    def __init__(self, config: CNNConfig, num_steps: int = 1000, eta: float | int = 1.0):
        super().__init__(config)
        self.num_steps, self.eta = _steps(num_steps), _positive("eta", eta)
        self.network = DenoisingCNN(config, timed=True)
        self.schedule = LearnedSchedule()
        self.embedding = LabelEmbedding(config)
        self.classifier = _classifier(self.embedding)

    def parts(self) -> Sequence[Sequence[nn.Module]]:
        return [[self]]

    def losses(self, images: Images, labels: Labels, generator: torch.Generator) -> Iterator[LocalLoss]:
        u = self.embedding(labels)
        t = torch.rand(len(u), generator=generator).to(u)
        z = noised(u, self.schedule.alpha_bar(t), standard_normal(u, generator))
        error = (self.embedding.expected(self.network(images, z, t)) - u).square().sum(-1)
        denoising = 0.5 * self.eta * (self.schedule.snr_slope(t) * error).mean()
        alpha_bar = self.schedule.alpha_bar(u.new_tensor([0.0, 1.0]))
        z_1 = noised(u, alpha_bar[1:], standard_normal(u, generator))
        divergence = divergence_from_prior(u, alpha_bar[0]).mean()
        yield 0, F.cross_entropy(self.classifier(z_1), labels) + divergence + denoising

    @torch.no_grad()
    def predict(self, images: Images, generator: torch.Generator) -> Int64[Tensor, "batch"]:
        times = torch.linspace(0, 1, self.num_steps + 1, device=images.device)
        coefficients = step_coefficients(self.schedule.alpha_bar(times).double()).T.tolist()
        features = self.network.encode(images)
        z = standard_normal(images.new_empty(len(images), self.embedding.weight.shape[1]), generator)
        for t, (a, b, c) in zip(times, coefficients, strict=False):
            u = self.embedding.expected(self.network.head(features, z, t.expand(len(z))))
            z = a * u + b * z + c**0.5 * standard_normal(z, generator)
        return self.classifier(z).argmax(-1)


class NoPropFM(CNNClassifier):
    r"""NoProp by flow matching (arXiv 2503.24322, section on flow matching; Lipman et al., arXiv 2210.02747).

    With z_0 ~ N(0, I), z_1 = u_y and z_t = t z_1 + (1 - t) z_0, t uniform in [0, 1]:

    .. math:: L = E \|v(z_t, x, t) - (z_1 - z_0)\|^2,

    and where the embeddings are learned, the cross-entropy of the classifier at the extrapolated end
    z_t + (1 - t) v, which keeps them apart. Inference follows v by Euler's method; the class is the nearest of fixed
    embeddings, or the classifier's where that is trained.

    Args:
        config: shape of the network.
        num_steps: of inference; the paper's is 1000. The images are encoded once.
    """

    def __init__(self, config: CNNConfig, num_steps: int = 1000):
        super().__init__(config)
        self.num_steps = _steps(num_steps)
        self.network = DenoisingCNN(config, out=config.dim, timed=True)
        self.embedding = LabelEmbedding(config)
        learned = config.embedding == "learned"
        self.classifier = _classifier(self.embedding) if learned else None

    def parts(self) -> Sequence[Sequence[nn.Module]]:
        return [[self]]

    def losses(self, images: Images, labels: Labels, generator: torch.Generator) -> Iterator[LocalLoss]:
        u = self.embedding(labels)
        t = torch.rand(len(u), generator=generator).to(u)
        z_0 = standard_normal(u, generator)
        z = t[:, None] * u + (1 - t[:, None]) * z_0
        v = self.network(images, z, t)
        loss = (v - (u - z_0)).square().sum(-1).mean()
        if self.classifier is not None:
            loss = loss + F.cross_entropy(self.classifier(z + (1 - t[:, None]) * v), labels)
        yield 0, loss

    @torch.no_grad()
    def predict(self, images: Images, generator: torch.Generator) -> Int64[Tensor, "batch"]:
        features = self.network.encode(images)
        z = standard_normal(images.new_empty(len(images), self.embedding.weight.shape[1]), generator)
        for t in torch.arange(self.num_steps, device=z.device) / self.num_steps:
            z = z + self.network.head(features, z, t.expand(len(z))) / self.num_steps
        return self.embedding.nearest(z) if self.classifier is None else self.classifier(z).argmax(-1)


def _classifier(embedding: LabelEmbedding) -> nn.Linear:
    # p(y | z_T), linear as in the paper. It starts with the logits <z, u_k>, so that it names the nearest of orthogonal
    # embeddings from the first update on; its scale is learned.
    classes, dim = embedding.weight.shape
    linear = nn.Linear(dim, classes)
    with torch.no_grad():
        linear.weight.copy_(embedding.weight)
        linear.bias.zero_()
    return linear


def _positive(name: str, value: float | int) -> float:
    if not value > 0:
        raise ValueError(f"{name}={value!r} must be positive: it weighs the denoising loss.")
    return float(value)


def _steps(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"num_steps={value!r} must be a whole number of at least 1.")
    return value
