"""Checks of what a language model is given."""

from torch import Tensor
from transformers.cache_utils import Cache

from .causal_lm_config import BlockedCausalLMConfig


def check_tokens(
    config: BlockedCausalLMConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
) -> None:
    """Raise a ``ValueError`` for tokens, a mask or a cache that do not fit the model."""
    if input_ids is not None:
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids has shape {list(input_ids.shape)} and dtype {input_ids.dtype}: give whole numbers of "
                "shape [batch, tokens]."
            )
        if input_ids.shape[1] == 0:
            raise ValueError("input_ids is empty: give at least one token, such as the beginning-of-text token.")
        low, high = int(input_ids.min()), int(input_ids.max())
        if not (0 <= low and high < config.vocab_size):
            raise ValueError(
                f"input_ids run from {low} to {high}; the model's vocabulary has {config.vocab_size} tokens, "
                f"0 to {config.vocab_size - 1}. Use the tokenizer that the model was made with."
            )
        seen = 0
        if cache is not None and cache.get_seq_length() > 0:
            seen = cache.get_seq_length()
            batch = cache.layers[0].keys.shape[0]
            if batch != len(input_ids):
                raise ValueError(
                    f"past_key_values holds a batch of {batch}, input_ids one of {len(input_ids)}: it is another "
                    "batch's cache. Start with past_key_values=None."
                )
        if seen + input_ids.shape[1] > config.max_position_embeddings:
            raise ValueError(
                f"{seen + input_ids.shape[1]} tokens are more than the model's "
                f"{config.max_position_embeddings} positions. Shorten the input, or raise "
                "max_position_embeddings before training."
            )
    if attention_mask is not None and attention_mask.ndim == 2 and len(attention_mask):
        empty = (attention_mask == 0).all(dim=1)
        if bool(empty.any()):
            raise ValueError(f"row {int(empty.int().argmax())} of attention_mask is all padding: drop that row.")
