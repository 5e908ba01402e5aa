"""What a recipe's sections hold in each family, and how a family's model is made from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedTokenizerBase

from ..configuration import DiffusionBlocksConfig
from ..data.tokenizing import check_tokenizer, tokenizer_size
from ..families import causal_lm_config, dit
from ..families.causal_lm import BlockedForCausalLM
from ..families.dit import BlockedDiTModel
from ..modeling import BlockedPreTrainedModel
from ..suggest import unknown_name
from .sections import (
    TRAINED_TOKENIZERS,
    ImageData,
    ImageEvaluation,
    ImageSampling,
    TextData,
    TextEvaluation,
    TextSampling,
)

BYTES = 257
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Family:
    """A family of models, as recipes see it.

    Attributes:
        data, sampling, evaluation: the sections' settings.
        model_class: of its blocked models.
        block_fields: keys of the section ``blocks``.
        layers_key: the base's number of layers, a key of the section ``model``.
    """

    data: type
    sampling: type
    evaluation: type
    model_class: type[BlockedPreTrainedModel]
    block_fields: frozenset[str]
    layers_key: str


FAMILIES = {
    "dit": Family(
        ImageData, ImageSampling, ImageEvaluation, BlockedDiTModel, dit.config_fields() | {"num_blocks"}, "num_layers"
    ),
    "causal_lm": Family(
        TextData,
        TextSampling,
        TextEvaluation,
        BlockedForCausalLM,
        causal_lm_config.config_fields() - {"pretrained", "trained_blocks"} | {"num_blocks", "preset"},
        "num_hidden_layers",
    ),
}


def model_keys(family: str, model: Mapping[str, Any]) -> list[str]:
    """Keys that the section ``model`` may have.

    Raises:
        ValueError: for a language model's config without a ``model_type`` that transformers knows.
    """
    if family == "dit":
        return ["base", *dit.base_config_defaults()]
    if "base" in model:
        return ["base"]
    kind = model.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if kind is None:
            raise ValueError(
                "the recipe's section 'model' has neither a model_type, such as llama, nor a base: a directory or Hub "
                "id of a pretrained language model."
            )
        raise ValueError(unknown_name("model.model_type", kind, CONFIG_MAPPING))
    known = [name for name in CONFIG_MAPPING[kind]().to_dict() if not name.startswith("_")]
    return ["base", "model_type", *known, *CONFIG_MAPPING[kind].attribute_map, "rope_theta", "rope_scaling"]


def check_text_recipe(model: Mapping[str, Any], data: TextData) -> None:
    """Raise a ``ValueError`` for a tokenizer that a language model cannot have."""
    if "base" in model and data.tokenizer in TRAINED_TOKENIZERS:
        raise ValueError(
            f"data.tokenizer={data.tokenizer!r} would be trained on the text, and model.base={model['base']!r} knows "
            "its own tokens only: leave data.tokenizer out, or give model a model_type instead of base."
        )
    length, positions = data.block_length, model.get("max_position_embeddings")
    if isinstance(positions, int) and length > positions:
        raise ValueError(
            f"data.block_length={length} is more than model.max_position_embeddings={positions}: shorten the rows, or "
            "give the model as many positions."
        )


def language_model_base(
    model: Mapping[str, Any], vocab_size: int | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """The base's config of a language model's recipe, with vocabulary and special tokens of its tokenizer."""
    base = dict(model)
    if tokenizer is not None:
        base.setdefault("vocab_size", tokenizer_size(tokenizer))
        check_tokenizer(tokenizer, base["vocab_size"])
        for name in _SPECIAL:
            base.setdefault(name, getattr(tokenizer, name))
    elif "vocab_size" not in base:
        base["vocab_size"] = vocab_size or BYTES
        for name in _SPECIAL:  # a small vocabulary need not have the ids that are a config's defaults
            base.setdefault(name, None)
    return base


def language_model_config(
    model: Mapping[str, Any],
    blocks: Mapping[str, Any],
    vocab_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> DiffusionBlocksConfig:
    """The config of a language model's recipe; of a ``base``, from its ``config.json`` alone."""
    if "base" in model:
        try:
            base = AutoConfig.from_pretrained(model["base"])
        except (OSError, ValueError) as error:
            raise ValueError(f"model.base={model['base']!r} cannot be loaded: {error}") from error
        config = BlockedForCausalLM.config_from(base, **blocks, pretrained=True)
    else:
        config = BlockedForCausalLM.config_from(language_model_base(model, vocab_size, tokenizer), **blocks)
    if tokenizer is not None:
        check_tokenizer(tokenizer, config.vocab_size)
    return config
