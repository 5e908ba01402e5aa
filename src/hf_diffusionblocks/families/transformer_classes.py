"""The diffusers transformers that ``BlockedDiTModel`` cuts: one table of what differs between their classes.

A class can be cut if its layers lie in lists, one after the other, and each passes on what the next one takes. (The
layers of a U-Net do not: skip connections tie its first layers to its last, so a block of it would want another's
hidden states.) A block is a model of the same class with its own layers, its own copy of stem and head, and the whole
conditioning: where text flows through the layers beside the image (SD3, Flux), each block embeds the prompt anew, as
each block of a DiT embeds the label. Blocks share nothing (arXiv 2506.14202, section 4.2); with one block nothing
changes.

A block that is not the last one needs no text after its last layer. diffusers' SD3 builds a model's last layer without
the parts that would make it (``context_pre_only``), so a block's last layer gets those that are left; a Flux block
without single-stream layers has identities in their place.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor, nn

Conditioning = dict[str, Any]


class Column(NamedTuple):
    """What a model is conditioned on, beside the noise level.

    Args:
        shape: of one sample; None stands for the length of the text.
        integer: whether it holds whole numbers.
        optional: whether it may be missing.
    """

    shape: tuple[int | None, ...]
    integer: bool = False
    optional: bool = False


def _no_columns(base: Mapping[str, Any]) -> dict[str, Column]:
    return {}


@dataclass(frozen=True)
class TransformerClass:
    """How a class of diffusers' transformers is cut and called.

    Attributes:
        model: the class.
        layer_lists: its lists of layers in the order of the data: setting that counts them, attribute.
        sizes: its settings that are positive whole numbers.
        layer_parts: per list, the parts of a layer that hold most of its weights and are called as a whole.
        run: ``run(module, x, c_noise, conditioning)``: the raw network on images ``x``.
        columns: what it is conditioned on, by name, from its config; empty for class labels.
        preconditioning: how its published weights were trained, if there is but one way.
        timestep_unit: the class multiplies its timestep by this before it embeds it.
        packing: side of the squares of pixels that are packed into channels outside of the network.
        text_length: usual length of a prompt, for plans of memory.
        head: the layers of its output, which start at zero.
        whole_network: arguments of its ``forward`` that count layers of the whole network.
    """

    model: type[ModelMixin]
    layer_lists: tuple[tuple[str, str], ...]
    sizes: tuple[str, ...]
    layer_parts: dict[str, tuple[str, ...]]
    run: Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
    columns: Callable[[Mapping[str, Any]], dict[str, Column]] = _no_columns
    preconditioning: str | None = None
    timestep_unit: int = 1
    packing: int = 1
    text_length: int = 0
    head: tuple[str, ...] = ("proj_out",)
    whole_network: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its name in diffusers."""
        return self.model.__name__

    @property
    def defaults(self) -> dict[str, Any]:
        """Its settings and their defaults."""
        return _defaults(self.model)  # type: ignore[arg-type]  # classes are hashable

    @property
    def has_labels(self) -> bool:
        """Whether it is conditioned on class labels."""
        return self.columns is _no_columns

    def num_layers(self, base: Mapping[str, Any]) -> int:
        """L, the layers of all lists."""
        return sum(base[setting] for setting, _ in self.layer_lists)

    def cut(self, base: Mapping[str, Any], layers: range) -> list[tuple[str, str, range]]:
        """A block's share of each list: setting, attribute and numbers inside the list (none: an empty range)."""
        shares, offset = [], 0
        for setting, attribute in self.layer_lists:
            count = base[setting]
            start, stop = (min(max(n - offset, 0), count) for n in (layers.start, layers.stop))
            shares.append((setting, attribute, range(start, stop)))
            offset += count
        return shares

    def block_settings(self, base: Mapping[str, Any], layers: range) -> dict[str, Any]:
        """Settings of a model of the class that has these layers only."""
        shares = self.cut(base, layers)
        settings = dict(base) | {setting: len(numbers) for setting, _, numbers in shares}
        if "dual_attention_layers" in base:
            first = shares[0][2]
            settings["dual_attention_layers"] = [i - first.start for i in base["dual_attention_layers"] if i in first]
        return settings

    def make_block(self, base: Mapping[str, Any], layers: range) -> nn.Module:
        """A model of the class that has these layers only, without what only later layers would use."""
        module = self.model(**self.block_settings(base, layers))
        if self.model is FluxTransformer2DModel and layers.stop < self.num_layers(base):
            drop_text_output(module)
        return module

    def block_weights(
        self, base: Mapping[str, Any], layers: range, block: nn.Module, weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """A block's weights out of the whole model's, copied: its layers, renumbered, and everything that is no layer.

        Args:
            base: the whole model's config.
            layers: the block's layers.
            block: the block, whose state dict names what it needs.
            weights: the whole model's state dict.
        """
        starts = {attribute: numbers.start for _, attribute, numbers in self.cut(base, layers)}
        part = {}
        for key, wanted in block.state_dict().items():
            source, attribute = key, key.split(".", 1)[0]
            if attribute in starts:
                _, i, rest = key.split(".", 2)
                source = f"{attribute}.{starts[attribute] + int(i)}.{rest}"
            part[key] = _first_rows(key, weights[source], wanted.shape).detach().clone()
        return part


def _first_rows(key: str, source: Tensor, shape: torch.Size) -> Tensor:
    """SD3's text norm of a layer that passes text on has rows (shift, scale, gate, ...) of its modulation; one that
    does not has (scale, shift) (``AdaLayerNormZero`` and ``AdaLayerNormContinuous``)."""
    if ".norm1_context.linear." in key and source.shape != shape:
        shift, scale = source.chunk(6)[:2]
        return torch.cat([scale, shift])
    return source


def drop_text_output(block: nn.Module) -> None:
    """Take the parts that only the text after a Flux block's last layer needs out of a block that ends with a
    double-stream layer: nothing reads it, so they would never get a gradient."""
    if not len(block.single_transformer_blocks):
        last = block.transformer_blocks[-1]
        last.attn.to_add_out = nn.Identity()
        last.ff_context = nn.Identity()


@lru_cache(maxsize=8)
def _defaults(model: type) -> dict[str, Any]:
    signature = inspect.signature(model.__init__)  # type: ignore[misc]  # of the class itself
    return {n: p.default for n, p in signature.parameters.items() if n != "self"}


# -- how each class is called ------------------------------------------------------------------------------------


def _run_dit(module: nn.Module, x: Tensor, c_noise: Tensor, given: Conditioning) -> Tensor:
    return module(x, timestep=c_noise, class_labels=given["class_labels"]).sample


def _run_pixart(module: nn.Module, x: Tensor, c_noise: Tensor, given: Conditioning) -> Tensor:
    sizes = {name: given.get(name) for name in ("resolution", "aspect_ratio")}
    return module(
        x,
        encoder_hidden_states=given["encoder_hidden_states"],
        timestep=c_noise,
        added_cond_kwargs=sizes,
        encoder_attention_mask=given.get("encoder_attention_mask"),
    ).sample


def _run_sd3(module: nn.Module, x: Tensor, c_noise: Tensor, given: Conditioning) -> Tensor:
    return module(x, timestep=c_noise, **given).sample


def _run_flux(module: nn.Module, x: Tensor, c_noise: Tensor, given: Conditioning) -> Tensor:
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    ids = torch.zeros(height, width, 3, device=x.device, dtype=x.dtype)
    ids[..., 1] += torch.arange(height, device=x.device)[:, None]
    ids[..., 2] += torch.arange(width, device=x.device)[None]
    text = torch.zeros(given["encoder_hidden_states"].shape[1], 3, device=x.device, dtype=x.dtype)
    # the class embeds 1000 times its timestep
    packed = module(pack(x), timestep=c_noise / 1000, img_ids=ids.flatten(0, 1), txt_ids=text, **given).sample
    return unpack(packed, height, width)


def pack(x: Tensor) -> Tensor:
    """Images [batch, channels, height, width] as rows of 2 x 2 squares, [batch, height width / 4, 4 channels]."""
    batch, channels, height, width = x.shape
    squares = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(batch, height * width // 4, 4 * channels)


def unpack(rows: Tensor, height: int, width: int) -> Tensor:
    """The way back from ``pack``; height and width in squares."""
    squares = rows.view(len(rows), height, width, rows.shape[-1] // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(len(rows), rows.shape[-1] // 4, 2 * height, 2 * width)


def _pixart_columns(base: Mapping[str, Any]) -> dict[str, Column]:
    width = base["caption_channels"] or base["cross_attention_dim"]
    columns = {
        "encoder_hidden_states": Column((None, width)),
        "encoder_attention_mask": Column((None,), integer=True, optional=True),
    }
    sized = base["use_additional_conditions"]
    if sized or (sized is None and base["sample_size"] == 128):
        columns |= {"resolution": Column((2,)), "aspect_ratio": Column((1,))}
    return columns


def _joint_columns(base: Mapping[str, Any]) -> dict[str, Column]:
    columns = {
        "encoder_hidden_states": Column((None, base["joint_attention_dim"])),
        "pooled_projections": Column((base["pooled_projection_dim"],)),
    }
    return columns | ({"guidance": Column(())} if base.get("guidance_embeds") else {})


# -- the table ---------------------------------------------------------------------------------------------------

_HEADS = ("num_attention_heads", "attention_head_dim", "in_channels", "patch_size")
_JOINT = ("joint_attention_dim", "pooled_projection_dim")
_DOUBLE = ("norm1.linear", "norm1_context.linear", "attn", "attn2", "ff", "ff_context")

_TABLE = (
    TransformerClass(
        DiTTransformer2DModel,
        (("num_layers", "transformer_blocks"),),
        ("num_layers", *_HEADS, "sample_size", "num_embeds_ada_norm"),
        {"transformer_blocks": ("norm1.linear", "attn1", "ff")},  # the head reads the first one's norm1.emb
        _run_dit,
        head=("proj_out_1", "proj_out_2"),
    ),
    TransformerClass(
        PixArtTransformer2DModel,
        (("num_layers", "transformer_blocks"),),
        ("num_layers", *_HEADS, "sample_size", "cross_attention_dim"),
        {"transformer_blocks": ("attn1", "attn2", "ff")},
        _run_pixart,
        _pixart_columns,
        text_length=120,
    ),
    TransformerClass(
        SD3Transformer2DModel,
        (("num_layers", "transformer_blocks"),),
        ("num_layers", *_HEADS, "sample_size", "caption_projection_dim", "pos_embed_max_size", *_JOINT),
        {"transformer_blocks": _DOUBLE},
        _run_sd3,
        _joint_columns,
        preconditioning="rectified_flow",
        text_length=333,
        whole_network=("block_controlnet_hidden_states", "skip_layers"),
    ),
    TransformerClass(
        FluxTransformer2DModel,
        (("num_layers", "transformer_blocks"), ("num_single_layers", "single_transformer_blocks")),
        (*_HEADS, *_JOINT),
        {"transformer_blocks": _DOUBLE, "single_transformer_blocks": ("norm.linear", "attn", "proj_mlp", "proj_out")},
        _run_flux,
        _joint_columns,
        preconditioning="rectified_flow",
        timestep_unit=1000,
        packing=2,
        text_length=512,
        whole_network=("controlnet_block_samples", "controlnet_single_block_samples"),
    ),
)
TRANSFORMER_CLASSES = {entry.name: entry for entry in _TABLE}


def cuttable() -> str:
    """The names of the classes that can be cut, for messages."""
    *others, last = TRANSFORMER_CLASSES
    return f"{', '.join(others)} or {last}"


def class_of(config: Mapping[str, Any]) -> TransformerClass | None:
    """The class that a config of diffusers names in ``_class_name``, a DiT by default; None for one that is not here.

    ``Transformer2DModel`` is the first class of DiT and PixArt, which their checkpoints still name.
    """
    name = config.get("_class_name", DiTTransformer2DModel.__name__)
    if name == "Transformer2DModel":
        single = config.get("norm_type") == "ada_norm_single"
        name = (PixArtTransformer2DModel if single else DiTTransformer2DModel).__name__
    return TRANSFORMER_CLASSES.get(name) if isinstance(name, str) else None


__all__ = [
    "TRANSFORMER_CLASSES",
    "Column",
    "TransformerClass",
    "class_of",
    "cuttable",
    "drop_text_output",
    "pack",
    "unpack",
]
