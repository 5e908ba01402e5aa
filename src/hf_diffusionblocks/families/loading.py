"""The config of a blocked model from whatever names a model, without its weights."""

import os
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..config_checks import check_model_type
from ..configuration import DiffusionBlocksConfig, read_config
from .causal_lm import BlockedForCausalLM
from .dit import BlockedDiTModel
from .dit_conversion import base_preconditioning, find_dit, scheduler_config
from .image_classification import BlockedForImageClassification
from .image_classification_config import PREFIX
from .masked_lm import BlockedForMaskedLM


def blocked_config_of(
    source: str | os.PathLike | Mapping[str, Any], num_blocks: int | None = None
) -> DiffusionBlocksConfig:
    """The config of a blocked model, read or made from a base's.

    Args:
        source: directory or Hub id of a blocked model, a DiT, a DiTPipeline, an image classifier or a language model;
            or a mapping with a base's config, that of one of transformers' models with its ``model_type``.
        num_blocks: B of a base that is cut; a blocked model has its own.

    Raises:
        ValueError: if there is no such model, or it is none that can be cut.
    """
    if isinstance(source, Mapping):
        if "model_type" not in source:
            return BlockedDiTModel.config_from(source, num_blocks)
        check_model_type(source["model_type"], "the base's config", CONFIG_MAPPING)
        values = dict(source)
        return _config_from(AutoConfig.for_model(values.pop("model_type"), **values), num_blocks)
    name = str(source)
    try:
        values, _ = read_config(name)
    except OSError:
        values = {}  # a pipeline has its DiT in a folder; find_dit says what is missing
    if "model_type" in values:
        check_model_type(values["model_type"], f"config.json in {name}", CONFIG_MAPPING)
        config = AutoConfig.from_pretrained(name)
        if isinstance(config, DiffusionBlocksConfig):
            return config
        return _config_from(config, num_blocks)
    _, config = find_dit(name)
    return BlockedDiTModel.config_from(config, num_blocks, **base_preconditioning({}, scheduler_config(name)))


def _config_from(config: PreTrainedConfig, num_blocks: int | None) -> DiffusionBlocksConfig:
    """Of an image classifier, or of a masked or a causal language model, as the base's type and architecture say; an
    encoder that names no architecture is masked.

    Which token is the mask is not known here, and changes no size: the last one stands for it.
    """
    if config.model_type in PREFIX:
        return BlockedForImageClassification.config_from(config, num_blocks)
    named = config.architectures or ["ForMaskedLM"]
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if masked and any(str(name).endswith("ForMaskedLM") for name in named):
        return BlockedForMaskedLM.config_from(config, num_blocks, mask_token_id=config.vocab_size - 1)
    return BlockedForCausalLM.config_from(config, num_blocks)
