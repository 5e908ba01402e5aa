"""Label prediction, block by block: cross-entropy given the image alone, or given it and a noisy label.

``clean``: block b's own layers, then its auxiliary layers and head, score the label (a local loss; the limit
sigma -> infinity of the paper's). ``exact`` and ``edm``: the label's embedding gets noise from the block's range,
and the loss is the cross-entropy of the label (arXiv 2506.14202, section 4). EDM's weight is derived for squared
errors; a cross-entropy has none.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..augmentation import RandAugment
from ..batches import fetch
from ..families.image_classification import BlockedForImageClassification
from .exact_gradient import ExactGradient
from .result import HeldOutLoss, ObjectiveResult
from .teacher import freeze_teacher


@dataclass
class LabelPrediction:
    """Cross-entropy of the label in one block.

    Args:
        teacher: a frozen image classifier over the same classes, such as the base before it was cut.
        distillation_weight: share of the Kullback-Leibler divergence from the teacher's distribution in the loss; the
            data's cross-entropy has the rest.
        horizontal_flip: mirror each image with probability 1/2, from the block's own random stream.
        rand_augment: then change it by RandAugment with its defaults, from the same stream.

    Raises:
        ValueError: for a weight outside [0, 1], or one that needs a teacher and has none.
    """

    teacher: Any = None
    distillation_weight: float = 0.0
    horizontal_flip: bool = False
    rand_augment: bool = False

    def __post_init__(self) -> None:
        freeze_teacher(self.teacher, self.distillation_weight)

    def __call__(
        self,
        model: BlockedForImageClassification,
        block: int,
        batch: dict[str, Tensor],
        generator: torch.Generator | None = None,
    ) -> ObjectiveResult:
        """Loss of one block on one batch, in nats per image.

        Args:
            model: the blocked model. In a cascade the blocks below run forward only, unless ``batch`` holds their
                output.
            block: which block.
            batch: ``pixel_values`` [batch, channels, height, width] and ``class_labels`` [batch]; perhaps
                ``hidden_states`` [batch, positions, width], what the block's clean stream starts from.
            generator: CPU generator of flips, RandAugment and noise.
        """
        batch = self.prepare(batch, generator)
        labels = batch["class_labels"]
        hidden = model.start_of(block, batch)
        sigma = torch.zeros(0)
        if model.config.two_stream:
            z, sigma = noisy_labels(model, block, labels, generator)
            logits = model.target_logits(hidden, z, sigma, block)
        else:
            logits = model.training_logits(model.clean_block(hidden, block), block)
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        loss, parts = losses.mean(), {}
        if self.distillation_weight:
            with torch.no_grad():
                known = self.teacher(pixel_values=batch["pixel_values"].to(self.teacher.dtype)).logits.float()
            mine = logits.float().log_softmax(-1)
            divergence = F.kl_div(mine, known.log_softmax(-1), log_target=True, reduction="batchmean")
            parts = {"data_loss": loss.detach(), "distillation_loss": divergence.detach()}
            loss = (1 - self.distillation_weight) * loss + self.distillation_weight * divergence
        return ObjectiveResult(loss, sigma, losses.detach(), parts)

    def prepare(self, batch: dict[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        """The batch with images mirrored and changed at random.

        Raises:
            ValueError: if what the blocks below made of the images is at hand, which cannot be changed.
        """
        changed = [name for name in ("horizontal_flip", "rand_augment") if getattr(self, name)]
        if changed and "hidden_states" in batch:
            raise ValueError(
                f"{changed[0]}=True with hidden_states of the images as they are: use lower_outputs='recompute'."
            )
        images = batch["pixel_values"]
        if self.horizontal_flip:
            flip = torch.rand(len(images), generator=generator, device="cpu").to(images.device) < 0.5
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        if self.rand_augment:
            images = RandAugment()(images, generator)
        return batch | {"pixel_values": images} if changed else batch

    @torch.no_grad()
    def held_out(
        self,
        model: BlockedForImageClassification,
        dataset: Any,
        *,
        num_draws: int = 1,
        max_samples: int | None = None,
        batch_size: int = 256,
        seed: int = 0,
    ) -> HeldOutLoss:
        """Cross-entropy on held-out images, nats per image: of the model's prediction, and of each block.

        ``total`` is that of ``BlockedForImageClassification.forward``. ``per_range`` is each block's own loss: with
        its auxiliary layers (``clean``), or at noise levels drawn from its range (``exact``, ``edm``), which ranks
        nothing across models, because low noise is free.

        Args:
            model: with all blocks resident.
            dataset: ``dataset[list of indices]`` gives a batch.
            num_draws: unused; for the interface of other objectives.
            max_samples: use the first so many images only.
            batch_size: images per forward pass.
            seed: of the noise.
        """
        training, device = model.training, model.device
        model.eval()
        generator = torch.Generator().manual_seed(seed)
        plain, count = LabelPrediction(), min(len(dataset), max_samples or len(dataset))
        total: list[Tensor] = []
        blocks: list[list[Tensor]] = [[] for _ in range(model.partition.num_blocks)]
        for start in range(0, count, batch_size):
            batch = fetch(dataset, list(range(start, min(start + batch_size, count))))
            batch = {k: v.to(device) for k, v in batch.items()}
            logits = model(batch["pixel_values"]).logits.float()
            total.append(F.cross_entropy(logits, batch["class_labels"], reduction="none").cpu())
            state: dict[str, Tensor] = {}
            for b in range(model.partition.num_blocks):
                blocks[b].append(plain(model, b, batch | state, generator).per_sample.cpu())
                if model.config.context == "cascade" and b < model.partition.num_blocks - 1:
                    state = {"hidden_states": model.clean_block(model.start_of(b, batch | state), b)}
        model.train(training)
        losses = torch.cat(total)
        per_block = [float(torch.cat(values).mean()) for values in blocks]
        error = float(losses.std() / max(len(losses), 1) ** 0.5)
        return HeldOutLoss(float(losses.mean()), per_block, list(model.partition.edges), len(losses), error)


@dataclass
class ExactLabelPrediction(ExactGradient, LabelPrediction):
    """Cross-entropy of the last block's label, in nats per image, with its exact gradient in one block.

    Raises:
        ValueError: for a teacher: only the data's loss is known.
    """

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["class_labels"]

    def losses(
        self, model: BlockedForImageClassification, output: Tensor, targets: Tensor, block: int, tied: bool
    ) -> Tensor:
        module = model.block(block)
        logits = module.classifier(module.features(output))
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def by_sample(self, losses: Tensor, targets: Tensor) -> Tensor:
        return losses.detach()


def noisy_labels(
    model: BlockedForImageClassification, block: int, labels: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """``z = e_k + sigma eps``, [batch, width], and sigma [batch], drawn from the block's training range."""
    sigma = model.partition.sample(block, len(labels), generator).to(labels.device, torch.float32)
    y = model.target_table()[labels]
    noise = torch.randn(y.shape, generator=generator, device="cpu").to(y.device, non_blocking=True)
    return y + sigma[:, None] * noise, sigma
