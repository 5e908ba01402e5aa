"""Blocked causal language models: Llama, Mistral, Qwen2, Qwen3 and decoders built of the same pieces.

Each block holds transformers' own decoder of its layers (without embeddings), a norm, an output head unless the head is
tied to the embeddings, and, in training only, auxiliary layers between its output and its head. All blocks share the
token embedding: it defines the space that noisy targets live in.

Three readouts, from the hidden state f to the next token's distribution (arXiv 2506.14202, App. B, and its limit):

``clean``
    ``softmax(f(past))``: no noisy input at all. For a categorical target the best ``f`` of the exact form is
    ``log p(token | past)`` at every noise level, so this is the denoiser that ``exact`` converges to, trained by
    ordinary cross-entropy.
``exact``
    ``softmax(f(past, z, sigma) + <z, e_k> / sigma^2)``: the likelihood of z under token k is known in closed form.
``edm``
    the paper's: ``softmax(exp(s) <D, e_k>)`` with EDM's ``D = c_skip z + c_out F`` and a learned temperature s.

Two contexts: ``independent`` (the paper's: each block reads the clean token embeddings through its own layers only) and
``cascade`` (block b reads what block b - 1 made of them, without gradient).
"""

import copy
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..agreement import hub_name, weights_digest
from ..conditioning import Modulation
from ..losses import linear_cross_entropy, linear_logits
from ..preconditioning import Coefficients
from .base_loading import part_settings
from .categorical import BlockedCategoricalModel
from .categorical_config import family_settings
from .causal_lm_block import CausalLMBlock
from .causal_lm_checks import (
    STOP_STRING_TOOLS,
    check_denoising,
    check_generated_length,
    check_keywords,
    check_some_target,
    check_tokens,
)
from .causal_lm_config import PRESETS, BlockedCausalLMConfig
from .causal_lm_conversion import check_same_function, copy_weights, decoder_of, resize_vocabulary
from .stop_strings import StopStrings
from .two_stream import (
    TwoStreamMasks,
    attention_mask_for,
    document_numbers,
    make_masks,
    noisy_layer,
    two_stream_layer,
)


