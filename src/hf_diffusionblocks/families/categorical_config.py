"""Config of blocked models whose targets are categorical: tokens, class labels (arXiv 2506.14202, App. B).

What such families have in common, whatever their inputs: how features become a distribution (``readout``),
what a block starts from (``context``), and what its local loss reads besides the block's own layers.
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ..config_checks import check_sizes
from ..configuration import DiffusionBlocksConfig
from ..partition import BlockPartition, balanced_layers
from ..suggest import unknown_name

READOUTS = ("clean", "exact", "edm")
CONTEXTS = ("cascade", "independent")
INITIALIZATIONS = ("identity", "default")
# Settings of the one block that is an ordinary network.
PLAIN = {"readout": "clean", "context": "independent", "auxiliary_layers": 0}

_LEGACY = ("rope_theta", "rope_scaling", "torch_dtype", "attn_implementation", "num_labels")
_DROPPED = ("architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path")


class CategoricalConfig(DiffusionBlocksConfig):
    """``DiffusionBlocksConfig`` of a model with categorical targets, and

    Args:
        base_config: the config of a transformers model as a dict, with its ``model_type``.
        readout: ``clean``, ``exact`` or ``edm``; see the family's module.
        context: ``cascade`` or ``independent``; see the family's module.
        auxiliary_layers: layers between a block's output and its head that only its training loss sees; cut from a
            trained base, 0 unless given. The last block of a cascade has none, and none are used once trained.
            ``layers_per_block`` is then by default such that blocks hold equally many layers, auxiliary ones included.
        initialization: ``identity`` zeroes the output projections of new layers of auxiliary layers and of all blocks
            but the first of a cascade, so that a block starts by passing on what it gets; ``default`` leaves the
            base's.
        noise_embedding_dim: width of the noise level's embedding, which modulates the layers that see a noisy target.
            Each layer has ``6 x hidden_size x noise_embedding_dim`` weights for it.
        pretrained: whether the blocks hold a trained base's weights.
        trained_blocks: blocks that were trained, in order; a cascade's block needs those below it.
    """

    model_type = "categorical_diffusion_blocks"

    readout: str = "clean"
    context: str = "cascade"
    auxiliary_layers: int = 1
    initialization: str = "identity"
    noise_embedding_dim: int = 24
    pretrained: bool = False
    trained_blocks: list | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        trained = self.trained_blocks or []
        whole = isinstance(trained, (list, tuple)) and all(
            isinstance(b, int) and not isinstance(b, bool) and b >= 0 for b in trained
        )
        if not whole:
            raise ValueError(f"trained_blocks={reprlib.repr(trained)} must list numbers of blocks, such as [0, 1].")
        self.trained_blocks = sorted(set(trained))

    def _make_partition(self) -> BlockPartition:
        self._check_settings()
        if self.layers_per_block is None and isinstance(self.num_blocks, int) and self.num_blocks > 0:
            extra = [self.auxiliary_layers_of(b) for b in range(self.num_blocks)]
            self.layers_per_block = balanced_layers(self.num_layers, extra) if any(extra) else None
        return super()._make_partition()

    def _check_settings(self) -> None:
        for name, allowed in (("readout", READOUTS), ("context", CONTEXTS), ("initialization", INITIALIZATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(unknown_name(name, getattr(self, name), allowed))
        if isinstance(self.auxiliary_layers, bool) or not isinstance(self.auxiliary_layers, int):
            raise ValueError(f"auxiliary_layers={self.auxiliary_layers!r} must be a whole number of at least 0.")
        if self.auxiliary_layers < 0:
            raise ValueError(f"auxiliary_layers={self.auxiliary_layers} must be at least 0.")
        dim = self.noise_embedding_dim
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 2 or dim % 2:
            raise ValueError(f"noise_embedding_dim={dim!r} must be an even whole number of at least 2.")
        if self.auxiliary_layers > self.num_layers:
            raise ValueError(
                f"auxiliary_layers={self.auxiliary_layers} is more than the {self.num_layers} layers of the model."
            )
        if self.auxiliary_layers and self.readout != "clean":
            raise ValueError(
                f"auxiliary_layers={self.auxiliary_layers} needs readout='clean'; with readout={self.readout!r} set it "
                "to 0: there a block's own layers are its denoiser."
            )
        if self.preconditioning != "edm":
            raise ValueError(
                f"preconditioning={self.preconditioning!r} is for images that are denoised; language models and "
                "classifiers use 'edm'."
            )

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

    @property
    def two_stream(self) -> bool:
        """Whether the readout has a stream of noisy targets."""
        return self.readout != "clean"

    def auxiliary_layers_of(self, block: int) -> int:
        """Number of auxiliary layers of a block: none in the last block of a cascade, whose output is the model's."""
        last = self.context == "cascade" and block == self.num_blocks - 1
        return 0 if last or self.context == "independent" else self.auxiliary_layers


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


def check_base_settings(base_config: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for a misspelt setting in a base's config that was written by hand.

    transformers itself takes any name, and a published ``config.json`` may hold names that its class does not know.
    """
    model_type = base_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or "transformers_version" in base_config:
        return
    known = {*CONFIG_MAPPING[model_type]().to_dict(), *CONFIG_MAPPING[model_type].attribute_map, *_LEGACY}
    known = {name for name in known if not name.startswith("_")}
    for name in base_config:
        if name not in known and not name.startswith("_"):
            raise ValueError(unknown_name(f"{model_type} setting", name, known))


def fields_of(kind: type[DiffusionBlocksConfig]) -> frozenset[str]:
    """Settings of a family's config besides its base and number of blocks."""
    ours = [cls for cls in kind.__mro__ if issubclass(cls, DiffusionBlocksConfig)]
    fields = {name for cls in ours for name in vars(cls).get("__annotations__", ())}
    return frozenset(fields - {"base_config", "num_blocks"})


def family_settings(
    kind: type[CategoricalConfig],
    presets: Mapping[str, Mapping[str, Any]],
    base_config: Mapping[str, Any] | PreTrainedConfig,
    num_blocks: int | None,
    preset: str | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Keyword arguments of a family's config from the arguments of its model's ``from_base``.

    Raises:
        ValueError: for an unknown setting of the base or the blocks, or an unknown preset.
    """
    if isinstance(base_config, PreTrainedConfig):
        base_config = base_config.to_dict()
    check_base_settings(base_config)
    if preset is not None:
        if preset not in presets:
            raise ValueError(unknown_name("preset", preset, presets))
        settings = {**presets[preset], **settings}
    allowed = fields_of(kind)
    unknown = [n for n in settings if n not in allowed]
    if unknown:
        raise ValueError(unknown_name("setting", unknown[0], allowed | {"preset"}))
    if settings.get("readout", "clean") != "clean" or settings.get("pretrained"):
        settings.setdefault("auxiliary_layers", 0)  # a trained base is trained on by its exact gradient
    if num_blocks is None:
        num_blocks = len(settings["layers_per_block"]) if settings.get("layers_per_block") else 3
    return {"base_config": dict(base_config), "num_blocks": num_blocks, **settings}
