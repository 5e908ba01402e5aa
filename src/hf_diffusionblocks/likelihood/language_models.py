"""Likelihoods of causal language models, blocked and ordinary, on the same rows and targets.

A blocked language model has two figures:

``blocks``
    block b's D on its own range of noise levels, as ``BlockedForCausalLM.denoise`` and generation along the noise
    grid use it.
``language_model``
    f of the next token's logits (``BlockedForCausalLM.forward``) at every noise level, ``readout="clean"`` only.
    No bound is needed: the figure is ``-log softmax(f)``. In a cascade its split says in which range the last block's
    knowledge is asked for, not what each block's layers add.

Both leave auxiliary layers out: at inference there are none. Three estimators, one figure:

``integral``
    noise levels are drawn; one pass per block and draw, noise levels differ from token to token.
``edges``
    ``readout="clean"`` only: one f serves all of a block's range, so the integral over the range is the difference of
    the cross-entropies given z at its edges (see the package). Neighbours see the same z at their common edge, so what
    is left of the noise in the sum is that of their difference: none where one f serves every noise level.
``controlled``
    ``integral`` with a control variate: only the difference from the exact form with one fixed f, that of the next
    token at sigma_max, is drawn as an integral; the fixed f's own is known from the edges. The noise shrinks as f(z)
    comes near that f; it may grow for a model that has not learned yet.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from ..families.causal_lm import BlockedForCausalLM
from ..objectives.next_token import next_tokens
from ..suggest import unknown_name
from .bound import (
    Errors,
    NoiseSampling,
    RowNoiseSampling,
    check_draws,
    cross_entropy_at,
    draw_range,
    noisy_at,
    prior_nats,
    summarise,
)
from .result import Likelihood, LikelihoodBound, RowSums
from .rows import BlockErrors, Targets, batches, evaluating, next_token_losses

DENOISERS = ("blocks", "language_model")
ESTIMATORS = ("edges", "controlled", "integral")


def likelihood_bound(
    model: BlockedForCausalLM,
    dataset: Any,
    *,
    denoiser: str | None = None,
    estimator: str | None = None,
    num_draws: int = 4,
    sampling: str = "importance",
    max_rows: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    characters_per_token: float | int | None = None,
) -> LikelihoodBound:
    """Negative log-likelihood of a blocked language model on held-out rows, with the share of each block.

    Args:
        model: with all blocks resident.
        dataset: ``dataset[list of indices]`` gives ``input_ids`` and perhaps ``labels``, ``position_ids``,
            ``attention_mask``.
        denoiser: ``blocks`` or ``language_model``, see the module. By default ``language_model`` where f is that of
            the whole model (``readout="clean"`` with a cascade or a single block), else ``blocks``.
        estimator: ``edges``, ``controlled`` or ``integral``, see the module; by default ``edges`` for
            ``readout="clean"``, else ``controlled``.
        num_draws: noise levels per token and block; 2 at least for an error of the noise alone.
        sampling: ``importance`` or ``log_uniform``, see ``bound``.
        max_rows: use the first so many rows only.
        batch_size: rows per forward pass.
        seed: of noise levels and noise.
        characters_per_token: for bits per character; by default what the data set says.

    Raises:
        ValueError: for a denoiser or estimator that the model does not have, tokens that do not fit, rows without a
            target, or a block that is not loaded.
    """
    denoiser = checked_denoiser(model, denoiser)
    estimator = _checked_estimator(model, estimator)
    check_draws(num_draws)
    edges, generator = model.partition.edges, torch.Generator().manual_seed(seed)
    samplings = range_samplings(model, sampling)
    sums, plain = RowSums(), RowSums()
    with evaluating(model):
        for batch in batches(dataset, batch_size, max_rows, model.device):
            targets = Targets(model, batch)
            plain.add(targets.next_token_losses().sum(1)[:, None, None], targets.counts)
            if estimator == "edges":
                parts = _between_edges(targets, denoiser, num_draws, generator)
            else:
                reference = targets.reference() if estimator == "controlled" else None
                parts = _integrals(targets, denoiser, samplings, num_draws, generator, reference)
            sums.add(parts, targets.counts)
    return summarise(
        sums,
        edges,
        cross_entropy_at_sigma_max=float(plain.mean(0)),
        num_draws=num_draws,
        exact=estimator == "edges" and (denoiser == "language_model" or model.config.num_blocks == 1),
        denoiser=denoiser,
        estimator=estimator,
        characters_per_token=known_characters_per_token(dataset, characters_per_token),
    )


def language_model_likelihood(
    model: PreTrainedModel,
    dataset: Any,
    *,
    max_rows: int | None = None,
    batch_size: int = 16,
    characters_per_token: float | int | None = None,
) -> Likelihood:
    """Negative log-likelihood of the next token's logits: blocked models and any causal language model alike.

    For a blocked model it is the cross-entropy at sigma_max. Rows and targets are those of ``likelihood_bound``,
    so the figures compare.

    Args:
        model: blocked, or any of transformers' with ``logits`` over the same tokens.
        dataset: as in ``likelihood_bound``.
        max_rows: use the first so many rows only.
        batch_size: rows per forward pass.
        characters_per_token: for bits per character; by default what the data set says.

    Raises:
        ValueError: for a model that predicts no next token, tokens that it does not know, or rows without a target.
    """
    _check_predicts_next(model)
    sums = RowSums()
    with evaluating(model):
        for batch in batches(dataset, batch_size, max_rows, model.device):
            _check_batch(model, batch)
            labels = next_tokens(batch)
            losses = next_token_losses(model, batch, labels)
            sums.add(losses.sum(1)[:, None, None], (labels >= 0).sum(1))
    return Likelihood(
        nats_per_token=float(sums.mean(0)),
        standard_error=float(sums.standard_error(0)),
        num_tokens=sums.num_tokens,
        characters_per_token=known_characters_per_token(dataset, characters_per_token),
    )


def _check_predicts_next(model: PreTrainedModel) -> None:
    """Raise a ``ValueError`` for a model whose logits are not those of the next token of ``input_ids``."""
    if isinstance(model, BlockedForCausalLM):
        return
    name, instead = type(model).__name__, getattr(model, "scored_by", None)
    other = name.endswith("ForMaskedLM") or getattr(model.config, "is_encoder_decoder", False)
    if instead is not None or other or "input_ids" not in inspect.signature(model.forward).parameters:
        call = f"call {instead}" if instead else "give a causal language model, blocked or of transformers"
        raise ValueError(f"a {name} predicts no next token: {call}.")


def checked_denoiser(model: BlockedForCausalLM, denoiser: str | None) -> str:
    """The denoiser whose likelihood is asked for.

    Raises:
        ValueError: if the model does not have it.
    """
    if not isinstance(model, BlockedForCausalLM):
        instead = getattr(model, "scored_by", "language_model_likelihood for an ordinary causal language model")
        raise ValueError(f"a {type(model).__name__} has no denoising bound of next tokens: call {instead}.")
    config = model.config
    if denoiser is None:
        whole = not config.two_stream and (config.context == "cascade" or config.num_blocks == 1)
        return "language_model" if whole else "blocks"
    if denoiser not in DENOISERS:
        raise ValueError(unknown_name("denoiser", denoiser, DENOISERS))
    if denoiser == "language_model" and config.two_stream:
        raise ValueError(
            f"denoiser='language_model' with readout={config.readout!r}: f depends on the noise level there. Give "
            "denoiser='blocks', or call language_model_likelihood for f at sigma_max."
        )
    return denoiser


def _checked_estimator(model: BlockedForCausalLM, estimator: str | None) -> str:
    if estimator is None:
        return "controlled" if model.config.two_stream else "edges"
    if estimator not in ESTIMATORS:
        raise ValueError(unknown_name("estimator", estimator, ESTIMATORS))
    if estimator == "edges" and model.config.two_stream:
        raise ValueError(
            f"estimator='edges' with readout={model.config.readout!r}: f depends on the noise level there, so noise "
            "levels have to be drawn. Give estimator='controlled' or 'integral'."
        )
    return estimator


def range_samplings(model: BlockedForCausalLM, sampling: str) -> list[NoiseSampling]:
    """The distribution of noise levels in each block's own range."""
    partition = model.partition
    kind = RowNoiseSampling if getattr(model.config, "noise_per", "token") == "row" else NoiseSampling
    return [kind(*partition.range(b), sampling) for b in range(partition.num_blocks)]