class BlockedForCausalLM(BlockedCategoricalModel, GenerationMixin):
    """A decoder cut into blocks that are trained alone.

    Example:
        >>> base = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        ...         "num_attention_heads": 4, "vocab_size": 100}
        >>> model = BlockedForCausalLM.from_base(base, num_blocks=3)
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 100])
    """

    config_class = BlockedCausalLMConfig
    main_input_name = "input_ids"
    handed_on = ("norm", "lm_head")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def __init__(self, config: BlockedCausalLMConfig, blocks: Sequence[int] | None = None):
        super().__init__(config, blocks)

    # -- building ------------------------------------------------------------------------------------------------

    def make_shared(self) -> None:
        self.embed_tokens = nn.Embedding(self.config.vocab_size, self.config.hidden_size)

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

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The head of the next token's logits, the embeddings if it is tied; None if it is not loaded or has none."""
        if self.config.tied_head:
            return self.embed_tokens
        last = self.language_blocks()[-1]
        return self.block(last).lm_head if last in self.resident_blocks else None

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers, for the embeddings and every block's head.

        Raises:
            ValueError: if not all blocks are loaded.
        """
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            resize_vocabulary(self, new_num_tokens, pad_to_multiple_of, mean_resizing)
        return self.embed_tokens

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
        """The output matrix of a block's head."""
        return self.embed_tokens.weight if self.config.tied_head else self.block(block).lm_head.weight

    def training_hidden(
        self, hidden: Float[Tensor, "batch tokens width"], block: int, **kwargs: Any
    ) -> Float[Tensor, "batch tokens width"]:
        """From a block's output through its auxiliary layers and norm: what its local loss reads."""
        module = self.block(block)
        if module.auxiliary is not None:
            hidden = module.auxiliary(inputs_embeds=hidden, use_cache=False, **kwargs)[0]
        return module.norm(hidden)

    # -- noisy targets -------------------------------------------------------------------------------------------

    def target_table(self) -> Float[Tensor, "vocab width"]:
        """e_k: the token embeddings with rows of norm 1, float32. Noisy targets are ``e_k + sigma * eps``."""
        return nn.functional.normalize(self.embed_tokens.weight.float(), dim=-1)

    def two_streams(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        z: Float[Tensor, "batch tokens width"],
        sigma: Float[Tensor, "batch tokens"],
        block: int,
        *,
        position_ids: Int[Tensor, "rows tokens"],
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A block's layers on the clean tokens and on the noisy targets.

        Args:
            hidden: what the clean stream starts from.
            z: noisy targets; target j is token j + 1 and sees the clean tokens 0 to j.
            sigma: their noise levels.
            block: which.
            position_ids: of the clean tokens; restarts mark packed documents.
            attention_mask: 0 at padding.

        Returns:
            The clean stream's output before the norm, and the targets' after it.
        """
        module = self.block(block)
        noisy, embedded = self._noisy_input(module, z, sigma, hidden.dtype)
        masks = self._masks(hidden.shape[1], z.shape[1], position_ids, attention_mask, hidden.device, block)
        rope = module.model.rotary_emb
        clean_positions, noisy_positions = rope(hidden, position_ids), rope(hidden, position_ids + 1)
        for i, layer in enumerate(module.model.layers):
            args = (hidden, noisy, module.modulations[i], embedded, masks[i], clean_positions, noisy_positions)
            if self.training and layer.gradient_checkpointing:
                hidden, noisy = checkpoint(two_stream_layer, layer, *args, use_reentrant=False)
            else:
                hidden, noisy = two_stream_layer(layer, *args)
        return hidden, module.norm(noisy)

    def noisy_targets(
        self,
        z: Float[Tensor, "batch targets width"],
        sigma: Float[Tensor, "batch targets"],
        block: int,
        cache: Cache,
        *,
        position_ids: Int[Tensor, "rows tokens"],
        attention_mask: Int[Tensor, "batch seen"] | None = None,
    ) -> Float[Tensor, "batch targets width"]:
        """A block's layers on noisy targets after the last clean tokens, whose keys and values a cache holds.

        Args:
            z: targets of the last so many clean tokens.
            sigma: their noise levels.
            block: which.
            cache: the whole model's, with the clean tokens in it.
            position_ids: of the last clean tokens, one per target.
            attention_mask: of all clean tokens, 0 at padding.

        Raises:
            ValueError: if a sliding window's cache no longer holds keys that the first targets see.
        """
        module = self.block(block)
        cache = self._cache_of(cache, block)
        tokens = int(cache.get_seq_length())
        noisy, embedded = self._noisy_input(module, z, sigma, self.dtype)
        positions = module.model.rotary_emb(noisy, position_ids[:, -z.shape[1] :] + 1)
        full = position_ids if position_ids.shape[1] == tokens else None
        masks = self._masks(tokens, z.shape[1], full, attention_mask, z.device, block)
        for i, layer in enumerate(module.model.layers):
            keys, values = cache.layers[i].keys[:, :, :tokens], cache.layers[i].values[:, :, :tokens]
            dropped = tokens - keys.shape[2]  # a sliding window's cache drops what no later token sees
            if dropped and bool(masks[i].noisy[..., :dropped].any()):
                raise ValueError(
                    f"the cache of a sliding window has dropped keys that the first of {z.shape[1]} noisy targets "
                    "see: give the target of the last token only, or run two_streams on all tokens."
                )
            mask = attention_mask_for(layer, masks[i].noisy[..., dropped:], noisy)
            noisy = noisy_layer(layer, noisy, module.modulations[i], embedded, keys, values, mask, positions)
        return module.norm(noisy)

    def _coefficients(self, sigma: Float[Tensor, "*tokens"]) -> Coefficients:
        """The preconditioning of noise levels of any shape, one per token."""
        return Coefficients(*(c.view(sigma.shape) for c in self.preconditioning(sigma.flatten())))

    def _noisy_input(
        self, module: CausalLMBlock, z: Tensor, sigma: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        c = self._coefficients(sigma)
        noisy = module.noisy_in((c.c_in[..., None] * z).to(dtype))
        return noisy, module.noise_embedding(c.c_noise)

    def _masks(
        self,
        tokens: int,
        targets: int,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        device: torch.device,
        block: int,
    ) -> list[TwoStreamMasks]:
        """Masks of each layer of a block; layers of one kind share theirs."""
        documents = None
        if attention_mask is None and position_ids is not None:
            documents = document_numbers(position_ids)
        base = self.config.base_config
        kinds = base.get("layer_types")
        made: dict[int | None, TwoStreamMasks] = {}
        result = []
        for layer in self.partition.layers(block):
            window = base.get("sliding_window")
            if kinds and kinds[layer] != "sliding_attention":
                window = None
            if window not in made:
                made[window] = make_masks(
                    tokens, targets, attention_mask=attention_mask, documents=documents, window=window, device=device
                )
            result.append(made[window])
        return result

    def readout(
        self,
        hidden: Float[Tensor, "*tokens width"],
        z: Float[Tensor, "*tokens width"],
        sigma: Float[Tensor, "*tokens"],
        block: int,
        table: Float[Tensor, "vocab width"] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """The logits of noisy targets, as pairs of features and matrices whose products are to be summed.

        Args:
            hidden: f's features: the targets' (``exact``, ``edm``) or the clean stream's (``clean``), normed.
            z: noisy targets.
            sigma: their noise levels.
            block: whose head.
            table: ``target_table``, if at hand.
        """
        table = self.target_table() if table is None else table
        z = z.float()
        if self.config.readout == "edm":
            c = self._coefficients(sigma)
            denoised = c.c_skip[..., None] * z + c.c_out[..., None] * hidden.float()  # EDM, arXiv 2206.00364, Eq. 7
            return [(self.block(block).logit_scale.exp() * denoised, table)]
        # log N(z; e_k, sigma^2) = <z, e_k> / sigma^2 + what does not depend on k, since all rows have norm 1.
        return [(hidden, self.head_weight(block)), (z / sigma.float()[..., None] ** 2, table)]

    def denoise(
        self,
        z: Float[Tensor, "batch tokens width"],
        sigma: Tensor | float,
        *,
        block: int | None = None,
        input_ids: Int[Tensor, "batch tokens"],
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """D_b = sum_k p_k e_k: the posterior mean of each target (arXiv 2506.14202, App. B).

        Args:
            z: noisy targets; target j is token j + 1.
            sigma: a number, [batch] or [batch, tokens].
            block: by default the one that owns sigma.
            input_ids: clean tokens.
            position_ids: of the clean tokens.
            attention_mask: 0 at padding.

        Raises:
            ValueError: as ``BlockedPreTrainedModel.denoise``.
        """
        self.check_tokens(input_ids, attention_mask, position_ids=position_ids)
        if z.shape != (*input_ids.shape, self.config.hidden_size):
            raise ValueError(
                f"z has shape {list(z.shape)}; {list(input_ids.shape)} tokens need one noisy target each: "
                f"{[*input_ids.shape, self.config.hidden_size]}."
            )
        sigma = torch.as_tensor(sigma, device=z.device, dtype=torch.float32)
        if sigma.shape not in ((), z.shape[:1], z.shape[:2]):
            raise ValueError(f"sigma has shape {list(sigma.shape)}: give a number, [batch] or [batch, tokens].")
        sigma = (sigma[:, None] if sigma.ndim == 1 else sigma).expand(z.shape[:2])
        if block is None:
            block = self._single_block(sigma.flatten())
        else:
            self.partition.check_sigma(sigma.flatten())
        positions = {"position_ids": self._positions(input_ids, position_ids), "attention_mask": attention_mask}
        hidden = self.context_of(block, input_ids, **positions)
        if self.config.two_stream:
            features = self.two_streams(hidden, z, sigma, block, **positions)[1]
        else:
            features = self.block(block).norm(self.clean_block(hidden, block, **positions))
        table = self.target_table()
        pairs = self.readout(features, z, sigma, block, table)
        return linear_logits(pairs).float().softmax(-1) @ table

    # -- the language model --------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch tokens width"] | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        block: int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """The next token's logits, as of any causal language model in transformers.

        A cascade's come from its last block, after all of them. With ``context="independent"`` every block is a
        language model of its own: the logits are those of ``block`` (0 by default: the block of the highest noise,
        where the noisy target carries nothing). For ``readout="exact"`` and ``"edm"`` they are f at sigma_max, for
        one fixed draw of noise.

        Args:
            input_ids: tokens.
            attention_mask: [batch, tokens seen], 0 at padding.
            position_ids: [batch, tokens]; restarts mark packed documents.
            past_key_values: cache of the whole model.
            inputs_embeds: in place of ``input_ids``.
            labels: -100 is ignored; shifted inside.
            use_cache: whether to return a cache; by default as the config's ``use_cache`` says, but not in training,
                with labels, or for packed documents, which are kept apart without a cache only.
            logits_to_keep: only the last so many positions; 0 for all.
            block: for independent blocks, which.
            return_dict: False for a tuple.
            **kwargs: what transformers passes to a decoder, handed on to the base's layers.

        Raises:
            ValueError: for input that does not fit the model, or outputs that it does not give.
            TypeError: for an unknown keyword.
        """
        for name in STOP_STRING_TOOLS:
            kwargs.pop(name, None)
        check_keywords(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        # The cache's length is that of the layers in use: independent blocks fill theirs only.
        cache = None if past_key_values is None else self._cache_of(past_key_values, self.language_blocks(block)[-1])
        also = {"inputs_embeds": inputs_embeds, "position_ids": position_ids, "labels": labels}
        self.check_tokens(input_ids, attention_mask, cache, **also)
        if use_cache is None and labels is None:
            use_cache = self._caches_by_default(position_ids, attention_mask)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        position_ids = self._positions(hidden, position_ids, cache)
        items = kwargs.pop("num_items_in_batch", None)  # transformers' trainer: divide the sum of the losses by this
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        keep = logits_to_keep if isinstance(logits_to_keep, int) and labels is None else 0
        hidden = self.language_hidden(hidden, block, past_key_values, keep=keep, **kwargs)
        kept = hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        loss = None
        if labels is not None:
            flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
            losses = linear_cross_entropy([(flat, self.language_head(block))], labels[:, 1:].reshape(-1))
            if items is None:
                check_some_target(losses)
            loss = losses.mean() if items is None else losses.sum() / items
        logits = linear_logits([(kept, self.language_head(block))])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output

    def _caches_by_default(self, position_ids: Tensor | None, attention_mask: Tensor | None) -> bool:
        wanted = getattr(self.config, "use_cache", self.config.base_config.get("use_cache", True))
        if self.training or not wanted:
            return False
        packed = attention_mask is None and position_ids is not None and document_numbers(position_ids) is not None
        return not packed

    def language_blocks(self, block: int | None = None) -> tuple[int, ...]:
        """The blocks that the next token's logits run through; the last one's head gives them.

        Raises:
            ValueError: if a block was asked for that cannot give logits by itself.
        """
        count = self.partition.num_blocks
        if self.config.context == "independent" or self.config.two_stream:
            block = 0 if block is None else block
            self.partition.check_block(block)
            return (*range(block), block) if self.config.context == "cascade" else (block,)
        if block not in (None, count - 1):
            raise ValueError(f"block={block}: a cascade's logits come from its last block, {count - 1}.")
        return tuple(range(count))

    def language_hidden(
        self, hidden: Tensor, block: int | None, cache: Cache | None, *, keep: int = 0, **kwargs: Any
    ) -> Float[Tensor, "batch tokens width"]:
        """The features of the next token's logits, before ``language_head``: f at sigma_max, normed.

        Of the last ``keep`` tokens at least; 0 for all.
        """
        *lower, last = self.language_blocks(block)
        seen = 0 if cache is None else int(self._cache_of(cache, last).get_seq_length())
        if not self.config.two_stream and kwargs.keys() <= {"attention_mask", "position_ids", "use_cache"}:
            kwargs["position_embeddings"] = self.single_step(
                hidden, cache, kwargs.get("attention_mask"), kwargs["position_ids"]
            )
        for b in lower:
            hidden = self.clean_block(hidden, b, past_key_values=cache, **kwargs)
        start = hidden
        if cache is not None or not self.config.two_stream:
            hidden = self.clean_block(hidden, last, past_key_values=cache, **kwargs)
        if not self.config.two_stream:
            return self.block(last).norm(hidden)
        # At sigma_max a target carries nothing; one fixed draw of noise stands for all.
        generator = torch.Generator().manual_seed(0)
        sigma = self.partition.edges[0]
        z = sigma * torch.randn(hidden.shape[-1], generator=generator).to(hidden.device).expand(hidden.shape)
        sigma = torch.full(hidden.shape[:2], sigma, device=hidden.device)
        places = {
            "position_ids": kwargs["position_ids"].expand(hidden.shape[:2]),
            "attention_mask": kwargs["attention_mask"],
        }
        if seen or (cache is not None and keep == 1):
            z, sigma = z[:, -keep:], sigma[:, -keep:]
            features = self.noisy_targets(z, sigma, last, cache, **places)
        else:  # a sliding window's cache may have dropped keys that the first targets see; documents may be packed
            features = self.two_streams(start, z, sigma, last, **places)[1]
        if self.config.readout == "edm":
            return self.readout(features, z, sigma, last)[0][0]
        return features

    def language_head(self, block: int | None = None) -> Float[Tensor, "vocab width"]:
        """The matrix that turns ``language_hidden`` into logits."""
        return (
            self.target_table() if self.config.readout == "edm" else self.head_weight(self.language_blocks(block)[-1])
        )

    def _positions(self, like: Tensor, position_ids: Tensor | None, cache: Cache | None = None) -> Tensor:
        if position_ids is not None:
            return position_ids
        seen = cache.get_seq_length() if cache is not None else 0
        return torch.arange(seen, seen + like.shape[1], device=like.device)[None]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which hands no streamer and no stop strings on to a callable ``custom_generate``."""
        streamer, custom = kwargs.get("streamer"), kwargs.get("custom_generate")
        check_denoising(kwargs)
        if kwargs.get("stop_strings") is not None and kwargs.get("tokenizer") is not None:
            stop = StopStrings(kwargs.pop("tokenizer"), kwargs.pop("stop_strings"))
            kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), stop])
        if streamer is not None and callable(custom):
            kwargs["custom_generate"] = functools.partial(custom, streamer=streamer)
        return super().generate(*args, **kwargs)

    def create_masks_for_generate(self, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Keep ``generate`` from making masks for static caches: the blocks' decoders make their own."""
        return attention_mask

    def _validate_generated_length(self, generation_config: Any, input_ids_length: int, has_default: bool) -> None:
        super()._validate_generated_length(generation_config, input_ids_length, has_default)
        check_generated_length(self.config, input_ids_length, generation_config.max_length)

    def check_tokens(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **given: Tensor | None,
    ) -> None:
        """Raise a ``ValueError`` for tokens, or ``given`` embeddings, positions and labels, that do not fit."""
        check_tokens(self.config, input_ids, attention_mask, cache, **given)

    def check_batch(self, batch: dict[str, Tensor]) -> None:
        """Raise a ``ValueError`` for a training batch that does not fit the model."""
        if "input_ids" not in batch:
            raise ValueError(
                f"a batch holds {sorted(batch)}; the trainer needs 'input_ids'. Load it with load_text_dataset."
            )
        also = {name: batch.get(name) for name in ("position_ids", "labels")}
        self.check_tokens(batch["input_ids"], batch.get("attention_mask"), **also)
        if batch["input_ids"].shape[1] < 2:
            raise ValueError("the rows have one token: two are needed, one to read and one to predict.")

    def layer_modules(self, block: int) -> Iterator[nn.Module]:
        part = self.block(block)
        for decoder in (part.model, part.auxiliary):
            for layer in decoder.layers if decoder is not None else ():
                yield from (layer.self_attn, layer.mlp)  # two streams never call a layer as a whole

    def dummy_batch(self, batch_size: int, tokens: int | None = None) -> dict[str, Tensor]:
        tokens = tokens or min(256, self.config.max_position_embeddings)
        batch = {"input_ids": torch.zeros(batch_size, tokens, dtype=torch.int64)}
        if self.config.context == "cascade":  # what the blocks below give, one of which is resident at a time
            batch["hidden_states"] = torch.zeros(batch_size, tokens, self.config.hidden_size)
        return batch

    # -- conversion ----------------------------------------------------------------------------------------------

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel | PreTrainedConfig | str | os.PathLike | Mapping[str, Any],
        num_blocks: int | None = None,
        *,
        preset: str | None = None,
        **settings: Any,
    ) -> "BlockedForCausalLM":
        """Cut a decoder into blocks.

        Args:
            base: a transformers causal language model, its directory or Hub id (weights are copied), or its config as
                an object or mapping (weights are new).
            num_blocks: B, default 3.
            preset: ``paper`` for the paper's settings; ``settings`` override it.
            **settings: fields of ``BlockedCausalLMConfig``; for a base that is loaded by name also ``dtype``,
                ``revision``, ``token`` and ``cache_dir``.

        Returns:
            The blocked model in the base's dtype. With ``readout="clean", context="cascade"`` its logits are the
            base's. Lower blocks' norms, and their heads unless tied, start as copies of the base's; auxiliary layers
            as copies of the layers that follow.

        Raises:
            ValueError: if the base cannot be cut, or a setting is not allowed.
        """
        base_model = hub_name(base)
        loading, settings = part_settings(base, settings)
        if isinstance(base, (str, os.PathLike)):
            base = AutoModelForCausalLM.from_pretrained(base, **loading)
        if isinstance(base, (Mapping, PreTrainedConfig)):
            return cls(cls.config_from(base, num_blocks, preset=preset, **settings))
        config = cls.config_from(base.config, num_blocks, preset=preset, **{"pretrained": True, **settings})
        config.base_model, config.base_revision = base_model, weights_digest(base.state_dict())
        attention = base.config._attn_implementation
        config._attn_implementation = attention
        with torch.device("meta"):
            model = cls(config)
        model = model.to_empty(device=base.device).to(base.dtype)
        model.generation_config = copy.deepcopy(base.generation_config)
        model._init_seed = 0
        model.init_weights()
        copy_weights(base, model)
        check_same_function(base, model)
        return model.train(base.training)

    @classmethod
    def config_from(
        cls,
        base_config: Mapping[str, Any] | PreTrainedConfig,
        num_blocks: int | None = None,
        *,
        preset: str | None = None,
        **settings: Any,
    ) -> BlockedCausalLMConfig:
        """The config of a blocked model from the base's config and settings, as in ``from_base``."""
        given = family_settings(BlockedCausalLMConfig, PRESETS, base_config, num_blocks, preset, settings)
        return BlockedCausalLMConfig(**given)

    def to_base(self) -> PreTrainedModel:
        """Give back a transformers causal language model: a cascade's layers in order, without auxiliary layers.

        Raises:
            ValueError: for independent blocks, which do not add up to one network, or noisy streams, which the base has
                no place for.
        """
        return decoder_of(self)


AutoConfig.register("blocked_causal_lm", BlockedCausalLMConfig)
AutoModel.register(BlockedCausalLMConfig, BlockedForCausalLM)
AutoModelForCausalLM.register(BlockedCausalLMConfig, BlockedForCausalLM)

__all__ = ["PRESETS", "BlockedCausalLMConfig", "BlockedForCausalLM"]
