"""The blocks of a causal language model, and the clean stream of tokens through their layers."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicLayer

from ..conditioning import Modulation
from .categorical import BlockedCategoricalModel
from .causal_lm_block import CausalLMBlock
from .causal_lm_config import BlockedCausalLMConfig
from .token_table import TokenTableMixin


class BlockedDecoder(TokenTableMixin, BlockedCategoricalModel):
    """A decoder in blocks: token embeddings, which all share, and per block its layers, a norm and a head."""

    config_class = BlockedCausalLMConfig
    main_input_name = "input_ids"
    handed_on = ("norm", "lm_head")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    # -- building ------------------------------------------------------------------------------------------------

    def make_block(self, block: int) -> CausalLMBlock:
        return CausalLMBlock(self.config, self.partition.layers(block), block, self.config._attn_implementation)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Modulation):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, CausalLMBlock):
            if module.noisy_in is not None:  # c_in z has unit variance; token embeddings start with this much
                init.eye_(module.noisy_in.weight)
                scaled = module.noisy_in.weight * self.config.get_text_config().initializer_range
                init.copy_(module.noisy_in.weight, scaled)
            if module.logit_scale is not None:
                init.constant_(module.logit_scale, 2.0)
            if self.config.initialization == "identity":
                if self.config.context == "cascade" and not module.is_first:
                    module.zero_branches()
                module.zero_auxiliary_branches()

    # -- the clean stream ----------------------------------------------------------------------------------------

    def clean_block(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        block: int,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "batch tokens width"]:
        """A block's layers on a clean hidden state, before its norm: transformers' own forward pass.

        With ``position_embeddings`` (see ``single_step``) the layers run without what a decoder does around them.
        """
        cache = None if past_key_values is None else self._cache_of(past_key_values, block)
        if position_embeddings is not None:
            for layer in self.block(block).model.layers:
                hidden = layer(
                    hidden,
                    attention_mask=None,
                    position_ids=position_ids,
                    past_key_values=cache,
                    use_cache=True,
                    position_embeddings=position_embeddings,
                )
            return hidden
        return self.block(block).model(
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            **kwargs,
        )[0]

    def single_step(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        cache: Cache | None,
        attention_mask: Tensor | None,
        position_ids: Int[Tensor, "rows tokens"],
    ) -> tuple[Tensor, Tensor] | None:
        """The position embeddings of one new token that sees all tokens before it; None where that is not so.

        Such a token needs no mask. What a decoder does around its layers, once for each block, is a tenth of the time
        of a small model's step.
        """
        if (
            cache is None
            or hidden.shape[1] != 1
            or self.config._attn_implementation not in ("sdpa", "eager")
            or self.config.base_config.get("sliding_window")
            or not all(type(layer) is DynamicLayer for layer in cache.layers)
            or not (attention_mask is None or (attention_mask.ndim == 2 and bool(attention_mask.all())))
        ):
            return None
        return self.block(self.resident_blocks[0]).model.rotary_emb(hidden, position_ids)

    def _cache_of(self, cache: Cache, block: int) -> Cache:
        """A view of a whole model's cache that holds a block's layers; the layers' states are shared."""
        layers = self.partition.layers(block)
        replicate = getattr(cache, "layer_class_to_replicate", None)
        if replicate is not None and not cache.layers:
            cache.layers.extend(replicate() for _ in range(self.config.num_layers))
        if len(cache.layers) != self.config.num_layers:
            raise ValueError(
                f"past_key_values has {len(cache.layers)} layers, the model {self.config.num_layers}: it is another "
                "model's cache. Pass DynamicCache(config=model.config)."
            )
        return Cache(layers=cache.layers[layers[0] : layers[-1] + 1])

    def start(self, inputs: Int[Tensor, "batch tokens"], block: int = 0) -> Float[Tensor, "batch tokens width"]:
        return self.embed_tokens(inputs)

    def places(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: batch[k] for k in ("position_ids", "attention_mask") if k in batch}

    def num_positions(self, inputs: Int[Tensor, "batch tokens"]) -> int:
        return inputs.shape[1]

    def tied_table(self) -> nn.Parameter | None:
        table = self.embed_tokens.weight
        return table if self.config.tied_head and table.requires_grad else None

    def head_weight(self, block: int) -> Float[Tensor, "vocab width"]:
        """The output matrix of a block's head; with ``edm``, which has none of its own, the table of targets."""
        if self.config.readout == "edm":
            return self.target_table()
        return self.embed_tokens.weight if self.config.tied_head else self.block(block).lm_head.weight

    def training_hidden(
        self, hidden: Float[Tensor, "batch tokens width"], block: int, **kwargs: Any
    ) -> Float[Tensor, "batch tokens width"]:
        """From a block's output through its auxiliary layers and norm: what its local loss reads."""
        module = self.block(block)
        if module.auxiliary is not None:
            hidden = module.auxiliary(inputs_embeds=hidden, use_cache=False, **kwargs)[0]
        return module.norm(hidden)

    def _positions(self, like: Tensor, position_ids: Tensor | None, cache: Cache | None = None) -> Tensor:
        if position_ids is not None:
            return position_ids
        seen = cache.get_seq_length() if cache is not None else 0
        return torch.arange(seen, seen + like.shape[1], device=like.device)[None]

    # -- for trainer and planner ---------------------------------------------------------------------------------

    def check_batch(self, batch: dict[str, Tensor]) -> None:
        super().check_batch(batch)
        if batch["input_ids"].shape[1] < 2:
            raise ValueError("the rows have one token: two are needed, one to read and one to predict.")

    def layer_modules(self, block: int) -> Iterator[nn.Module]:
        part = self.block(block)
        for decoder in (part.model, part.auxiliary):
            for layer in decoder.layers if decoder is not None else ():
                yield from (layer.self_attn, layer.mlp)  # two streams never call a layer as a whole

    def dummy_batch(  # type: ignore[override]  # a family names its settings
        self, batch_size: int, tokens: int | None = None
    ) -> dict[str, Tensor]:
        tokens = tokens or min(256, self.config.max_position_embeddings)
        batch = {"input_ids": torch.zeros(batch_size, tokens, dtype=torch.int64)}
        if self.config.context == "cascade":  # what the blocks below give, one of which is resident at a time
            batch["hidden_states"] = torch.zeros(batch_size, tokens, self.config.hidden_size)
        return batch