def walk(targets: Targets, denoiser: str) -> Iterator[tuple[int, BlockErrors]]:
    """Each block's number and the errors of the denoiser that serves its range."""
    if denoiser == "blocks":
        yield from targets.walk()
        return
    errors = targets.language_model()
    for block in range(targets.model.partition.num_blocks):
        yield block, errors


def _integrals(
    targets: Targets,
    denoiser: str,
    samplings: list[NoiseSampling],
    num_draws: int,
    generator: torch.Generator,
    reference: Errors | None,
) -> Float[Tensor, "rows draws parts"]:
    """Nats of each row: the integral over each block's range, the cross-entropy at sigma_min and the prior's term."""
    edges = targets.model.partition.edges
    parts = torch.zeros(len(targets.labels), num_draws, len(edges) + 1, dtype=torch.float64)
    for block, errors in walk(targets, denoiser):
        for i, draw in enumerate(
            draw_range(errors, targets.embedded, samplings[block], num_draws, generator, reference)
        ):
            parts[:, i, block] = draw.nats.sum(1).cpu()
            if block == targets.model.partition.block_of(edges[-1]):
                parts[:, i, -2] = cross_entropy_at(errors, targets.embedded, edges[-1], generator).sum(1).cpu()
    parts[..., -1] = prior_nats(targets.embedded, edges[0]).sum(1, keepdim=True).cpu()
    if reference is None:
        return parts
    for i in range(num_draws):
        levels = [cross_entropy_at(reference, targets.embedded, edge, generator).sum(1).cpu() for edge in edges]
        for block, (above, below) in enumerate(zip(levels, levels[1:], strict=False)):
            parts[:, i, block] += above - below
    return parts


