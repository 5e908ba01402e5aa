"""The pieces of a recurrent-depth model: prelude, adapter, core and coda, and who sees whom in them.

``x = prelude(tokens)``; each recurrence maps the state s to ``core(A [x, s])`` with a linear adapter A (Huginn, arXiv
2502.05171, section 3); the coda reads the last state. All layers are the base's own.

A position stands in a column. Its state is *known* if the token that it predicts is (a column of the prompt but the
last), else it *walks* along the noise grid. A known state sees the known ones before it and itself; a walking one the
known ones before its column and itself. A plain pass over all columns has no walking states.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import CacheLayerMixin

from ..conditioning import Modulation
from .causal_lm_block import CausalLMBlock
from .recurrent_config import BlockedRecurrentConfig
from .two_stream import _recomputed, attention_mask_for, modulated_layer


class RecurrentBlock(CausalLMBlock):
    """The base's layers in three parts, the adapter, the norms, the head, and the noise level's modulation."""

    def __init__(self, config: BlockedRecurrentConfig, attention: str | None):
        super().__init__(config, range(config.num_layers), 0, attention)
        self.config = config
        self.core_norm = copy.deepcopy(self.norm) if config.core_norm else nn.Identity()
        self.adapter = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        if config.two_stream:
            self.noisy_in = None  # the adapter takes its place
            self.modulations = self.modulations[config.prelude_layers :]

    def run_prelude(
        self, hidden: Float[Tensor, "batch tokens width"], places: "Places", caches: Sequence[CacheLayerMixin] = ()
    ) -> Float[Tensor, "batch tokens width"]:
        """x: what every recurrence reads."""
        return self._run(self.config.prelude, hidden, places, caches, None)

    def run_core(
        self,
        x: Float[Tensor, "batch tokens width"],
        state: Float[Tensor, "batch tokens width"],
        places: "Places",
        caches: Sequence[CacheLayerMixin] = (),
        embedded: Float[Tensor, "batch levels dim"] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """One recurrence, from a state to the next.

        Args:
            x: the prelude's output.
            state: the state.
            places: where the tokens stand.
            caches: one per layer of the core; none to keep nothing.
            embedded: the state's noise levels; None for a state without.
        """
        merged = self.adapter(torch.cat([x, state], dim=-1))
        return self.core_norm(self._run(self.config.core, merged, places, caches, embedded))

    def run_coda(
        self,
        state: Float[Tensor, "batch tokens width"],
        places: "Places",
        caches: Sequence[CacheLayerMixin] = (),
        embedded: Float[Tensor, "batch levels dim"] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """From the state to what the norm before the head reads."""
        return self._run(self.config.coda, state, places, caches, embedded)

    def _run(
        self,
        layers: range,
        hidden: Tensor,
        places: "Places",
        caches: Sequence[CacheLayerMixin],
        embedded: Tensor | None,
    ) -> Tensor:
        for i, number in enumerate(layers):
            layer = self.model.layers[number]
            mask = attention_mask_for(layer, places.mask(_window(self.config, number)), hidden)
            cache = _OneLayer(caches[i]) if caches else None
            modulation = None if embedded is None else self.modulations[number - self.config.prelude_layers]
            args = (layer, hidden, modulation, embedded, cache, mask, places.rotary)
            if self.training and layer.gradient_checkpointing:
                hidden = checkpoint(_layer, *args, use_reentrant=False)
            else:
                hidden = _layer(*args)
        return hidden


def _layer(
    layer: nn.Module,
    hidden: Tensor,
    modulation: Modulation | None,
    embedded: Tensor | None,
    cache: Any,
    mask: Tensor | None,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    if modulation is not None:
        return modulated_layer(layer, hidden, modulation, embedded, cache, mask, rotary)
    x = layer.self_attn(
        hidden_states=_recomputed(layer.input_layernorm, hidden),
        attention_mask=mask,
        position_embeddings=rotary,
        past_key_values=cache,
    )[0]
    hidden = hidden + x
    return hidden + layer.mlp(_recomputed(layer.post_attention_layernorm, hidden))


class _OneLayer:
    """One layer of a cache, whatever number the base's layer thinks it has."""

    def __init__(self, layer: CacheLayerMixin):
        self.layer = layer

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.layer.update(keys, values)


def _window(config: BlockedRecurrentConfig, layer: int) -> int | None:
    kinds, window = config.base_config.get("layer_types"), config.base_config.get("sliding_window")
    return None if kinds and kinds[layer] != "sliding_attention" else window


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor is more than a shape: plans and counts run on tensors that are not."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


@dataclass
class Places:
    """Where the tokens of a pass stand, and what they see.

    Attributes:
        rotary: their position embeddings.
        columns: their columns.
        walking: which of them walk.
        earlier: number of known columns, 0 and on, whose keys and values come from a cache.
        attention_mask: of all columns, 0 at padding.
        documents: number of each column's document; there is no attention across documents.
    """

    rotary: tuple[Tensor, Tensor]
    columns: Int[Tensor, "tokens"]
    walking: Bool[Tensor, "tokens"]
    earlier: int = 0
    attention_mask: Int[Tensor, "batch columns"] | None = None
    documents: Int[Tensor, "batch columns"] | None = None
    plain: bool = True
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None) -> Bool[Tensor, "b 1 tokens keys"] | None:
        """Who sees whom in a layer with such a window; None for plain causal attention."""
        if window not in self._masks:
            self._masks[window] = self._make(window)
        return self._masks[window]

    def _make(self, window: int | None) -> Tensor | None:
        free = self.attention_mask is None and self.documents is None
        count = self.earlier + len(self.columns)
        if free and self.plain and (window is None or count <= window) and (not self.earlier or len(self.columns) == 1):
            return None
        before = torch.arange(self.earlier, device=self.columns.device)
        keys = torch.cat([before, self.columns])
        walks = torch.cat([torch.zeros_like(before, dtype=torch.bool), self.walking])
        query, walking = self.columns[:, None], self.walking[:, None]
        own = (query == keys) & (walking == walks)
        seen = (~walks & (keys + walking.long() <= query)) | own
        if window is not None:
            seen = seen & (query - keys < window)
        seen = seen[None, None]
        if self.documents is not None:
            seen = seen & (self.documents[:, None, self.columns, None] == self.documents[:, None, None, keys])
        if self.attention_mask is not None:  # a padding token sees itself: a row without keys would give NaN
            seen = (seen & self.attention_mask.bool()[:, None, None, keys]) | own
        return seen
