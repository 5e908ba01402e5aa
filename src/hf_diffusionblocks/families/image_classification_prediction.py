"""What a blocked image classifier answers: its blocks in a row, or a walk down the noise levels.

In a walk, z at sigma becomes ``(sigma' / sigma) z + (1 - sigma' / sigma) D`` at the next level sigma', with
``D = sum_k p_k e_k`` (Euler's step of EDM, arXiv 2206.00364, Alg. 2); the last level's p is the answer.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..noise import equal_probability_grid
from .image_classification_config import check_count

if TYPE_CHECKING:
    from .image_classification import BlockedForImageClassification


def clean_prediction(
    model: "BlockedForImageClassification",
    pixel_values: Float[Tensor, "batch channels height width"],
    block: int | None = None,
    *,
    with_states: bool = False,
) -> tuple[Float[Tensor, "batch classes"], tuple[Float[Tensor, "batch positions width"], ...] | None]:
    """Logits without noise, and perhaps the hidden states on the way, as the base gives them.

    Args:
        model: with the blocks that are needed.
        pixel_values: images.
        block: which of independent blocks, 0 by default; a cascade's is its last.
        with_states: give the embedded image and the output of each layer too, else None.

    Raises:
        ValueError: for another block of a cascade, or one that does not exist.
    """
    last = model.partition.num_blocks - 1
    if model.config.context == "independent":
        block = 0 if block is None else block
        model.partition.check_block(block)
        chain: tuple[int, ...] = (block,)
    elif block in (None, last):
        chain = tuple(range(last + 1))
    else:
        raise ValueError(f"block={block}: a cascade's logits come from its last block, {last}.")
    hidden = model.start(pixel_values, chain[0])
    states = [hidden]
    for b in chain:
        for layer in model.block(b).layers:
            hidden = layer(hidden, None)
            if with_states:
                states.append(hidden)
    module = model.block(chain[-1])
    return module.classifier(module.features(hidden)), tuple(states) if with_states else None


def walk(
    model: "BlockedForImageClassification",
    pixel_values: Float[Tensor, "batch channels height width"],
    steps: int | None,
    draws: int | None,
    generator: torch.Generator | None,
) -> Float[Tensor, "batch classes"]:
    """Logarithms of the probabilities at the end of a walk down the noise levels, averaged over draws.

    Args:
        model: with the blocks that are needed.
        pixel_values: images.
        steps: noise levels; the config's if None.
        draws: of the starting noise; the config's if None.
        generator: of the starting noise; if None, one that starts anew.

    Raises:
        ValueError: for numbers of steps or draws that are no whole numbers of at least 1.
    """
    steps = model.config.num_inference_steps if steps is None else steps
    draws = model.config.num_draws if draws is None else draws
    for name, value in (("num_inference_steps", steps), ("num_draws", draws)):
        check_count(name, value)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    noise: Any = model.partition.noise  # of sigma
    levels = equal_probability_grid(steps, noise).tolist()
    contexts = _contexts(model, pixel_values, {model.partition.block_of(level) for level in levels})
    ends, count = [], len(pixel_values)
    for _ in range(draws):
        noise = torch.randn(model.config.hidden_size, generator=generator, device=generator.device)
        z = (levels[0] * noise).to(pixel_values.device).expand(count, -1)
        for level, lower in zip(levels, [*levels[1:], None], strict=True):
            block = model.partition.block_of(level)
            sigma = torch.full((count,), level, device=z.device)
            logits = model.target_logits(contexts[block], z, sigma, block)
            if lower is not None:
                z = (lower / level) * z + (1 - lower / level) * model.posterior_mean(logits)
        ends.append(logits.log_softmax(-1))
    return torch.stack(ends).logsumexp(0) - torch.tensor(float(draws)).log().item()


def _contexts(model: "BlockedForImageClassification", pixel_values: Tensor, blocks: set[int]) -> dict[int, Tensor]:
    """What the clean stream of each of some blocks starts from; a cascade's lower blocks run once."""
    if model.config.context == "independent":
        return {b: model.start(pixel_values, b) for b in sorted(blocks)}
    hidden, found = model.start(pixel_values), {}
    for b in range(max(blocks) + 1):
        found[b] = hidden
        if b < max(blocks):
            hidden = model.clean_block(hidden, b)
    return found
