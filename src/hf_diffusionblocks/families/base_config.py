"""Config of blocked models whose base is one of transformers' models, told by its config with a ``model_type``."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig

from ..config_checks import check_sizes
from ..configuration import DiffusionBlocksConfig
from ..suggest import unknown_name

_LEGACY = ("rope_theta", "rope_scaling", "torch_dtype", "attn_implementation", "num_labels")
_DROPPED = ("architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path")


class TransformersBaseConfig(DiffusionBlocksConfig):
    """``DiffusionBlocksConfig`` of a model whose ``base_config`` is the config of a transformers model."""

    def make_base_config(self, layers: Sequence[int] | None = None) -> PreTrainedConfig:
        """The base's config; with ``layers``, that of a model of these layers of the base."""
        values = dict(self.base_config)
        if layers is not None:
            values["num_hidden_layers"] = len(layers)
            for name in ("layer_types", "no_rope_layers"):
                if values.get(name):
                    values[name] = [values[name][min(i, self.num_layers - 1)] for i in layers]
        return AutoConfig.for_model(**values)

    @property
    def num_layers(self) -> int:
        return int(self.base_config["num_hidden_layers"])

    @property
    def num_hidden_layers(self) -> int:
        """L."""
        return self.num_layers

    @property
    def hidden_size(self) -> int:
        """d, the width."""
        return int(self.base_config["hidden_size"])


def check_noise_embedding_dim(dim: Any) -> None:
    """Raise a ``ValueError`` for a width that an embedding of sines and cosines cannot have."""
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 2 or dim % 2:
        raise ValueError(f"noise_embedding_dim={dim!r} must be an even whole number of at least 2.")


def complete_transformers_config(
    base_config: dict[str, Any], sizes: Sequence[str], what: str, example: str, mend: str
) -> dict[str, Any]:
    """A transformers config with its defaults filled in.

    Args:
        base_config: settings with a ``model_type``.
        sizes: those that must be positive whole numbers, if they are there.
        what: the kind of model that is wanted, such as "a decoder".
        example: a ``model_type`` of that kind.
        mend: which models can be cut, as a sentence.

    Raises:
        ValueError: if it is none, or has no ``num_hidden_layers``.
    """
    model_type = base_config.get("model_type")
    check_sizes(base_config, sizes, optional=True)
    if model_type is None:
        raise ValueError(f"base_config has no model_type: give the config of {what}, such as {example!r}.")
    if not isinstance(model_type, str):
        raise ValueError(f"base_config's model_type={model_type!r:.60} must be a name, such as {example!r}.")
    try:
        config = AutoConfig.for_model(**base_config)
    except ValueError as error:
        raise ValueError(f"base_config's model_type={model_type!r} is not known to transformers: {error}") from error
    except Exception as error:  # the values may be a stranger's, and the class's own checks raise of many kinds
        raise ValueError(f"base_config does not describe a {model_type!r} model: {error!r}.") from error
    full = config.to_dict()
    if "num_hidden_layers" not in full:
        raise ValueError(f"a model of type {model_type!r} cannot be cut: its config has no num_hidden_layers. {mend}")
    return {k: v for k, v in full.items() if k not in _DROPPED}


def check_base_settings(base_config: Mapping[str, Any], kind: type[DiffusionBlocksConfig]) -> None:
    """Raise a ``ValueError`` for a misspelt setting in a base's config that was written by hand.

    transformers itself takes any name, and a published ``config.json`` may hold names that its class does not know.

    Args:
        base_config: of the base.
        kind: of the blocked model's config.
    """
    model_type = base_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or "transformers_version" in base_config:
        return
    known = {*CONFIG_MAPPING[model_type]().to_dict(), *CONFIG_MAPPING[model_type].attribute_map, *_LEGACY}
    known = {name for name in known if not name.startswith("_")}
    for name in base_config:
        if name not in known and not name.startswith("_"):
            check_can_be_cut(kind, {name: value for name, value in base_config.items() if name in known}, name)
            raise ValueError(unknown_name(f"{model_type} setting", name, known))


def check_can_be_cut(kind: type[DiffusionBlocksConfig], base_config: dict[str, Any], unknown: str) -> None:
    """Raise the ``ValueError`` that says why a base cannot be cut, where there is one.

    For bases with settings that their type does not know: perhaps the type is the mistake, and its name says more than
    theirs. The model is built without memory.

    Args:
        kind: of the blocked model's config, which ``AutoModel`` knows.
        base_config: what the type knows of the settings, the ``model_type`` among them.
        unknown: the first setting that it does not know.
    """
    given: dict[str, Any] = {"mask_token_id": 0} if "mask_token_id" in fields_of(kind) else {}
    try:
        config = kind(base_config=base_config, num_blocks=1, **given)
        with torch.device("meta"):
            AutoModel.from_config(config)
    except ValueError as error:
        # Not what transformers says of sizes, which is its cause: a size that is misspelt has another value.
        if error.__cause__ is None and ("cannot be cut" in str(error) or "cannot be made" in str(error)):
            raise ValueError(f"{error} (Of this type, {unknown!r} is no setting.)") from error
    except Exception:  # noqa: S110  # the settings do not make a model of the type: nothing is known of it
        pass


def fields_of(kind: type[DiffusionBlocksConfig]) -> frozenset[str]:
    """Settings of a family's config besides its base and number of blocks."""
    ours = [cls for cls in kind.__mro__ if issubclass(cls, DiffusionBlocksConfig)]
    fields = {name for cls in ours for name in vars(cls).get("__annotations__", ())}
    return frozenset(fields - {"base_config", "num_blocks"})
