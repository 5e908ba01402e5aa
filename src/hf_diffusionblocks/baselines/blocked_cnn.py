"""DiffusionBlocks on NoProp's network (arXiv 2506.14202, section on NoProp and App. E.6).

B blocks, each NoProp's whole network with the noise level in the place of the time; each denoises the label embedding
in its own range of noise levels, an equal share of the log-normal training distribution. The paper's settings are B = 3
and an overlap of 0.1.

``edm``
    the network's output F is preconditioned: D = c_skip z + c_out F(c_in z, c_noise, x), and the loss is
    w(sigma) |D - y|^2 (EDM, arXiv 2206.00364, Table 1).
``cross_entropy``
    the network gives class logits, D is the mean embedding under their softmax, and the loss is the cross-entropy, as
    the paper does for classifiers and language models.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..partition import BlockPartition
from ..preconditioning import EDMPreconditioning
from ..sampling import make_grid, sample_euler
from ..suggest import unknown_name
from .local_training import Images, Labels, LocalLoss
from .noprop_network import CNNClassifier, CNNConfig, DenoisingCNN, LabelEmbedding, standard_normal

LOSSES = ("edm", "cross_entropy")


class BlockedCNN(CNNClassifier):
    """B denoisers of label embeddings.

    Args:
        config: shape of the network; one-hot embeddings, which have norm 1 as the method wants.
        partition: of the noise levels, one "layer" per block; by default three blocks of equal probability.
        loss: ``edm`` or ``cross_entropy``.
        num_steps: of inference, on the grid of equal probability; the paper's is 4 for classifiers.
        sigma_data: of the preconditioning; by default the root mean square of a one-hot vector, 1 / sqrt(K).

    Raises:
        ValueError: for learned embeddings, an unknown loss or no steps.
    """

    def __init__(
        self,
        config: CNNConfig,
        partition: BlockPartition | None = None,
        loss: str = "edm",
        num_steps: int = 4,
        sigma_data: float | None = None,
    ):
        super().__init__(config)
        if config.embedding != "one_hot":
            raise ValueError(
                f"embedding={config.embedding!r}: blocks that share a learned table are not independent; use 'one_hot'."
            )
        if loss not in LOSSES:
            raise ValueError(unknown_name("loss", loss, LOSSES))
        self.partition = partition or BlockPartition.equal_probability(3, 3, overlap=0.1)
        self.sigmas = make_grid(self.partition, num_steps, "equal_probability")
        self.preconditioning = EDMPreconditioning(sigma_data or config.num_classes**-0.5)
        self.loss = loss
        self.blocks = nn.ModuleList(DenoisingCNN(config, timed=True) for _ in range(self.partition.num_blocks))
        self.embedding = LabelEmbedding(config)

    def parts(self) -> Sequence[Sequence[nn.Module]]:
        return [[block] for block in self.blocks]

    def losses(self, images: Images, labels: Labels, generator: torch.Generator) -> Iterator[LocalLoss]:
        y = self.embedding(labels)
        for b in range(len(self.blocks)):
            sigma = self.partition.sample(b, len(y), generator).to(y)
            z = y + sigma[:, None] * standard_normal(y, generator)
            output = self.output(b, images, z, sigma)
            if self.loss == "cross_entropy":
                yield b, F.cross_entropy(output, labels)
            else:
                error = (self.denoised(output, z, sigma) - y).square().mean(-1)
                yield b, (self.preconditioning.weight(sigma) * error).mean()

    def output(
        self, block: int, images: Images, z: Float[Tensor, "batch dim"], sigma: Float[Tensor, "batch"]
    ) -> Float[Tensor, "batch classes"]:
        """What a block's network gives: F, or class logits."""
        c = self.preconditioning(sigma)
        return self.blocks[block](images, c.c_in[:, None] * z, c.c_noise)

    def denoised(
        self, output: Float[Tensor, "batch classes"], z: Float[Tensor, "batch dim"], sigma: Float[Tensor, "batch"]
    ) -> Float[Tensor, "batch dim"]:
        """D, from the network's output."""
        if self.loss == "cross_entropy":
            return self.embedding.expected(output)
        c = self.preconditioning(sigma)
        return c.c_skip[:, None] * z + c.c_out[:, None] * output

    @torch.no_grad()
    def predict(self, images: Images, generator: torch.Generator) -> Int64[Tensor, "batch"]:
        noise = standard_normal(images.new_empty(len(images), self.embedding.weight.shape[1]), generator)

        def denoise(z: Tensor, sigma: float) -> Tensor:
            levels = z.new_full((len(z),), sigma)
            return self.denoised(self.output(self.partition.block_of(sigma), images, z, levels), z, levels)

        # The grid ends at 0, where the state is the last D.
        return self.embedding.nearest(sample_euler(denoise, self.partition.noise.sigma_max * noise, self.sigmas))
