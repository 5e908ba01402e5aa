"""Config of blocked models of tokens: vocabulary, special tokens, and what of a base can be cut."""

from typing import Any

from transformers import PreTrainedConfig

from ..mixins import MixinBase
from .base_config import complete_transformers_config

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


class LanguageConfigMixin(MixinBase):
    """Of a ``TransformersBaseConfig`` of a language model: the base's special tokens are the model's."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        base = self.make_base_config()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name, None) is None:
                setattr(self, name, getattr(base, name, None))
        self.tie_word_embeddings = False  # the head is tied by the forward pass, not by sharing parameters

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The base's config, which ``generate`` builds its cache from."""
        return self.make_base_config()

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens, a mask token among them."""
        return int(self.base_config["vocab_size"])


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
