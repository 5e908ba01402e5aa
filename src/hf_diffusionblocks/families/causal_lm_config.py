"""Config of blocked causal language models."""

from typing import Any

from transformers import PreTrainedConfig

from .categorical_config import (
    CONTEXTS,
    INITIALIZATIONS,
    READOUTS,
    CategoricalConfig,
    check_base_settings,
    complete_transformers_config,
    fields_of,
)

# The paper's settings (arXiv 2506.14202, App. B and E.4), as one preset.
PRESETS = {
    "paper": {
        "readout": "edm",
        "context": "independent",
        "auxiliary_layers": 0,
        "initialization": "default",
        "overlap": 0.1,
        "noise": {"p_mean": -1.2, "p_std": 1.2},
    }
}


_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
# Settings that change what flows between the modules of a decoder.
_OUTSIDE = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "final_logit_softcapping")
_MEND = "Models built like Llama, Mistral, Qwen2 and Qwen3 can be cut."


class BlockedCausalLMConfig(CategoricalConfig):
    """Config of ``BlockedForCausalLM``: a ``CategoricalConfig`` whose base is a transformers decoder.

    Example:
        >>> base = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        ...         "num_attention_heads": 4, "vocab_size": 100}
        >>> BlockedCausalLMConfig(base_config=base, num_blocks=3).layers_per_block  # and one auxiliary in the first two
        [1, 2, 3]
    """

    model_type = "blocked_causal_lm"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        base = self.make_base_config()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name, None) is None:
                setattr(self, name, getattr(base, name, None))
        self.tie_word_embeddings = False  # the head is tied by the forward pass, not by sharing parameters

    def complete_base_config(self, base_config: dict) -> dict:
        return complete_language_config(base_config, _MEND)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The base's config, which ``generate`` builds its cache from."""
        return self.make_base_config()

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return int(self.base_config["vocab_size"])

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence, in tokens."""
        return int(self.base_config.get("max_position_embeddings") or 2**31)

    @property
    def tied_head(self) -> bool:
        """Whether the head is the token embedding."""
        return bool(self.base_config.get("tie_word_embeddings", False))


def complete_language_config(base_config: dict, mend: str) -> dict:
    """The config of a transformers language model with its defaults filled in, without what names a checkpoint.

    Args:
        base_config: with its ``model_type``.
        mend: the sentence that names the models that can be cut.

    Raises:
        ValueError: for one that does not describe a model that can be cut into blocks of layers.
    """
    full = complete_transformers_config(base_config, _SIZES, "a decoder", "llama", mend)
    for name in _OUTSIDE:
        if full.get(name) not in (None, 1):
            raise ValueError(
                f"a model of type {full['model_type']!r} with {name}={full[name]} cannot be cut: it acts outside "
                f"the layers' modules. {mend}"
            )
    return full


def config_fields() -> frozenset[str]:
    """Settings of a blocked language model besides its base and number of blocks."""
    return fields_of(BlockedCausalLMConfig)


__all__ = [
    "CONTEXTS",
    "INITIALIZATIONS",
    "PRESETS",
    "READOUTS",
    "BlockedCausalLMConfig",
    "check_base_settings",
    "config_fields",
]
