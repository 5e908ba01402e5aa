"""Where the information is: nats per range of noise levels, measured, and the partition that shares them equally.

A short pilot run is enough: the profile of a trained model says how many nats each range of noise levels costs. Cut so
that every block owns the same number of nats, no block is left with noise levels that are free (below them the nearest
embedding already is the answer) or that carry nothing.

Compare time warping in "Continuous diffusion for categorical data" (Dieleman et al. 2022, arXiv 2211.15089, section
4.1): there the *training distribution* of noise levels is learned, so that the cross-entropy grows linearly in warped
time. Here the distribution within a block stays what it is and the *edges* move; and what is shared equally is the
integrand of the likelihood bound, ``sigma^-3 ||e_y - D||^2``, whose sum is a likelihood, rather than the cross-entropy
given z, which it equals only where D is the posterior mean of one fixed distribution.
"""

import math
from typing import Any

import torch

from ..families.causal_lm import BlockedForCausalLM
from ..partition import BlockPartition, InformationProfile
from .bound import check_draws, cross_entropy_at, draw_range, prior_nats
from .language_models import checked_denoiser, range_samplings, walk
from .rows import Targets, batches, evaluating


def information_profile(
    model: BlockedForCausalLM,
    dataset: Any,
    *,
    num_bins: int = 64,
    denoiser: str | None = None,
    num_draws: int = 4,
    sampling: str = "importance",
    max_rows: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> InformationProfile:
    """Nats per token in bins of equal width in log sigma, from sigma_max down to sigma_min.

    The integral of the bound over each bin; the cross-entropy at sigma_min counts to the last bin and the prior's term
    to the first, so that the bins sum to the bound.

    Args:
        model: trained, with all blocks resident.
        dataset: as in ``likelihood_bound``.
        num_bins: how many.
        denoiser: as in ``likelihood_bound``.
        num_draws: noise levels per token and block.
        sampling: as in ``likelihood_bound``.
        max_rows: use the first so many rows only.
        batch_size: rows per forward pass.
        seed: of noise levels and noise.

    Raises:
        ValueError: for a model that has not been trained, and as ``likelihood_bound``.
    """
    denoiser = checked_denoiser(model, denoiser)
    check_draws(num_draws)
    if isinstance(num_bins, bool) or not isinstance(num_bins, int) or num_bins < model.partition.num_blocks:
        raise ValueError(f"num_bins={num_bins!r} must be a whole number of at least the number of blocks.")
    check_trained(model, denoiser)
    sigma_max, sigma_min = model.partition.edges[0], model.partition.edges[-1]
    log_edges = torch.linspace(math.log(sigma_max), math.log(sigma_min), num_bins + 1, dtype=torch.float64)
    nats, count, plain = torch.zeros(num_bins, dtype=torch.float64), 0, 0.0
    generator, samplings = torch.Generator().manual_seed(seed), range_samplings(model, sampling)
    with evaluating(model):
        for batch in batches(dataset, batch_size, max_rows, model.device):
            targets = Targets(model, batch)
            count += int(targets.counts.sum())
            plain += float(targets.next_token_losses().sum())
            nats[0] += float(prior_nats(targets.embedded, sigma_max).sum())
            for block, errors in walk(targets, denoiser):
                for draw in draw_range(errors, targets.embedded, samplings[block], num_draws, generator):
                    depth = (log_edges[0] - draw.sigma.double().log().cpu()) / (log_edges[0] - log_edges[-1])
                    bins = (depth * num_bins).long().clamp(0, num_bins - 1)
                    nats.index_add_(0, bins.flatten(), draw.nats.cpu().flatten() / num_draws)
                    if block == model.partition.block_of(sigma_min):
                        last = cross_entropy_at(errors, targets.embedded, sigma_min, generator)
                        nats[-1] += float(last.sum()) / num_draws
    if count == 0:
        raise ValueError("no token is scored: every row needs at least two tokens of one document.")
    _check_better_than_nothing(model, plain / count)
    edges = log_edges.exp().tolist()
    return InformationProfile((sigma_max, *edges[1:-1], sigma_min), tuple((nats / count).tolist()))


def equal_information_partition(
    model: BlockedForCausalLM,
    dataset: Any,
    num_blocks: int | None = None,
    *,
    layers_per_block: list[int] | None = None,
    overlap: float | int | None = None,
    **measuring: Any,
) -> BlockPartition:
    """From a model that a short pilot run has trained to the partition in which each block has the same nats.

    Put its edges into a new model's config: ``partition="equal_information", edges=list(partition.edges)``. Measure
    again after training: a block's share follows from what was learned in its range.

    Args:
        model: the pilot's, trained; any number of blocks.
        dataset: held-out rows, as in ``likelihood_bound``.
        num_blocks: of the new partition, by default the model's.
        layers_per_block: of the new partition, by default an even spread.
        overlap: of the new partition, by default the model's.
        **measuring: of ``information_profile``.

    Raises:
        ValueError: as ``information_profile`` and ``BlockPartition.equal_information``.
    """
    profile, partition = information_profile(model, dataset, **measuring), model.partition
    return BlockPartition.equal_information(
        profile,
        partition.num_blocks if num_blocks is None else num_blocks,
        partition.num_layers,
        partition.noise,
        partition.overlap if overlap is None else overlap,
        layers_per_block,
    )


def check_trained(model: BlockedForCausalLM, denoiser: str) -> None:
    """Raise a ``ValueError`` if the config does not say that what gives the denoiser has been trained.

    A pretrained base is a trained denoiser where the next token's f is the base's own.
    """
    config = model.config
    whole = config.context == "cascade" or config.num_blocks == 1
    if config.pretrained and not config.two_stream and whole and denoiser == "language_model":
        return
    missing = [b for b in range(config.num_blocks) if b not in config.trained_blocks]
    if missing:
        raise ValueError(
            f"blocks {missing} have not been trained (config.trained_blocks={config.trained_blocks}): a profile of "
            "their information would be one of random weights. Train a short pilot run first. The trainer's save_model "
            "notes the trained blocks in the config; after a training loop of your own set model.config."
            f"trained_blocks = {list(range(config.num_blocks))}."
        )


def _check_better_than_nothing(model: BlockedForCausalLM, nats: float) -> None:
    """Raise a ``ValueError`` if next tokens are predicted no better than by an even guess, whatever the config says."""
    even = math.log(model.config.vocab_size)
    if not nats < even:
        raise ValueError(
            f"the model's next tokens cost {nats:.3f} nats, an even guess among {model.config.vocab_size} tokens "
            f"{even:.3f}: it has learned nothing of such text. Train a longer pilot run on text like this."
        )
