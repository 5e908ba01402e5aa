"""Config of blocked models whose targets are categorical: tokens, class labels (arXiv 2506.14202, App. B).

What such families have in common, whatever their inputs: how features become a distribution (``readout``),
what a block starts from (``context``), and what its local loss reads besides the block's own layers.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..layer_counts import balanced_layers
from ..partition import BlockPartition
from ..suggest import unknown_name
from .base_config import TransformersBaseConfig, check_base_settings, check_noise_embedding_dim, fields_of

READOUTS = ("clean", "exact", "edm")
CONTEXTS = ("cascade", "independent")
INITIALIZATIONS = ("identity", "default")
# Settings of the one block that is an ordinary network.
PLAIN = {"readout": "clean", "context": "independent", "auxiliary_layers": 0}


class CategoricalConfig(TransformersBaseConfig):
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
            if any(extra):
                balanced = balanced_layers(self.num_layers, extra)
                self.layers_per_block = None if balanced is None else list(balanced)
        return super()._make_partition()

    def _check_settings(self) -> None:
        for name, allowed in (("readout", READOUTS), ("context", CONTEXTS), ("initialization", INITIALIZATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(unknown_name(name, getattr(self, name), allowed))
        if isinstance(self.auxiliary_layers, bool) or not isinstance(self.auxiliary_layers, int):
            raise ValueError(f"auxiliary_layers={self.auxiliary_layers!r} must be a whole number of at least 0.")
        if self.auxiliary_layers < 0:
            raise ValueError(f"auxiliary_layers={self.auxiliary_layers} must be at least 0.")
        check_noise_embedding_dim(self.noise_embedding_dim)
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

    @property
    def two_stream(self) -> bool:
        """Whether the readout has a stream of noisy targets."""
        return self.readout != "clean"

    def auxiliary_layers_of(self, block: int) -> int:
        """Number of auxiliary layers of a block: none in the last block of a cascade, whose output is the model's."""
        last = self.context == "cascade" and block == self.num_blocks - 1
        return 0 if last or self.context == "independent" else self.auxiliary_layers


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
    check_base_settings(base_config, kind)
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
