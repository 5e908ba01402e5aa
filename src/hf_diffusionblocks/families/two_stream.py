"""Two streams: clean tokens, causal among themselves, and noisy targets (arXiv 2506.14202, App. B).

Noisy target j stands for token j + 1. It sees the clean tokens 0 to j and itself: never its own clean token, nothing
after it and no other noisy target. The clean tokens' keys and values come from the clean pass, so no mask over both
streams is needed: a target's keys are the clean ones and its own, [targets, tokens + targets].

The base's layers do the work. What stands here is only the residual structure of a layer with the modulation in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..conditioning import Modulation


@dataclass
class TwoStreamMasks:
    """Who sees whom.

    Attributes:
        clean: [batch or 1, 1, tokens, tokens], or None for plain causal attention.
        noisy: [batch or 1, 1, targets, tokens + targets].
    """

    clean: Bool[Tensor, "b 1 tokens tokens"] | None
    noisy: Bool[Tensor, "b 1 targets keys"]


def make_masks(
    tokens: int,
    targets: int | None = None,
    *,
    attention_mask: Int[Tensor, "batch tokens"] | None = None,
    documents: Int[Tensor, "batch tokens"] | None = None,
    window: int | None = None,
    device: torch.device | str | None = None,
) -> TwoStreamMasks:
    """Masks of one layer.

    Args:
        tokens: number of clean tokens.
        targets: number of noisy targets, those after the last so many tokens; as many as tokens by default.
        attention_mask: 0 at padding.
        documents: number of the document of each token; there is no attention across documents.
        window: size of a sliding window, the query's own position included.
        device: where to.
    """
    targets = tokens if targets is None else targets
    index = torch.arange(tokens, device=device)
    distance = index[:, None] - index[None, :]
    seen = (distance >= 0)[None, None]
    plain = attention_mask is None and documents is None and (window is None or window >= tokens)
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None, :]
    clean = seen if window is None else seen & (distance < window)
    # Target j is token j + 1: one further from each clean token, and itself the window's last position.
    noisy = seen if window is None else seen & (distance + 1 < window)
    noisy = noisy[:, :, tokens - targets :]
    own = torch.eye(targets, dtype=torch.bool, device=noisy.device).expand(noisy.shape[0], 1, targets, targets)
    noisy = torch.cat([noisy, own], dim=-1)
    if attention_mask is not None:  # a padding token sees itself: a row without keys would give NaN
        clean = clean | torch.eye(tokens, dtype=torch.bool, device=clean.device)
    return TwoStreamMasks(None if plain else clean, noisy)


def document_numbers(position_ids: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"] | None:
    """Number of each token's document, from positions that do not simply count on; None for one document per row."""
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(starts.any()):
        return None
    return nn.functional.pad(starts.long().cumsum(1), (1, 0))


class _Record:
    """Takes the place of a cache in one layer's call and keeps its keys and values."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values


class _Append:
    """Takes the place of a cache in one layer's call: the clean keys and values stand before the targets' own."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)


def attention_mask_for(layer: nn.Module, mask: Bool[Tensor, "..."] | None, hidden: Tensor) -> Tensor | None:
    """A mask (None for plain causal attention) as the layer's attention implementation takes it.

    Raises:
        ValueError: for an implementation that takes no mask.
    """
    kind = layer.self_attn.config._attn_implementation
    if kind == "sdpa":
        return mask
    if kind == "eager":
        if mask is None:  # eager attention without a mask sees everything
            mask = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool, device=hidden.device).tril()
        return torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
    raise ValueError(
        f"attn_implementation={kind!r} cannot run two streams of clean tokens and noisy targets: use 'sdpa' or "
        "'eager', or readout='clean', which has one stream."
    )


def _modulated(norm: nn.Module, hidden: Tensor, modulation: Modulation, embedded: Tensor, start: int) -> Tensor:
    shift, scale = modulation.parts(embedded, start, 2)
    return norm(hidden) * (1 + scale) + shift


def _gated(hidden: Tensor, branch: Tensor, modulation: Modulation, embedded: Tensor, start: int) -> Tensor:
    return hidden + (1 + modulation.parts(embedded, start, 1)[0]) * branch


def _recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """What is quick to compute but large to keep is computed again in the backward pass.

    Each target has its own noise level, so shift, scale and gate are as large as the hidden state: with the norms,
    a third of what a layer of the noisy stream would keep.
    """
    if torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)


def noisy_layer(
    layer: nn.Module,
    hidden: Float[Tensor, "batch targets width"],
    modulation: Modulation,
    embedded: Float[Tensor, "batch targets dim"],
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
) -> Float[Tensor, "batch targets width"]:
    """A layer of the base on the noisy targets, modulated by their noise levels.

    Args:
        layer: with ``input_layernorm``, ``self_attn``, ``post_attention_layernorm`` and ``mlp``, as Llama's.
        hidden: the targets.
        modulation: gives shift, scale and gate of attention and MLP.
        embedded: the targets' noise levels.
        keys: of the clean tokens, [batch, key heads, tokens, head width], rotated.
        values: the same.
        mask: who sees whom, as the attention implementation takes it.
        position_embeddings: of the targets.
    """
    return modulated_layer(layer, hidden, modulation, embedded, _Append(keys, values), mask, position_embeddings)


def modulated_layer(
    layer: nn.Module,
    hidden: Float[Tensor, "batch tokens width"],
    modulation: Modulation,
    embedded: Float[Tensor, "batch levels dim"],
    cache: Any,
    mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
) -> Float[Tensor, "batch tokens width"]:
    """A layer of the base, modulated by noise levels: one per token, or one per row.

    Args:
        layer: as in ``noisy_layer``.
        hidden: its input.
        modulation: gives shift, scale and gate of attention and MLP.
        embedded: the noise levels.
        cache: has ``update(keys, values, ...)``, which gives those to attend to; None for the tokens' own.
        mask: who sees whom, as the attention implementation takes it.
        position_embeddings: of the tokens.
    """
    x = layer.self_attn(
        hidden_states=_recomputed(_modulated, layer.input_layernorm, hidden, modulation, embedded, 0),
        attention_mask=mask,
        position_embeddings=position_embeddings,
        past_key_values=cache,
    )[0]
    hidden = _recomputed(_gated, hidden, x, modulation, embedded, 2)
    x = layer.mlp(_recomputed(_modulated, layer.post_attention_layernorm, hidden, modulation, embedded, 3))
    return _recomputed(_gated, hidden, x, modulation, embedded, 5)


def two_stream_layer(
    layer: nn.Module,
    clean: Float[Tensor, "batch tokens width"],
    noisy: Float[Tensor, "batch targets width"],
    modulation: Modulation,
    embedded: Float[Tensor, "batch targets dim"],
    masks: TwoStreamMasks,
    clean_positions: tuple[Tensor, Tensor],
    noisy_positions: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """A layer of the base on the clean tokens, then on the noisy targets, which attend to the clean tokens' keys."""
    record = _Record()
    # Not layer(...): transformers' own checkpointing would drop the record. Checkpoint this function instead.
    x = layer.self_attn(
        hidden_states=_recomputed(layer.input_layernorm, clean),
        attention_mask=attention_mask_for(layer, masks.clean, clean),
        position_embeddings=clean_positions,
        past_key_values=record,
    )[0]
    clean = clean + x
    clean = clean + layer.mlp(_recomputed(layer.post_attention_layernorm, clean))
    mask = attention_mask_for(layer, masks.noisy, noisy)
    noisy = noisy_layer(layer, noisy, modulation, embedded, record.keys, record.values, mask, noisy_positions)
    return clean, noisy
