"""How a base of transformers, a model or its name, becomes a blocked model; and a new base to give one back in."""

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..agreement import hub_name, weights_digest
from ..config_checks import check_dtype
from ..modeling import BlockedPreTrainedModel

Model = TypeVar("Model", bound=BlockedPreTrainedModel)

HUB = ("revision", "token", "cache_dir")
LOADING = ("dtype", *HUB)


def hub_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``from_base``'s settings that say where on the Hub a base lies."""
    return {name: settings[name] for name in HUB if name in settings}


def part_settings(base: Any, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of ``from_base`` in two: how to load the base, and fields of the blocked model's config.

    Raises:
        ValueError: for settings of loading where nothing is loaded, or a dtype that weights cannot have.
    """
    loading = {name: settings[name] for name in LOADING if name in settings}
    if loading and not isinstance(base, (str, os.PathLike)):
        raise ValueError(
            f"{', '.join(loading)}: no setting for a base that is given as a {type(base).__name__}, only for one that "
            "is loaded by name. Convert it before (.to(torch.bfloat16)), or the blocked model afterwards."
        )
    named = os.fspath(base) if isinstance(base, (str, os.PathLike)) else ""
    if (named.startswith((".", "/", "~")) or named.count("/") > 1) and not os.path.isdir(named):
        raise ValueError(f"there is no directory {named}: give a pretrained model's directory or its id on the Hub.")
    check_dtype(loading.get("dtype"))
    return loading, {name: value for name, value in settings.items() if name not in LOADING}


def convert(
    cls: type[Model],
    base: PreTrainedModel | PreTrainedConfig | str | os.PathLike | Mapping[str, Any],
    num_blocks: int | None,
    settings: dict[str, Any],
    *,
    load: Callable[..., PreTrainedModel],
    fill: Callable[[PreTrainedModel, Model], None],
    named: Callable[..., dict[str, Any]] = lambda base, loading: {},
) -> Model:
    """``from_base`` of a family whose bases are transformers' models.

    Args:
        cls: of the blocked model; its ``config_from`` takes the base's config, ``num_blocks`` and the settings.
        base: a model, or its directory or Hub id (weights are copied), or its config (weights are new).
        num_blocks: B.
        settings: of the config, and of loading.
        load: loads a base by its name and the settings of loading.
        fill: copies a base's weights into a new blocked model.
        named: settings that follow from what lies beside a base that is loaded by name, unless they are given.

    Raises:
        ValueError: if the base cannot be cut, or a setting is not allowed.
    """
    base_model = hub_name(base)
    loading, settings = part_settings(base, settings)
    if isinstance(base, (str, os.PathLike)):
        settings = {**named(base, loading), **settings}
        base = load(base, **loading)
    if isinstance(base, (Mapping, PreTrainedConfig)):
        return cls(cls.config_from(base, num_blocks, **settings))
    config = cls.config_from(base.config, num_blocks, **{"pretrained": True, **settings})
    config.base_model, config.base_revision = base_model, weights_digest(base.state_dict())
    config._attn_implementation = base.config._attn_implementation
    with torch.device("meta"):
        model = cls(config)
    model = model.to_empty(device=base.device).to(base.dtype)
    if model.can_generate():
        model.generation_config = copy.deepcopy(base.generation_config)
    model._init_seed = 0
    model.init_weights()
    fill(base, model)
    return model.train(base.training)


def empty_base(
    make: Callable[[PreTrainedConfig], PreTrainedModel], config: PreTrainedConfig, model: BlockedPreTrainedModel
) -> PreTrainedModel:
    """A base for a blocked model's weights: on its device, in its dtype, with its kind of attention.

    Args:
        make: of a config.
        config: of the base.
        model: whose weights are to be given back.
    """
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        base = make(config)
    base = base.to_empty(device=model.device).to(model.dtype)
    base.init_weights()
    base.tie_weights()
    return base
