"""Config of blocked causal language models."""

from typing import Any

from .base_config import fields_of
from .categorical_config import CategoricalConfig
from .language_config import LanguageConfigMixin, complete_language_config

# The paper's settings (arXiv 2506.14202, App. B and E.4), as one preset; "default" names the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "readout": "edm",
        "context": "independent",
        "auxiliary_layers": 0,
        "initialization": "default",
        "overlap": 0.1,
        "noise": {"p_mean": -1.2, "p_std": 1.2},
    },
}


_MEND = "Models built like Llama, Mistral, Qwen2 and Qwen3 can be cut."


class BlockedCausalLMConfig(LanguageConfigMixin, CategoricalConfig):
    """Config of ``BlockedForCausalLM``: a ``CategoricalConfig`` whose base is a transformers decoder.

    Example:
        >>> base = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        ...         "num_attention_heads": 4, "vocab_size": 100}
        >>> BlockedCausalLMConfig(base_config=base, num_blocks=3).layers_per_block  # and one auxiliary in the first two
        [1, 2, 3]
    """

    model_type = "blocked_causal_lm"

    def complete_base_config(self, base_config: dict) -> dict:
        return complete_language_config(base_config, _MEND)

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence, in tokens."""
        return int(self.base_config.get("max_position_embeddings") or 2**31)

    @property
    def tied_head(self) -> bool:
        """Whether the head is the token embedding."""
        return bool(self.base_config.get("tie_word_embeddings", False))

    @property
    def own_heads(self) -> bool:
        """Whether each block has a head: not where it is tied, nor with ``edm``, whose logits are ``<D, e_k>``."""
        return not self.tied_head and self.readout != "edm"


def config_fields() -> frozenset[str]:
    """Settings of a blocked language model besides its base and number of blocks."""
    return fields_of(BlockedCausalLMConfig)
