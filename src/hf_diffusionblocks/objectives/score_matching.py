"""Denoising score matching on a block's noise range, and the held-out loss that ranks models.

arXiv 2506.14202, section 3, with the weight of EDM (arXiv 2206.00364, Table 1).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..batches import fetch
from ..modeling import BlockedPreTrainedModel
from .result import HeldOutLoss, ObjectiveResult
from .teacher import freeze_teacher


def weighted_error(
    denoised: Float[Tensor, "batch ..."], target: Float[Tensor, "batch ..."], weight: Float[Tensor, "batch"]
) -> Float[Tensor, "batch"]:
    """``w(sigma) ||D - y||^2``, mean over a sample's elements, one value per sample (EDM, arXiv 2206.00364, Eq. 2).

    The weight must have one value per sample. With shape [batch, 1] the product would broadcast to [batch, batch],
    whose mean is mean(loss) * mean(weight): the weighting would silently be gone.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if weight.shape != denoised.shape[:1] or denoised.shape != target.shape:
        raise ValueError(
            f"weights of shape {list(weight.shape)} for errors of shape {list(denoised.shape[:1])} "
            f"(output {list(denoised.shape)}, target {list(target.shape)}): one weight per sample is needed."
        )
    return weight * (denoised - target).pow(2).flatten(1).mean(1)


@dataclass
class DenoisingScoreMatching:
    """Denoising score matching on a block's noise range (arXiv 2506.14202, Eq. 5; EDM's weight).

    Args:
        teacher: a frozen blocked model of the same data, such as the converted base with B = 1. Its denoiser on the
            same noisy samples becomes a second target (distillation).
        distillation_weight: factor on the distillation loss; the data loss has factor ``1 - distillation_weight``.
        horizontal_flip: mirror each image with probability 1/2, from the block's own random stream.
        null_conditioning: for models of prompts, what the empty prompt is encoded to, by column, each of one sample
            (``encoder_hidden_states`` [length, width], ...): it replaces the prompt of a share ``label_dropout`` of the
            samples. Without it no prompt is dropped.

    Raises:
        ValueError: for a weight outside [0, 1], or one that needs a teacher and has none.
    """

    teacher: Any = None
    distillation_weight: float = 0.0
    horizontal_flip: bool = False
    null_conditioning: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        freeze_teacher(self.teacher, self.distillation_weight)

    def __call__(
        self,
        model: BlockedPreTrainedModel,
        block: int,
        batch: dict[str, Tensor],
        generator: torch.Generator | None = None,
    ) -> ObjectiveResult:
        """Loss of one block on one batch.

        Args:
            model: the blocked model.
            block: which block; no other block takes part.
            batch: ``pixel_values`` [batch, channels, height, width], images in [-1, 1] or latents as the model works
                with them, and ``class_labels`` [batch]; for models of prompts instead the columns that the model is
                conditioned on, encoded beforehand: ``encoder_hidden_states`` [batch, length, width] and, as the class
                has them, ``encoder_attention_mask`` [batch, length], ``pooled_projections`` [batch, width] or
                ``guidance`` [batch].
            generator: CPU generator of everything random here: flips, noise levels, noise, label dropout.
        """
        y = batch["pixel_values"].float()
        n, device = len(y), y.device
        if self.horizontal_flip:
            flip = _uniform(n, generator, device) < 0.5
            y = torch.where(flip[:, None, None, None], y.flip(-1), y)
        sigma = model.partition.sample(block, n, generator).to(device, torch.float32)
        epsilon = torch.randn(y.shape, generator=generator, device="cpu").to(device, non_blocking=True)
        z = y + sigma[:, None, None, None] * epsilon
        drop = _uniform(n, generator, device) < model.config.label_dropout
        conditioning = model.conditioning(batch, drop, self.null_conditioning)
        denoised = model.denoise(z, sigma, block=block, **conditioning)
        weight = model.preconditioning.weight(sigma)
        data = weighted_error(denoised, y, weight)
        parts = {}
        loss = data.mean()
        if self.distillation_weight > 0:
            with torch.no_grad():
                target = denoise_routed(self.teacher, z, sigma, **conditioning)
            distilled = weighted_error(denoised, target, weight).mean()
            parts = {"data_loss": loss.detach(), "distillation_loss": distilled.detach()}
            loss = (1 - self.distillation_weight) * loss + self.distillation_weight * distilled
        return ObjectiveResult(loss, sigma, data.detach(), parts)

    def held_out(self, model: BlockedPreTrainedModel, dataset: Any, **settings: Any) -> HeldOutLoss:
        """``held_out_loss``."""
        return held_out_loss(model, dataset, **settings)


