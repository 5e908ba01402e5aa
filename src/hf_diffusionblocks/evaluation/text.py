"""Scoring a trained language model on held-out text, and generating text with it."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from ..data.tokenizing import check_tokenizer
from ..families.causal_lm import BlockedForCausalLM
from ..families.causal_lm_config import BlockedCausalLMConfig
from ..families.recurrent import BlockedRecurrentForCausalLM
from ..generation import denoising_generate
from ..likelihood import language_model_likelihood, likelihood_bound
from ..likelihood.shares import has_bound
from ..objectives import NextTokenPrediction
from ..recipes.sections import TextEvaluation, TextSampling
from ..training.data_stream import fetch


def characters_per_token(dataset: Any, tokenizer: PreTrainedTokenizerBase, rows: int) -> float:
    """Characters of text that a token of a data set stands for; of a stream, by decoding the first so many rows."""
    known = getattr(dataset, "characters_per_token", None)
    if known is not None:
        return known
    ids = fetch(dataset, list(range(rows)))["input_ids"]
    return sum(len(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)) / ids.numel()


def score_text(
    model: BlockedForCausalLM,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: TextEvaluation,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The table of figures: held-out likelihood of the language model, and what each block scores.

    Args:
        model: with all blocks.
        dataset: held-out rows of token ids.
        tokenizer: that made them.
        settings: how many rows, and how.
        seed: of the noise, for readouts that have some.

    Returns:
        ``bits_per_character`` of the next token's logits with its standard error over rows, the same in nats and as a
        perplexity, and ``local_bits_per_character_per_block``: the loss that each block is trained on, on held-out text
        (with noise, it ranks nothing across models). Where blocks have noise levels of their own, the likelihood bound
        as well: ``bound_bits_per_character``, the error that its noise leaves, and each block's share.
    """
    rows = len(dataset) if settings.rows is None else min(len(dataset), settings.rows)
    per_token = characters_per_token(dataset, tokenizer, rows)
    common: dict[str, Any] = {"max_rows": rows, "batch_size": settings.batch_size, "characters_per_token": per_token}
    to_bits = 1 / math.log(2) / per_token
    whole = language_model_likelihood(model, dataset, **common)
    local = NextTokenPrediction().held_out(model, dataset, max_samples=rows, batch_size=settings.batch_size, seed=seed)
    figures = {
        "bits_per_character": whole.bits_per_character,
        "bits_per_character_standard_error": whole.standard_error * to_bits,
        "nats_per_token": whole.nats_per_token,
        "perplexity_per_token": whole.perplexity,
        "local_bits_per_character_per_block": [loss * to_bits for loss in local.per_range],
        "held_out_tokens": whole.num_tokens,
    }
    if has_bound(model.config):
        bound = likelihood_bound(model, dataset, num_draws=settings.num_draws, seed=seed, **common)
        figures |= {
            "bound_bits_per_character": bound.bits_per_character,
            "bound_monte_carlo_error": bound.monte_carlo_error * to_bits,
            "bound_bits_per_character_per_block": list(bound.bits_per_character_per_block or ()),
        }
    return figures


def prompt_tokens(
    config: BlockedCausalLMConfig, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int
) -> Tensor:
    """The tokens of a prompt, [1, tokens], to which so many can be added.

    Raises:
        ValueError: for an empty prompt, a tokenizer that does not fit the model, or more tokens than its positions.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one character to go on from.")
    check_tokenizer(tokenizer, config.vocab_size)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if ids.shape[1] == 0:
        raise ValueError(f"the prompt {prompt!r} has no token: give one with text that the tokenizer knows.")
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and bool((ids == unknown).any()):
        warnings.warn(
            f"the prompt {prompt!r} holds characters that the tokenizer does not know: each is read as "
            f"{tokenizer.unk_token}.",
            stacklevel=2,
        )
    limit = config.max_position_embeddings
    if ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"{ids.shape[1]} tokens of prompt and {max_new_tokens} new ones are more than the model's {limit} "
            f"positions: ask for at most {max(limit - ids.shape[1], 0)} new ones, or shorten the prompt."
        )
    return ids


def recurrent_options(settings: TextSampling) -> dict[str, Any]:
    """What ``generate`` of a recurrent model is told for ``mode="denoise"``.

    A step is a recurrence: of a denoiser a noise level of the grid, of an unrolled core one of those that it is trained
    by.

    Raises:
        ValueError: for another grid or bridge than its own.
    """
    for name, own in (("grid", "equal_probability"), ("bridge", "posterior_mean")):
        if getattr(settings, name) != own:
            raise ValueError(
                f"sampling.{name}={getattr(settings, name)!r}: a recurrent model's walk has {name}={own!r} only. Leave "
                "it out."
            )
    return {} if settings.steps is None else {"num_recurrences": settings.steps}


@torch.no_grad()
def generate_text(
    model: BlockedForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    settings: TextSampling,
    *,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
) -> str:
    """A text that begins with a prompt.

    Args:
        model: with the blocks that are needed.
        tokenizer: the model's.
        prompt: at least one character.
        settings: how to generate.
        seed: of everything random; the caller's random state stays as it is.
        streamer: gets the tokens as they come.

    Raises:
        ValueError: for an empty prompt, a tokenizer that does not fit the model, or more tokens than its positions.
    """
    ids = prompt_tokens(model.config, tokenizer, prompt, settings.max_new_tokens).to(model.device)
    options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "do_sample": settings.do_sample}
    if settings.do_sample:
        options |= {"temperature": settings.temperature, "top_k": settings.top_k or 0, "top_p": settings.top_p}
    if settings.mode == "denoise":
        if isinstance(model, BlockedRecurrentForCausalLM):
            options |= recurrent_options(settings)
        else:
            options |= {"custom_generate": denoising_generate, "seed": seed}
            options |= {"steps": settings.steps, "grid": settings.grid, "bridge": settings.bridge}
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            tokens = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options)
    finally:
        model.train(training)
    text, head = (tokenizer.decode(t, skip_special_tokens=True) for t in (tokens[0], ids[0]))
    return prompt + text[len(head) :]  # unknown characters of the prompt are not in its tokens
