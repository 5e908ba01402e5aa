"""A family of a user's own, made known with one call: to Auto classes, recipes, commands and model cards."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
)

from ..base_names import CUT_FROM
from ..families.base_config import fields_of
from ..hub import register_card
from ..modeling import BlockedPreTrainedModel
from ..objectives import register_objective
from ..suggest import unknown_name
from .families import _OF_A_RUN, FAMILIES, Family

_AUTO = {
    "text": AutoModelForCausalLM,
    "masked_text": AutoModelForMaskedLM,
    "classification": AutoModelForImageClassification,
}
_BUILT_IN = tuple(FAMILIES)


def register_family(
    name: str,
    model_class: type[BlockedPreTrainedModel],
    *,
    like: str,
    model_keys: Iterable[str] | Callable[[Mapping[str, Any]], list[str]] | None = None,
    bases: Iterable[str] = (),
    cut_from: str = "a config of its own",
    objectives: tuple[type, type | None] | None = None,
    **changes: Any,
) -> Family:
    """Make a family of your own known by one call at the end of its module.

    From then on ``AutoModel`` loads it, recipes may name it as their ``family``, and the commands ``plan``, ``train``,
    ``sample`` and ``evaluate`` (and ``convert``, if it has bases) do with it what they do with the family that it is
    like. Trainer, residency, memory plan, files by block, jobs, merging and pushing need no registration. The
    command line reads the module with ``--import``. Calling it again replaces the family.

    Args:
        name: of the family, as recipes name it.
        model_class: of its blocked models, with its ``config_class``. What recipes for it hold, and what its models
            are asked, are as in the family that it is like: of ``dit`` the config's ``num_classes``, ``in_channels``
            and ``sample_size``, and ``class_labels`` as conditioning.
        like: a family whose data, sampling, scores and commands it has, such as ``dit``.
        model_keys: keys of a recipe's section ``model``; by default those of ``like``.
        bases: how the class names of its bases end, as their ``config.json`` names them, such as ``ForCausalLM``.
        cut_from: what it is cut from, for help and errors.
        objectives: that of a block alone, and that with an exact gradient or None; see ``register_objective``. By
            default those of the config's parent class, or denoising score matching.
        **changes: other fields of ``recipes.families.Family``, such as ``layers_key``.

    Returns:
        The family's entry.

    Raises:
        ValueError: for a name or model type that the library has, or a ``like`` or field that it does not know.

    Example:
        >>> from hf_diffusionblocks import BlockedDiTModel, register_family
        >>> from hf_diffusionblocks.families.dit import BlockedDiTConfig
        >>> class MyConfig(BlockedDiTConfig):
        ...     model_type = "blocked_mine"
        >>> class MyModel(BlockedDiTModel):
        ...     config_class = MyConfig
        >>> register_family("mine", MyModel, like="dit").model_type  # doctest: +SKIP
        'blocked_mine'
    """
    if like not in FAMILIES:
        raise ValueError(unknown_name("family to be like", like, FAMILIES))
    if name in _BUILT_IN:
        raise ValueError(f"the family {name!r} is one of this library: give yours another name.")
    fields = {field.name for field in dataclasses.fields(Family)}
    for key in changes:
        if key not in fields:
            raise ValueError(unknown_name("field of a family", key, fields))
    config_class, parent = model_class.config_class, FAMILIES[like]
    taken = {kind.model_type: other for other, kind in FAMILIES.items() if other != name}
    if config_class.model_type in taken:
        raise ValueError(
            f"{config_class.__name__}.model_type={config_class.model_type!r} is that of the family "
            f"{taken[config_class.model_type]!r}: give the config one of its own."
        )
    if model_keys is not None:
        changes["model_keys"] = model_keys if callable(model_keys) else _these(list(model_keys))
    changes.setdefault("block_fields", _block_fields(model_class))
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto in (AutoModel, _AUTO.get(parent.job)):
        if auto is not None:
            auto.register(config_class, model_class, exist_ok=True)
    if objectives is not None:
        register_objective(config_class, *objectives)
    register_card(config_class.model_type, like=parent.model_type)
    given: dict[str, Any] = {
        "model_class": model_class,
        "bases": tuple(bases),
        "example": name,
        "bases_of": None,
    } | changes
    FAMILIES[name] = dataclasses.replace(parent, **given)
    CUT_FROM[name] = cut_from
    return FAMILIES[name]


def _these(keys: list[str]) -> Callable[[Mapping[str, Any]], list[str]]:
    return lambda model: keys


def _block_fields(model_class: type[BlockedPreTrainedModel]) -> frozenset[str]:
    """Keys of a recipe's section ``blocks``: the config's fields, and ``preset`` where there are presets."""
    presets = {"preset"} & set(inspect.signature(model_class.config_from).parameters)
    return fields_of(model_class.config_class) - _OF_A_RUN | presets | {"num_blocks"}


__all__ = ["register_family"]