def _uniform(n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    return torch.rand(n, generator=generator, device="cpu").to(device)


def denoise_routed(
    model: BlockedPreTrainedModel, z: Tensor, sigma: Float[Tensor, "batch"], **conditioning: Tensor
) -> Tensor:
    """Denoise a batch whose noise levels may span blocks: each sample goes to the block that owns its sigma.

    Args:
        model: the blocked model, with every needed block resident.
        z: noisy samples [batch, ...].
        sigma: noise levels [batch].
        **conditioning: tensors [batch, ...].
    """
    owners = model.partition.block_of(sigma)
    output = torch.empty_like(z, dtype=torch.float32 if z.dtype != torch.float64 else z.dtype)
    for block in owners.unique().tolist():
        chosen = owners == block
        part = {name: value[chosen] for name, value in conditioning.items()}
        output[chosen] = model.denoise(z[chosen], sigma[chosen], block=block, **part)
    return output


@torch.no_grad()
def held_out_loss(
    model: BlockedPreTrainedModel,
    dataset: Any,
    *,
    num_draws: int = 1,
    edges: list[float] | None = None,
    max_samples: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> HeldOutLoss:
    """The figure that ranks models: EDM's weighted denoising loss on held-out data, sampled block by block at random.

    Noise levels are stratified over the whole training distribution (no overlap), and they and the noise depend on
    ``seed`` alone, so every model is scored on the same noisy images. Labels are never dropped.

    Args:
        model: a blocked model with all blocks resident.
        dataset: ``dataset[list of indices]`` gives ``pixel_values`` and ``class_labels``, or the prompts' columns.
        num_draws: noise draws per image.
        edges: descending noise levels to report ranges by; the model's own by default.
        max_samples: use the first so many images only.
        batch_size: images per forward pass.
        seed: of the noise.

    Raises:
        ValueError: for a model that does not denoise images, or a data set without any.
    """
    if not hasattr(model, "conditioning"):
        instead = getattr(model, "scored_by", None)
        call = f"call {instead}" if instead else "cut one into a BlockedDiTModel"
        raise ValueError(f"held_out_loss is of models that generate images, not of a {type(model).__name__}: {call}.")
    noise = model.partition.noise
    edges = list(model.partition.edges if edges is None else edges)
    count = min(len(dataset), max_samples or len(dataset))
    generator = torch.Generator().manual_seed(seed)
    total = count * num_draws
    strata = torch.randperm(total, generator=generator)
    q = (strata + torch.rand(total, generator=generator, dtype=torch.float64)) / total
    sigmas = noise.icdf(q).float()
    training, device = model.training, next(model.parameters()).device
    model.eval()
    losses = torch.empty(total, dtype=torch.float64)
    for start in range(0, total, batch_size):
        rows = torch.arange(start, min(start + batch_size, total))
        batch = fetch(dataset, (rows % count).tolist())
        if "pixel_values" not in batch:
            raise ValueError(
                f"a batch holds {sorted(batch)}; held_out_loss needs 'pixel_values': give a set of images."
            )
        y, sigma = batch["pixel_values"].to(device, torch.float32), sigmas[rows].to(device)
        z = y + sigma[:, None, None, None] * torch.randn(y.shape, generator=generator).to(device)
        conditioning = {name: value.to(device) for name, value in model.conditioning(batch).items()}
        denoised = denoise_routed(model, z, sigma, **conditioning)
        losses[rows] = weighted_error(denoised, y, model.preconditioning.weight(sigma)).double().cpu()
    model.train(training)
    per_range = []
    for high, low in zip(edges, edges[1:], strict=False):
        inside = (sigmas <= high) & (sigmas >= low)
        per_range.append(float(losses[inside].mean()) if inside.any() else float("nan"))
    error = float(losses.std()) / total**0.5 if total > 1 else math.nan  # not known of one sample
    return HeldOutLoss(float(losses.mean()), per_range, edges, total, error)
