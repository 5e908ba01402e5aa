r"""A sampler that stops after each step, so that somebody can watch which block works.

It takes the steps that ``BlockedDiTPipeline`` takes: a solver on two neighbouring noise levels of the grid at a time is
the solver on the whole grid, since no step knows more than the state and its two noise levels (EDM, arXiv 2206.00364,
Alg. 2). What is drawn is the same, bit for bit.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..pipelines import BlockedDiTPipeline, decode_latents
from ..sampling import guided, make_grid, make_solver


@dataclass(frozen=True)
class DenoisingStep:
    """A step of the sampler.

    Attributes:
        number: 1 for the first.
        total: how many there are.
        sigma: noise level that the step begins with.
        sigma_next: noise level that it ends with; 0 after the last.
        block: the block that owns ``sigma``. Heun's correction is evaluated by the owner of ``sigma_next``.
        layers: numbers of that block's layers in the whole network.
        noisy: z at ``sigma``, brought to the data's variance, in [0, 1].
        denoised: the block's estimate D(z, sigma), in [0, 1].
        images: the state after the step, as ``noisy``; after the last step, the images.
    """

    number: int
    total: int
    sigma: float
    sigma_next: float
    block: int
    layers: tuple[int, ...]
    noisy: Float[Tensor, "batch channels height width"]
    denoised: Float[Tensor, "batch channels height width"]
    images: Float[Tensor, "batch channels height width"]


def denoising_steps(
    pipe: BlockedDiTPipeline,
    class_labels: Sequence[int],
    num_inference_steps: int = 18,
    guidance_scale: float = 1.0,
    seed: int = 0,
    solver: str = "euler",
    grid: str = "karras",
) -> Iterator[DenoisingStep]:
    """Sample one image per label, step by step, with the built-in solvers.

    Args:
        pipe: the pipeline; a scheduler that it may have is not used.
        class_labels: classes; ``num_classes`` stands for no class.
        num_inference_steps: steps.
        guidance_scale: classifier-free guidance; 1 switches it off.
        seed: of the noise: ``pipe(..., generator=torch.Generator(device).manual_seed(seed))`` draws the same images.
        solver: ``euler`` or ``heun``.
        grid: ``karras`` or ``equal_probability``.

    Yields:
        A ``DenoisingStep`` after each step; the last one's ``images`` are the result. The model goes back to the mode
        that it was in when the generator ends or is closed.

    Raises:
        ValueError: for labels out of range, no labels, a scale that is not finite, an unknown solver or grid, fewer
            than one step, or a block that is not loaded.
    """
    model, device = pipe.model, pipe.model.device
    labels = torch.as_tensor(list(class_labels), dtype=torch.int64, device=device)
    if len(labels) == 0:
        raise ValueError("class_labels is empty: give at least one label.")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale={guidance_scale} must be a finite number; 1 switches guidance off.")
    partition, solve = model.partition, make_solver(solver)
    sigmas = make_grid(partition, num_inference_steps, grid)
    levels = sigmas.tolist()
    blocks = [partition.block_of(sigma) for sigma in levels[:-1]]
    for block in blocks:
        model.check_loaded(block)
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn((len(labels), *pipe.sample_shape), generator=generator, device=device, dtype=model.dtype)
    z = levels[0] * noise.float()  # z ~ sigma_max N(0, I)   (EDM, Alg. 2)
    denoise = guided(model.denoise, labels, model.config.num_classes, guidance_scale)
    seen: list[tuple[Tensor, Tensor]] = []
    training = model.training
    try:
        with model.expect_blocks(blocks):
            for step, block in enumerate(blocks):
                model.eval()
                with torch.no_grad():
                    z = solve(denoise, z, sigmas[step : step + 2], lambda _, s, noisy, d: seen.append((noisy, d)))
                    noisy, denoised = seen.pop()
                    pictures = [
                        _picture(pipe, _scaled(noisy, levels[step], model.config.sigma_data)),
                        _picture(pipe, denoised),
                        _picture(pipe, _scaled(z, levels[step + 1], model.config.sigma_data)),
                    ]
                yield DenoisingStep(
                    step + 1,
                    len(blocks),
                    levels[step],
                    levels[step + 1],
                    block,
                    tuple(partition.layers(block)),
                    *pictures,
                )
    finally:
        model.train(training)


def _scaled(z: Tensor, sigma: float, sigma_data: float) -> Tensor:
    """z with the variance of the data, whatever the noise level; unchanged at 0."""
    return z * sigma_data / math.hypot(sigma, sigma_data)


def _picture(pipe: BlockedDiTPipeline, z: Tensor) -> Float[Tensor, "batch channels height width"]:
    """What the model works with, as images in [0, 1] on the CPU."""
    images = z if pipe.vae is None else decode_latents(pipe.vae, z)
    return (images.float() / 2 + 0.5).clamp(0, 1).cpu()


__all__ = ["DenoisingStep", "denoising_steps"]
