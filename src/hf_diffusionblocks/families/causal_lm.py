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

import functools
import os
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..losses import Pairs, linear_cross_entropy, linear_logits
from .base_loading import convert
from .categorical_config import family_settings
from .causal_lm_checks import (
    STOP_STRING_TOOLS,
    check_denoising,
    check_generated_length,
    check_keywords,
    check_some_target,
)
from .causal_lm_config import PRESETS, BlockedCausalLMConfig
from .causal_lm_conversion import check_same_function, copy_weights, decoder_of
from .causal_lm_targets import DenoisingDecoder
from .stop_strings import StopStrings
from .two_stream import document_numbers


class BlockedForCausalLM(DenoisingDecoder, GenerationMixin):
    """A decoder cut into blocks that are trained alone.

    Example:
        >>> base = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        ...         "num_attention_heads": 4, "vocab_size": 100}
        >>> model = BlockedForCausalLM.from_base(base, num_blocks=3)
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 100])
    """

    scored_by = "likelihood.likelihood_bound or likelihood.language_model_likelihood"

    # -- the language model --------------------------------------------------------------------------------------

    def forward(  # type: ignore[override]  # tokens, as transformers' models
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
        pairs = [(hidden, self.language_head(block))]
        return self._language_output(pairs, labels, items, logits_to_keep, past_key_values, return_dict)

    def _language_output(
        self,
        pairs: Pairs,
        labels: Int[Tensor, "batch tokens"] | None,
        items: Tensor | float | int | None,
        logits_to_keep: int | Tensor,
        cache: Cache | None,
        return_dict: bool | None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of the tokens to keep, and the loss, of pairs of features and matrices; ``items`` divides its sum."""
        loss = None
        if labels is not None:
            shifted = [(features[:, :-1].flatten(0, 1), weight) for features, weight in pairs]
            losses = linear_cross_entropy(shifted, labels[:, 1:].reshape(-1))
            if items is None:
                check_some_target(losses)
            loss = losses.mean() if items is None else losses.sum() / items
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = linear_logits([(features[:, kept], weight) for features, weight in pairs])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
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
        return self.head_weight(self.language_blocks(block)[-1])

    def get_output_embeddings(self) -> nn.Module | None:
        """The head of the next token's logits, the embeddings if it is tied; None if it is not loaded or has none, as
        with ``readout="edm"``."""
        if self.config.tied_head:
            return self.embed_tokens
        last = self.language_blocks()[-1]
        return self.block(last).lm_head if last in self.resident_blocks else None

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
            preset: ``default``, as without one, or ``paper`` for the paper's settings; ``settings`` override it.
            **settings: fields of ``BlockedCausalLMConfig``; for a base that is loaded by name also ``dtype``,
                ``revision``, ``token`` and ``cache_dir``.

        Returns:
            The blocked model in the base's dtype. With ``readout="clean", context="cascade"`` its logits are the
            base's. Lower blocks' norms, and their heads unless tied, start as copies of the base's; auxiliary layers
            as copies of the layers that follow.

        Raises:
            ValueError: if the base cannot be cut, or a setting is not allowed.
        """

        def fill(base: PreTrainedModel, model: BlockedForCausalLM) -> None:
            copy_weights(base, model)
            check_same_function(base, model)

        settings["preset"] = preset
        return convert(cls, base, num_blocks, settings, load=AutoModelForCausalLM.from_pretrained, fill=fill)

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
        given = family_settings(cls.config_class, PRESETS, base_config, num_blocks, preset, settings)
        return cls.config_class(**given)

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
