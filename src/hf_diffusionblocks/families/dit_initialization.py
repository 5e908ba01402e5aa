"""Initial weights of blocked diffusers transformers: modulation and output start at zero, so a new block starts as
D = c_skip z (DiT, arXiv 2212.09748, section 3.2, adaLN-Zero; PixArt, arXiv 2310.00426, section 2.3)."""

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import (
    PatchEmbed,
    PixArtAlphaTextProjection,
    TimestepEmbedding,
    get_2d_sincos_pos_embed,
)
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormSingle,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    RMSNorm,
    SD35AdaLayerNormZeroX,
)
from torch import nn
from transformers import initialization as init

from .transformer_classes import TRANSFORMER_CLASSES

_MODULATIONS = (AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous, SD35AdaLayerNormZeroX)


def init_module(module: nn.Module) -> None:
    """Initialise what a module itself holds; called for its parts first, whose values it may overrule."""
    if isinstance(module, nn.Linear):
        init.xavier_uniform_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, RMSNorm)):
        if module.weight is not None:
            init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)
    elif isinstance(module, (TimestepEmbedding, PixArtAlphaTextProjection)):
        init.normal_(module.linear_1.weight, std=0.02)
        init.normal_(module.linear_2.weight, std=0.02)
    elif isinstance(module, _MODULATIONS):
        _zeros(module.linear)
    elif isinstance(module, AdaLayerNormSingle):
        init.normal_(module.linear.weight, std=0.02)
    elif isinstance(module, BasicTransformerBlock):
        if module.norm_type == "ada_norm_single":  # PixArt's
            init.normal_(module.scale_shift_table, std=module.scale_shift_table.shape[-1] ** -0.5)
            _zeros(module.attn2.to_out[0])
    elif isinstance(module, PatchEmbed):
        _init_patches(module)
    elif type(module).__name__ in TRANSFORMER_CLASSES:
        for name in TRANSFORMER_CLASSES[type(module).__name__].head:
            _zeros(getattr(module, name))
        table = getattr(module, "scale_shift_table", None)
        if table is not None:
            init.normal_(table, std=table.shape[-1] ** -0.5)


def _zeros(linear: nn.Linear) -> None:
    init.zeros_(linear.weight)
    if linear.bias is not None:
        init.zeros_(linear.bias)


def _init_patches(module: PatchEmbed) -> None:
    if not getattr(module.proj.weight, "_is_hf_initialized", False):
        flat = torch.empty(module.proj.weight.shape[0], module.proj.weight[0].numel())
        init.xavier_uniform_(flat)
        module.proj.weight.copy_(flat.view_as(module.proj.weight))
    init.zeros_(module.proj.bias)
    if not (module.pos_embed_max_size and getattr(module.pos_embed, "_is_hf_initialized", False)):
        set_positions(module)


def set_positions(module: PatchEmbed, device: torch.device | str | None = None) -> None:
    """Compute the position embedding of a stem; where it is not in the files (all but SD3's), loading leaves it empty.

    Args:
        module: the stem.
        device: where to put it; by default where it is.
    """
    positions = get_2d_sincos_pos_embed(
        module.pos_embed.shape[-1],
        int(module.pos_embed.shape[1] ** 0.5),
        base_size=module.base_size,
        interpolation_scale=module.interpolation_scale,
        output_type="pt",
        device=torch.device("cpu"),
    )
    old = module.pos_embed
    if device is None:
        device = old.device
    if torch.device(device).type != "meta":
        module.pos_embed = positions.float().unsqueeze(0).to(device, old.dtype)


def fill_positions(model: nn.Module, device: torch.device | str) -> None:
    """``set_positions`` of all stems of a model whose files do not hold them."""
    for module in model.modules():
        if isinstance(module, PatchEmbed) and not module.pos_embed_max_size:
            set_positions(module, device)


__all__ = ["fill_positions", "init_module", "set_positions"]
