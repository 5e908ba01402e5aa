"""Scoring a masked diffusion language model on held-out text, and writing text with it."""

import math
import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.tokenizing import check_tokenizer
from ..families.masked_lm import BlockedForMaskedLM
from ..families.masked_lm_config import BlockedMaskedLMConfig
from ..likelihood import masked_likelihood_bound
from ..masked_generation import unmask
from ..recipes.sections import MaskedSampling, TextEvaluation
from .text import characters_per_token

_GAP = re.compile(r"<mask:(\d{1,6})>")


def score_masked_text(
    model: BlockedForMaskedLM,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: TextEvaluation,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The table of figures: the likelihood bound on held-out text, and each block's share.

    Args:
        model: with all blocks.
        dataset: held-out rows of token ids.
        tokenizer: that made them.
        settings: how many rows, and how many draws of masks per row and block.
        seed: of the masks.

    Returns:
        ``bound_bits_per_character`` with its standard error over rows and masks, and the error of the masks alone; the
        same in nats; each block's share, and what a hidden token costs it on average.
    """
    rows = len(dataset) if settings.rows is None else min(len(dataset), settings.rows)
    per_token = characters_per_token(dataset, tokenizer, rows)
    bound = masked_likelihood_bound(
        model,
        dataset,
        num_draws=settings.num_draws,
        max_rows=rows,
        batch_size=settings.batch_size,
        seed=seed,
        characters_per_token=per_token,
    )
    to_bits = 1 / math.log(2) / per_token
    ranges = [model.partition.range(b) for b in range(model.partition.num_blocks)]
    return {
        "bound_bits_per_character": bound.bits_per_character,
        "bound_standard_error": bound.standard_error * to_bits,
        "bound_monte_carlo_error": bound.monte_carlo_error * to_bits,
        "bound_bits_per_character_per_block": list(bound.bits_per_character_per_block or ()),
        "nats_per_token": bound.nats_per_token,
        "nats_per_hidden_token_per_block": [
            nats / (high - low) for nats, (low, high) in zip(bound.nats_per_block, ranges, strict=True)
        ],
        "held_out_tokens": bound.num_tokens,
    }


def gap_tokens(
    config: BlockedMaskedLMConfig, tokenizer: PreTrainedTokenizerBase, prompt: str, settings: MaskedSampling
) -> Tensor:
    """The tokens of a text with gaps, [1, tokens]: ``<mask:12>`` and what is to be added are mask tokens.

    Raises:
        ValueError: for a tokenizer that does not fit the model, nothing to fill, or more tokens than its positions.
    """
    check_tokenizer(tokenizer, config.vocab_size)
    ids: list[Any] = []
    for i, part in enumerate(_GAP.split(prompt)):  # text, length of a gap, text, ...
        if i % 2:
            ids += [config.mask_token_id] * int(part)
        elif part:
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    ids += [config.mask_token_id] * settings.max_new_tokens
    if config.mask_token_id not in ids:
        raise ValueError(
            f"the prompt {prompt!r} has no gap: write <mask:12> where 12 tokens are to be found, or add some after it "
            "(max_new_tokens)."
        )
    limit = config.max_position_embeddings
    if len(ids) > limit:
        raise ValueError(
            f"{len(ids)} tokens of prompt, gaps and new tokens are more than the model's {limit} positions: ask for "
            "fewer new ones (max_new_tokens), or shorten the prompt."
        )
    return torch.tensor([ids])


def fill_text(
    model: BlockedForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    settings: MaskedSampling,
    *,
    seed: int = 0,
) -> str:
    """A text with its gaps filled, and gone on with.

    Args:
        model: with all blocks.
        tokenizer: the model's.
        prompt: see ``gap_tokens``.
        settings: how to sample.
        seed: of everything random.

    Raises:
        ValueError: as ``gap_tokens``.
    """
    ids = gap_tokens(model.config, tokenizer, prompt, settings)
    training = model.training
    model.eval()
    try:
        tokens = unmask(
            model,
            ids,
            steps=settings.steps,
            order=settings.order,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            generator=torch.Generator().manual_seed(seed),
        )
    finally:
        model.train(training)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)
