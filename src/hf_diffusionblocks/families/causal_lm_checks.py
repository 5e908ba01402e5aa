"""Checks of what a language model is given."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from ..suggest import unknown_name
from .causal_lm_config import BlockedCausalLMConfig

IGNORED = -100
# What transformers passes to every decoder besides the arguments of BlockedForCausalLM.forward.
_PASSED_ON = frozenset(
    "cache_position cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k num_items_in_batch seq_idx is_causal".split()
)
_ARGUMENTS = frozenset(
    "input_ids attention_mask position_ids past_key_values inputs_embeds labels use_cache logits_to_keep block "
    "return_dict".split()
)
# What generate needs for stop strings and assistants, and hands to every forward pass as well.
STOP_STRING_TOOLS = ("tokenizer", "assistant_tokenizer")
_NOT_GIVEN = ("output_hidden_states", "output_attentions", "output_router_logits")


def check_keywords(given: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for an output that is not given, a ``TypeError`` for an unknown keyword of ``forward``."""
    for name, value in given.items():
        if name in _NOT_GIVEN:
            if value:
                raise ValueError(
                    f"{name}={value!r}: a blocked language model gives logits and a cache only. Leave it out, or use "
                    "context_of() and clean_block() for a block's hidden states."
                )
        elif name not in _PASSED_ON and value is not None:
            raise TypeError(unknown_name("keyword", name, _ARGUMENTS | _PASSED_ON))


def check_tokens(
    config: BlockedCausalLMConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
) -> None:
    """Raise a ``ValueError`` for tokens or embeddings, and what goes with them, that do not fit the model."""
    given, name = (input_ids, "input_ids") if input_ids is not None else (inputs_embeds, "inputs_embeds")
    if given is None:
        return
    if input_ids is None:
        _check_embeddings(config, inputs_embeds)
    elif input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids has shape {list(input_ids.shape)} and dtype {input_ids.dtype}: give whole numbers of "
            "shape [batch, tokens]."
        )
    batch, tokens = given.shape[:2]
    if batch == 0:
        raise ValueError(f"{name} has shape {list(given.shape)}, a batch of no rows: give at least one.")
    if tokens == 0:
        raise ValueError(f"{name} is empty: give at least one token, such as the beginning-of-text token.")
    if input_ids is not None:
        low, high = int(input_ids.min()), int(input_ids.max())
        if not (0 <= low and high < config.vocab_size):
            raise ValueError(
                f"input_ids run from {low} to {high}; the model's vocabulary has {config.vocab_size} tokens, "
                f"0 to {config.vocab_size - 1}. Use the tokenizer that the model was made with."
            )
    seen = 0 if cache is None else int(cache.get_seq_length())
    if cache is not None and seen > 0:
        cached = cache.layers[0].keys.shape[0]
        if cached != batch:
            raise ValueError(
                f"past_key_values holds a batch of {cached}, {name} one of {batch}: it is another "
                "batch's cache. Start with past_key_values=None."
            )
    if seen + tokens > config.max_position_embeddings:
        raise ValueError(
            f"{seen + tokens} tokens are more than the model's {config.max_position_embeddings} positions. Shorten the "
            "input, or raise max_position_embeddings before training."
        )
    _check_positions(config, position_ids, batch, tokens)
    _check_mask(attention_mask, batch, tokens, seen)
    _check_labels(config, labels, batch, tokens)


def _check_embeddings(config: BlockedCausalLMConfig, inputs_embeds: Tensor) -> None:
    shape = list(inputs_embeds.shape)
    if len(shape) != 3 or shape[2] != config.hidden_size or not inputs_embeds.is_floating_point():
        raise ValueError(
            f"inputs_embeds has shape {shape} and dtype {inputs_embeds.dtype}: give floating-point numbers of shape "
            f"[batch, tokens, {config.hidden_size}]."
        )


def _check_positions(config: BlockedCausalLMConfig, position_ids: Tensor | None, batch: int, tokens: int) -> None:
    if position_ids is None:
        return
    shape = list(position_ids.shape)
    if shape not in ([1, tokens], [batch, tokens]) or position_ids.is_floating_point():
        raise ValueError(
            f"position_ids has shape {shape} and dtype {position_ids.dtype}: give whole numbers of shape "
            f"{[batch, tokens]}, one per token."
        )
    high = int(position_ids.max())
    if high >= config.max_position_embeddings:
        raise ValueError(
            f"position_ids go up to {high}; the model has {config.max_position_embeddings} positions, 0 to "
            f"{config.max_position_embeddings - 1}. Shorten the input, or raise max_position_embeddings before "
            "training."
        )


def _check_mask(attention_mask: Tensor | None, batch: int, tokens: int, seen: int) -> None:
    if attention_mask is None or attention_mask.ndim == 4:  # a mask of queries and keys, for the base's layers
        return
    if list(attention_mask.shape) != [batch, seen + tokens]:
        cached = f" ({seen} of them in past_key_values)" if seen else ""
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}: give {[batch, seen + tokens]}, one number for "
            f"each of the {seen + tokens} tokens{cached}, 0 at padding."
        )
    empty = (attention_mask == 0).all(dim=1)
    if bool(empty.any()):
        raise ValueError(f"row {int(empty.int().argmax())} of attention_mask is all padding: drop that row.")


def _check_labels(config: BlockedCausalLMConfig, labels: Tensor | None, batch: int, tokens: int) -> None:
    if labels is None:
        return
    if list(labels.shape) != [batch, tokens] or labels.is_floating_point():
        masked = getattr(config, "mask_token_id", None) is not None
        where = "Each is of the token in its own place." if masked else "They are shifted inside."
        raise ValueError(
            f"labels has shape {list(labels.shape)} and dtype {labels.dtype}: give whole numbers of shape "
            f"{[batch, tokens]}, as input_ids. {where}"
        )
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= config.vocab_size))
    if bool(wrong.any()):
        raise ValueError(
            f"labels hold {int(labels[wrong][0])}; the model's vocabulary has {config.vocab_size} tokens, 0 to "
            f"{config.vocab_size - 1}. Set positions without a label to {IGNORED}."
        )


def check_some_target(losses: Tensor) -> None:
    """Raise a ``ValueError`` if no token of a batch has a loss."""
    if losses.numel() == 0:
        raise ValueError(
            f"no position of the batch has a token to predict: labels from the second token on are all {IGNORED}, or "
            "padding or a new document follows every token. Leave such rows out."
        )


def check_generated_length(config: BlockedCausalLMConfig, tokens: int, max_length: int) -> None:
    """Raise a ``ValueError`` if a prompt and the tokens to be generated are more than the model's positions."""
    limit = config.max_position_embeddings
    if max_length > limit:
        raise ValueError(
            f"{tokens} tokens of prompt and {max_length - tokens} new ones are more than the model's {limit} "
            f"positions: set max_new_tokens to at most {max(limit - tokens, 0)}, or shorten the prompt."
        )


def check_denoising(given: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for arguments of ``generate`` that mean something to ``denoising_generate`` only."""
    names = [name for name in ("steps", "grid", "bridge", "seed") if name in given]
    if names and given.get("custom_generate") is None:
        raise ValueError(
            f"{', '.join(names)}: ordinary decoding walks no noise grid. Give custom_generate=denoising_generate (from "
            f"hf_diffusionblocks.generation) as well, or leave {' and '.join(names)} out."
        )