def _between_edges(
    targets: Targets, denoiser: str, num_draws: int, generator: torch.Generator
) -> Float[Tensor, "rows draws parts"]:
    """The same from cross-entropies given z at the edges, for denoisers whose f does not depend on z.

    At sigma_max z is taken to tell nothing: there the cross-entropy is that of f alone, and there is no prior's term.
    """
    edges = targets.model.partition.edges
    all_errors: list[Any] = [errors for _, errors in walk(targets, denoiser)]
    parts = torch.zeros(len(targets.labels), num_draws, len(edges) + 1, dtype=torch.float64)
    for i in range(num_draws):
        above = all_errors[0].alone().double().sum(1).cpu()
        for block, edge in enumerate(edges[1:]):
            z, sigma = noisy_at(targets.embedded, edge, generator)
            below = all_errors[block](z, sigma)[1].double().sum(1).cpu()
            parts[:, i, block] = above - below
            if block + 1 < len(all_errors):
                above = all_errors[block + 1](z, sigma)[1].double().sum(1).cpu()
        parts[:, i, -2] = below
    return parts


def _check_batch(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    if isinstance(model, BlockedForCausalLM):
        model.check_batch(batch)
        return
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    low, high = int(batch["input_ids"].min()), int(batch["input_ids"].max())
    if size is not None and not 0 <= low <= high < size:
        raise ValueError(
            f"token {high if high >= size else low} is not in the model's vocabulary, 0 to {size - 1}: the rows were "
            "made by another tokenizer."
        )


def known_characters_per_token(dataset: Any, given: float | int | None) -> float | None:
    """Characters per token: as given, or what the data set says; None if neither does."""
    if given is None:
        return getattr(dataset, "characters_per_token", None)
    if not given > 0:
        raise ValueError(f"characters_per_token={given!r} must be positive.")
    return float(given)
