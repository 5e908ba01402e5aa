"""The config of blocked diffusers transformers."""

from functools import lru_cache
from typing import Any

from ..config_checks import MAX_POSITIONS, check_sizes
from ..configuration import DiffusionBlocksConfig
from ..suggest import unknown_name
from .transformer_classes import TRANSFORMER_CLASSES, Column, TransformerClass, cuttable

DIT = "DiTTransformer2DModel"
# What the configs of older checkpoints (of `Transformer2DModel`, DiT's first class) hold besides, with the values that
# mean "not used". Other values describe a network that is not a DiT.
_LEGACY_SETTINGS = {
    "cross_attention_dim": None,
    "num_vector_embeds": None,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "double_self_attention": False,
    "attention_type": "default",
    "caption_channels": None,
    "interpolation_scale": None,
    "use_additional_conditions": None,
}


class BlockedDiTConfig(DiffusionBlocksConfig):
    """Config of ``BlockedDiTModel``: ``DiffusionBlocksConfig`` and

    Args:
        base_class: diffusers' class of the base, a name of
            ``TRANSFORMER_CLASSES``.
        label_dropout: share of training samples whose label (or prompt) is replaced by the null class (the empty
            prompt), for classifier-free guidance.
        default_sample_size: height and width of images or latents that plans of memory take where the base's config
            has none (Flux); 128 unless given.
        id2label: names of the classes.

    Example:
        >>> config = BlockedDiTConfig(base_config={"num_layers": 6, "sample_size": 8, "in_channels": 1}, num_blocks=3)
        >>> config.layers_per_block
        [2, 2, 2]
    """

    model_type = "blocked_dit"

    base_class: str = DIT
    label_dropout: float = 0.1
    default_sample_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout={self.label_dropout} must lie in [0, 1); DiT uses 0.1.")
        check_sizes(vars(self), ("default_sample_size",), optional=True)
        self._check_shape(self.base_config)
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"out_channels={self.out_channels} must be in_channels={self.in_channels}, or twice that for a "
                "learned variance."
            )

    def _check_shape(self, base: dict) -> None:
        if self.sample_size % (base["patch_size"] * self.transformer_class.packing):
            raise ValueError(
                f"sample_size={self.sample_size} is not a multiple of "
                f"patch_size={base['patch_size'] * self.transformer_class.packing}."
            )
        width = base["num_attention_heads"] * base["attention_head_dim"]
        if width % 4:
            raise ValueError(
                f"the width num_attention_heads * attention_head_dim = {width} must be a multiple of 4 (2-D positions)."
            )
        if base.get("caption_projection_dim", width) != width:
            raise ValueError(
                f"caption_projection_dim={base['caption_projection_dim']} must be the width num_attention_heads * "
                f"attention_head_dim = {width}: text and image go through the same layers."
            )
        if self.transformer_class.packing > 1:
            axes = base["axes_dims_rope"]
            if len(axes) != 3 or sum(axes) != base["attention_head_dim"] or any(n < 2 or n % 2 for n in axes):
                raise ValueError(
                    f"axes_dims_rope={axes} must be three even numbers that add up to "
                    f"attention_head_dim={base['attention_head_dim']}."
                )
            if base["in_channels"] % 4 or base["patch_size"] != 1:
                raise ValueError(
                    f"in_channels={base['in_channels']} must be a multiple of 4, squares of 2 x 2 in "
                    f"channels, and patch_size={base['patch_size']} must be 1."
                )

    def complete_base_config(self, base_config: dict) -> dict:
        if self.base_class not in TRANSFORMER_CLASSES:
            raise ValueError(f"base_class={self.base_class!r} cannot be cut: give {cuttable()}.")
        kind = self.transformer_class
        defaults = kind.defaults
        base_config = {
            k: v
            for k, v in base_config.items()
            if not k.startswith("_")
            and not (k not in defaults and k in _LEGACY_SETTINGS and v in (_LEGACY_SETTINGS[k], None, False))
        }
        for name in base_config:
            if name not in defaults:
                what = "DiT" if kind.name == DIT else kind.name
                raise ValueError(unknown_name(f"{what} setting", name, defaults))
        base: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in (defaults | base_config).items()}
        check_sizes(base, kind.sizes)
        check_sizes(base, ("out_channels", "caption_channels"), optional=True)
        for name, _ in kind.layer_lists:
            if not isinstance(base[name], int) or isinstance(base[name], bool) or base[name] < 0:
                raise ValueError(f"{name}={base[name]!r:.40} must be a whole number of layers.")
        for name in ("dual_attention_layers", "axes_dims_rope"):
            numbers = base.get(name, [])
            if not isinstance(numbers, list) or any(not isinstance(n, int) for n in numbers):
                raise ValueError(f"{name}={numbers!r:.40} must be a list of whole numbers.")
        positions = max(base.get("sample_size", 0) // base["patch_size"], base.get("pos_embed_max_size", 0)) ** 2
        if positions > MAX_POSITIONS:
            raise ValueError(
                f"sample_size={base['sample_size']} with patch_size={base['patch_size']} gives more than "
                f"{MAX_POSITIONS} positions."
            )
        return base

    @property
    def transformer_class(self) -> TransformerClass:
        """How the base's class is cut and called."""
        return TRANSFORMER_CLASSES[self.base_class]

    @property
    def columns(self) -> dict[str, Column]:
        """What the model is conditioned on besides the noise level, by name; empty for class labels."""
        return self.transformer_class.columns(self.base_config)

    @property
    def num_layers(self) -> int:
        """L, the layers of all of the base's lists."""
        return self.transformer_class.num_layers(self.base_config)

    @property
    def in_channels(self) -> int:
        """Channels of images or latents."""
        return self.base_config["in_channels"] // self.transformer_class.packing**2

    @property
    def out_channels(self) -> int:
        """Channels of the network's output: ``in_channels``, or twice that with a learned variance."""
        channels = self.base_config["out_channels"] or self.base_config["in_channels"]
        return channels // self.transformer_class.packing**2

    @property
    def sample_size(self) -> int:
        """Height and width of images or latents, in pixels."""
        return self.base_config.get("sample_size") or self.default_sample_size or 128

    @property
    def num_classes(self) -> int:
        """Number of classes without the null class; also the null class's index. 0 for models of prompts."""
        return self.base_config["num_embeds_ada_norm"] if self.transformer_class.has_labels else 0


def base_config_defaults() -> dict:
    """Settings of diffusers' DiT and their defaults."""
    return TRANSFORMER_CLASSES[DIT].defaults


@lru_cache(maxsize=1)
def config_fields() -> frozenset[str]:
    """Settings of a blocked DiT besides its base and number of blocks."""
    fields = set(BlockedDiTConfig.__annotations__) | set(DiffusionBlocksConfig.__annotations__)
    return frozenset(fields - {"base_config", "num_blocks"} | {"id2label", "label2id"})


__all__ = ["BlockedDiTConfig", "base_config_defaults", "config_fields"]
