"""What a recipe's sections hold in each family, and how a family's model is made from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedTokenizerBase

from ..configuration import DiffusionBlocksConfig
from ..data.tokenizing import check_tokenizer, tokenizer_size
from ..families import causal_lm_config, dit, image_classification_config, masked_lm_config, recurrent_config
from ..families.base_config import fields_of
from ..families.categorical_config import PLAIN
from ..families.causal_lm import BlockedForCausalLM
from ..families.dit import BlockedDiTModel
from ..families.image_classification import BlockedForImageClassification
from ..families.masked_lm import BlockedForMaskedLM
from ..families.recurrent import BlockedRecurrentForCausalLM
from ..modeling import BlockedPreTrainedModel
from ..suggest import unknown_name
from .sections import (
    TRAINED_TOKENIZERS,
    ClassEvaluation,
    ClassPrediction,
    ImageData,
    ImageEvaluation,
    ImageSampling,
    MaskedSampling,
    TextData,
    TextEvaluation,
    TextSampling,
)

BYTES = 257
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def dit_keys(model: Mapping[str, Any]) -> list[str]:
    """Keys that the section ``model`` of a DiT may have."""
    return ["base", *dit.base_config_defaults()]


def transformers_keys(model: Mapping[str, Any]) -> list[str]:
    """Keys that the section ``model`` may have where the base is one of transformers' models.

    Raises:
        ValueError: for a config without a ``model_type`` that transformers knows.
    """
    if "base" in model:
        return ["base"]
    kind = model.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if kind is None:
            raise ValueError(
                "the recipe's section 'model' has neither a model_type, such as llama, nor a base: a directory or Hub "
                "id of a pretrained model."
            )
        raise ValueError(unknown_name("model.model_type", kind, CONFIG_MAPPING))
    known = [name for name in CONFIG_MAPPING[kind]().to_dict() if not name.startswith("_")]
    return ["base", *known, *CONFIG_MAPPING[kind].attribute_map, "rope_theta", "rope_scaling"]


def classifier_keys(model: Mapping[str, Any]) -> list[str]:
    """Keys that the section ``model`` of an image classifier may have.

    Raises:
        ValueError: for a ``model_type`` that cannot be cut.
    """
    kinds = image_classification_config.PREFIX
    if "base" not in model and model.get("model_type", "vit") not in kinds:
        raise ValueError(unknown_name("model.model_type", model["model_type"], kinds))
    return [*transformers_keys(model), "num_labels"]


@dataclass(frozen=True)
class Family:
    """A family of models, as recipes and commands see it.

    Attributes:
        data, sampling, evaluation: the sections' settings.
        model_class: of its blocked models.
        block_fields: keys of the section ``blocks``.
        layers_key: the base's number of layers, a key of the section ``model``.
        model_keys: gives the keys that the section ``model`` may have.
        job: the module of ``hf_diffusionblocks.jobs`` with what its commands do.
        has_text: whether its data are text, and its vocabulary that of a tokenizer.
        bases: how the class names of its bases end, as their ``config.json`` names them.
        plain: settings of the section ``blocks`` under which one block is the ordinary network; None for those of the
            blocked run.
        kept: settings of the section ``blocks`` that the ordinary network has too, where ``plain`` is given.
        counts_compute: whether an update of all blocks may cost more than an end-to-end one, so that baselines of
            equal compute need it counted.
        hides_tokens: whether its tokenizer needs a mask token.
        example: the name of one of its recipes.
        bases_of: a family whose bases it may be cut from as well, where ``convert`` is told to.
        image_keys: keys of the section ``model`` for side and channels of its images.
        classes_key: key of the section ``model`` for the number of classes of its images.
    """

    data: type
    sampling: type
    evaluation: type
    model_class: type[BlockedPreTrainedModel]
    block_fields: frozenset[str]
    layers_key: str
    model_keys: Callable[[Mapping[str, Any]], list[str]]
    job: str
    has_text: bool = False
    bases: tuple[str, ...] = ()
    plain: dict[str, Any] | None = None
    kept: frozenset[str] = frozenset()
    counts_compute: bool = False
    hides_tokens: bool = False
    example: str = ""
    bases_of: str | None = None
    image_keys: tuple[str, str] = ("sample_size", "in_channels")
    classes_key: str = "num_labels"

    @property
    def cascades(self) -> bool:
        """Whether its blocks may build on each other."""
        return "context" in self.block_fields

    @property
    def model_type(self) -> str:
        """Of its blocked models' configs."""
        return self.model_class.config_class.model_type


