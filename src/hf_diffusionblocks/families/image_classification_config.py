"""Config of blocked image classifiers (arXiv 2506.14202, section 5)."""

from typing import Any

from ..config_checks import MAX_POSITIONS
from .base_config import complete_transformers_config, fields_of
from .categorical_config import CategoricalConfig

# The paper's settings (arXiv 2506.14202, section 4 and App. E), as one preset; "default" names the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "readout": "edm",
        "context": "independent",
        "auxiliary_layers": 0,
        "initialization": "default",
        "overlap": 0.05,
        "noise": {"p_mean": -1.2, "p_std": 1.2},
        "num_inference_steps": 4,
    },
}
# Tokens in front of the patches, by the base's model_type; registers come on top.
PREFIX = {"vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 1}
MEND = f"Models of the types {', '.join(PREFIX)} can be cut."

_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_channels", "num_labels")

# Which layers a detector would read; they name more layers than a block has.
_OF_BACKBONES = ("out_features", "out_indices", "stage_names")


class BlockedImageClassificationConfig(CategoricalConfig):
    """Config of ``BlockedForImageClassification``: a ``CategoricalConfig`` and

    Args:
        base_config: the config of a ViT, DeiT or DINOv2 classifier as a dict, with its ``model_type``.
        num_inference_steps: noise levels on which a prediction by denoising walks from ``sigma_max`` to
            ``sigma_min``; by default 4 for ``edm``, as in the paper. With ``exact`` the walk ends in a class that is
            drawn from the posterior, and f at ``sigma_max`` is the posterior itself: 1, and more with many draws.
            Not used with ``clean``, which reads the classes from f.
        num_draws: noise draws that such a prediction averages the probabilities of.
        id2label: names of the classes; the base's unless given.

    Example:
        >>> base = {"model_type": "vit", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        ...         "num_attention_heads": 4, "image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
        >>> config = BlockedImageClassificationConfig(base_config=base, num_blocks=3)
        >>> config.layers_per_block, config.num_classes, config.num_positions
        ([1, 2, 3], 10, 17)
    """

    model_type = "blocked_image_classification"

    num_inference_steps: int | None = None
    num_draws: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_inference_steps is None:
            self.num_inference_steps = 4 if self.readout == "edm" else 1
        for name in ("num_inference_steps", "num_draws"):
            check_count(name, getattr(self, name))
        names = self.make_base_config().id2label
        own: dict[int, str] = getattr(self, "id2label", None) or {}
        if len(own) != len(names) or all(name == f"LABEL_{i}" for i, name in own.items()):
            self.id2label = dict(names)
            self.label2id = {name: i for i, name in names.items()}

    def complete_base_config(self, base_config: dict) -> dict:
        if base_config.get("model_type") is not None and base_config["model_type"] not in PREFIX:
            raise ValueError(f"a model of type {base_config['model_type']!r:.60} cannot be cut. {MEND}")
        full = complete_transformers_config(base_config, _SIZES, "an image classifier", "vit", MEND)
        for name in ("image_size", "patch_size"):
            _pair(name, full[name])
        image, patch = _pair("image_size", full["image_size"]), _pair("patch_size", full["patch_size"])
        if any(i % p for i, p in zip(image, patch, strict=True)):
            raise ValueError(f"image_size={full['image_size']} is not a multiple of patch_size={full['patch_size']}.")
        if (image[0] // patch[0]) * (image[1] // patch[1]) > MAX_POSITIONS:
            raise ValueError(
                f"image_size={full['image_size']} with patch_size={full['patch_size']} gives more than {MAX_POSITIONS} "
                "positions."
            )
        if not full["id2label"]:
            raise ValueError("the base has no classes: give num_labels, the number of classes, of at least 1.")
        return {name: value for name, value in full.items() if name.removeprefix("_") not in _OF_BACKBONES}

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.base_config["id2label"])

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return int(self.base_config["num_channels"])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return _pair("image_size", self.base_config["image_size"])

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return _pair("patch_size", self.base_config["patch_size"])

    @property
    def interpolation_is_asked(self) -> bool:
        """Whether embeddings must be told to interpolate for images of another size: DINOv2's do so unasked."""
        return self.base_config["model_type"] in ("vit", "deit")

    @property
    def num_prefix(self) -> int:
        """Tokens in front of the patches: [CLS], and perhaps others."""
        return PREFIX[self.base_config["model_type"]] + int(self.base_config.get("num_register_tokens") or 0)

    @property
    def num_positions(self) -> int:
        """Tokens of an image: patches, and those in front of them."""
        height, width = self.image_size
        rows, columns = self.patch_size
        return (height // rows) * (width // columns) + self.num_prefix


def check_count(name: str, value: Any) -> None:
    """Raise a ``ValueError`` unless a value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")


def _pair(name: str, value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise ValueError(f"{name}={value!r} must be a positive whole number, or two: height and width.")
    return values


def config_fields() -> frozenset[str]:
    """Settings of a blocked image classifier besides its base and number of blocks."""
    return fields_of(BlockedImageClassificationConfig) | {"id2label", "label2id"}
