"""One new token and the noisy target behind it, block by block: what sampling along the noise grid runs.

The clean token and its target could pass through a block one after the other
(``BlockedForCausalLM.clean_block``, ``BlockedForCausalLM.noisy_targets``). Generation is bound by reading the
weights, so here they share one pass where that is possible, and what depends on the noise level only is computed once.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .causal_lm import BlockedForCausalLM
from .causal_lm_block import CausalLMBlock
from .two_stream import attention_mask_for

# Shift, factor and factor of the branch, of attention and MLP: as Modulation gives them, with the 1 added.
LayerModulation = tuple[Tensor, ...]


class NoiseStep:
    """A noise level in a block, and the one that the walk goes to from there.

    Attributes:
        sigma: [1], float32.
        ratio: next noise level over this one; 0 at the walk's end.
    """

    def __init__(self, model: BlockedForCausalLM, block: int, sigma: float, sigma_next: float):
        self.sigma = torch.tensor([sigma], dtype=torch.float32, device=model.device)
        self.ratio = sigma_next / sigma
        if model.config.two_stream:
            module, c = model.block(block), model.preconditioning(self.sigma)
            self.c_in = c.c_in
            embedded = module.noise_embedding(c.c_noise)[:, None]
            self.alone: list[LayerModulation] = [
                tuple(m if i % 3 == 0 else 1 + m for i, m in enumerate(modulation(embedded)))  # each [1, 1, width]
                for modulation in module.modulations
            ]
            # In front of the target stands the clean token, which nothing modulates.
            self.joint: list[LayerModulation] = [
                tuple(F.pad(m, (0, 0, 1, 0), value=float(i % 3 > 0)) for i, m in enumerate(layer))
                for layer in self.alone
            ]


class TokenStreams:
    """The newest clean tokens and the noisy target behind the last of them.

    Args:
        model: the model.
        cache: the whole model's, which holds the tokens before; the new ones are added, targets never. None only
            without a noisy stream.
        position_ids: of all tokens.
        attention_mask: of all tokens, 0 at padding; None if there is none.
        new: number of new tokens.
    """

    def __init__(
        self,
        model: BlockedForCausalLM,
        cache: Cache | None,
        position_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"] | None,
        new: int,
    ):
        self.model, self.cache = model, cache
        self.attention_mask, self.position_ids = attention_mask, position_ids[:, -new:]
        # A sliding window's cache drops keys when a target comes in and has no way back; a static one has no views.
        self.shared = (
            model.config.two_stream
            and new == 1
            and not model.config.base_config.get("sliding_window")
            and cache is not None
            and all(type(layer) is DynamicLayer for layer in cache.layers)
        )
        if self.shared:
            rope = model.block(model.resident_blocks[0]).model.rotary_emb  # blocks differ in their number of layers
            cos, sin = rope(model.embed_tokens.weight, torch.cat([self.position_ids, self.position_ids + 1], dim=1))
            self._positions = {2: (cos, sin), 1: (cos[:, 1:], sin[:, 1:])}
            self._masks = _masks(attention_mask, position_ids.shape[1], position_ids.device)
        self._single: tuple[Tensor, Tensor] | None = None
        self._single_known = model.config.two_stream or new > 1

    def clean(self, block: int, hidden: Float[Tensor, "batch new width"]) -> Float[Tensor, "batch new width"]:
        """A block's layers on the clean tokens, before the norm."""
        places = {"attention_mask": self.attention_mask, "position_ids": self.position_ids}
        if not self._single_known:
            self._single, self._single_known = self.model.single_step(hidden, self.cache, **places), True
        return self.model.clean_block(
            hidden, block, past_key_values=self.cache, position_embeddings=self._single, **places
        )

    def both(
        self, block: int, step: NoiseStep, hidden: Float[Tensor, "batch new width"], z: Float[Tensor, "batch width"]
    ) -> tuple[Float[Tensor, "batch new width"], Float[Tensor, "batch width"]]:
        """A block's layers on the clean tokens, before the norm, and on the target, after it."""
        if not self.shared:
            hidden = self.clean(block, hidden)
            return hidden, self.noisy(block, step, z)
        module = self.model.block(block)
        x = torch.cat([hidden, self._noisy_input(module, step, z)], dim=1)
        x = self._run(block, x, step.joint)
        return x[:, :1], module.norm(x[:, 1])

    def noisy(self, block: int, step: NoiseStep, z: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """A block's layers on the target, after the norm; the clean tokens have been there before."""
        module = self.model.block(block)
        if self.shared:
            return module.norm(self._run(block, self._noisy_input(module, step, z), step.alone)[:, 0])
        places = {"attention_mask": self.attention_mask, "position_ids": self.position_ids[:, -1:]}
        return self.model.noisy_targets(z[:, None], step.sigma.expand(len(z), 1), block, self.cache, **places)[:, 0]

    def _noisy_input(self, module: CausalLMBlock, step: NoiseStep, z: Tensor) -> Tensor:
        return module.noisy_in((step.c_in[:, None] * z).to(self.model.dtype))[:, None]

    def _run(self, block: int, x: Tensor, modulations: Sequence[LayerModulation]) -> Tensor:
        """A block's layers on one or two positions of each row, the last of which is the target."""
        cache, layers = self.model._cache_of(self.cache, block), self.model.block(block).model.layers
        positions, mask = self._positions[x.shape[1]], self._masks[x.shape[1]]
        mask = None if mask is None else attention_mask_for(layers[0], mask, x.dtype)
        for layer, modulation in zip(layers, modulations, strict=True):
            shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
            branch = layer.self_attn(
                hidden_states=torch.addcmul(shift, layer.input_layernorm(x), scale),
                attention_mask=mask,
                position_embeddings=positions,
                past_key_values=cache,
            )[0]
            x = torch.addcmul(x, branch, gate)
            branch = layer.mlp(torch.addcmul(mlp_shift, layer.post_attention_layernorm(x), mlp_scale))
            x = torch.addcmul(x, branch, mlp_gate)
        for states in cache.layers:
            states.crop(-1)  # nothing later sees a noisy target
        return x


def _masks(attention_mask: Tensor | None, tokens: int, device: torch.device) -> dict[int, Tensor | None]:
    """By number of queries, [batch or 1, 1, queries, tokens + 1]: the clean token does not see its target."""
    seen = torch.ones(1, tokens, dtype=torch.bool, device=device) if attention_mask is None else attention_mask > 0
    own = torch.tensor([[False], [True]], device=device).expand(len(seen), 1, 2, 1)
    joint = torch.cat([seen[:, None, None].expand(-1, 1, 2, -1), own], dim=-1)
    return {2: joint, 1: None if attention_mask is None else joint[:, :, 1:]}