_OF_A_RUN = {"pretrained", "trained_blocks"}
_OF_SEVERAL_BLOCKS = {"context", "auxiliary_layers", "initialization", "layers_per_block", "edges", "partition"}

FAMILIES = {
    "dit": Family(
        ImageData,
        ImageSampling,
        ImageEvaluation,
        BlockedDiTModel,
        dit.config_fields() | {"num_blocks"},
        "num_layers",
        dit_keys,
        "images",
        example="digits-dit",
        classes_key="num_embeds_ada_norm",
    ),
    "causal_lm": Family(
        TextData,
        TextSampling,
        TextEvaluation,
        BlockedForCausalLM,
        causal_lm_config.config_fields() - _OF_A_RUN | {"num_blocks", "preset"},
        "num_hidden_layers",
        transformers_keys,
        "text",
        has_text=True,
        bases=("ForCausalLM", "LMHeadModel"),
        plain=PLAIN,
        counts_compute=True,
        example="pydoc-llama",
    ),
    "image_classification": Family(
        ImageData,
        ClassPrediction,
        ClassEvaluation,
        BlockedForImageClassification,
        image_classification_config.config_fields() - _OF_A_RUN - {"id2label", "label2id"} | {"num_blocks", "preset"},
        "num_hidden_layers",
        classifier_keys,
        "classification",
        bases=("ForImageClassification", "ForImageClassificationWithTeacher"),
        plain=PLAIN,
        counts_compute=True,
        example="digits-vit",
        image_keys=("image_size", "num_channels"),
    ),
    "masked_lm": Family(
        TextData,
        MaskedSampling,
        TextEvaluation,
        BlockedForMaskedLM,
        masked_lm_config.config_fields() - _OF_A_RUN | {"num_blocks"},
        "num_hidden_layers",
        transformers_keys,
        "masked_text",
        has_text=True,
        bases=("ForMaskedLM",),
        plain={},
        kept=frozenset({"mask_token_id", "schedule", "time_conditioning", "noise_embedding_dim"}),
        counts_compute=True,
        hides_tokens=True,
        example="pydoc-md4",
        bases_of="causal_lm",
    ),
    "recurrent": Family(
        TextData,
        TextSampling,
        TextEvaluation,
        BlockedRecurrentForCausalLM,
        recurrent_config.config_fields() - _OF_A_RUN - _OF_SEVERAL_BLOCKS | {"preset"},
        "num_hidden_layers",
        transformers_keys,
        "text",
        has_text=True,
        plain={"readout": "clean"},
        kept=frozenset(recurrent_config.BlockedRecurrentConfig.__annotations__) - {"readout", "context", "noise_per"},
        counts_compute=True,
        example="pydoc-recurrent",
        bases_of="causal_lm",
    ),
}


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
    kind: type[BlockedPreTrainedModel],
    model: Mapping[str, Any],
    blocks: Mapping[str, Any],
    vocab_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> DiffusionBlocksConfig:
    """The config of a recipe for text of a family's class; of a ``base``, from its ``config.json`` alone.

    Where tokens are hidden and there is no tokenizer yet, the last token stands for its mask token.
    """
    hides = "mask_token_id" in fields_of(kind.config_class) and "mask_token_id" not in blocks
    if hides and tokenizer is not None:
        blocks = {**blocks, "mask_token_id": tokenizer.mask_token_id}
    if "base" in model:
        try:
            base = AutoConfig.from_pretrained(model["base"])
        except (OSError, ValueError) as error:
            raise ValueError(f"model.base={model['base']!r} cannot be loaded: {error}") from error
        if hides and tokenizer is None:
            blocks = {**blocks, "mask_token_id": base.vocab_size - 1}
        config = kind.config_from(base, **blocks, pretrained=True)
    else:
        base = language_model_base(model, vocab_size, tokenizer)
        if hides and tokenizer is None:
            blocks = {**blocks, "mask_token_id": base["vocab_size"] - 1}
        config = kind.config_from(base, **blocks)
    if tokenizer is not None:
        check_tokenizer(tokenizer, config.vocab_size)
    return config
