"""Blocked masked diffusion language models: BERT, RoBERTa, ModernBERT, and Llama-like decoders made bidirectional.

Masked diffusion (MD4, Shi et al. 2024, arXiv 2406.04329; DiffusionBlocks, arXiv 2506.14202, App. D) hides each token
with probability m = 1 - alpha(t) and trains a network to tell the hidden tokens from the others. The noise level of
this family is the mask rate m; block 0 owns the rows with most tokens hidden. Each block is transformers' own network
of its layers, and reads the masked tokens, never another block's output: sampling runs one block per step.

All blocks share the token table. A block owns the rest: position embeddings, norms, head; the head's matrix too, unless
it is tied to the table. So with B = 1 the model is the base, bit for bit.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MaskedLMOutput

from ..losses import linear_cross_entropy, linear_logits
from ..modeling import BlockedPreTrainedModel
from ..suggest import unknown_name
from .base_config import check_base_settings, fields_of
from .base_loading import convert
from .causal_lm_checks import IGNORED, check_some_target
from .masked_lm_block import MaskedLMBlock, RateModulation
from .masked_lm_config import BlockedMaskedLMConfig, check_mask_token
from .masked_lm_conversion import base_of_block, copy_weights, find_base, mask_token_of
from .token_table import TokenTableMixin


class BlockedForMaskedLM(TokenTableMixin, BlockedPreTrainedModel):
    """A masked language model cut into blocks that are trained alone.

    Example:
        >>> base = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        ...         "num_attention_heads": 4, "vocab_size": 100}
        >>> model = BlockedForMaskedLM.from_base(base, num_blocks=3, mask_token_id=99)
        >>> model(torch.tensor([[1, 99, 3]])).logits.shape  # a third is hidden: block 1 or 2
        torch.Size([1, 3, 100])
    """

    config_class = BlockedMaskedLMConfig
    scored_by = "likelihood.masked_likelihood_bound"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    # -- building ------------------------------------------------------------------------------------------------

    def make_block(self, block: int) -> MaskedLMBlock:
        return MaskedLMBlock(self.config, self.partition.layers(block), self.config._attn_implementation)

    def _init_weights(self, module: nn.Module) -> None:
        """The base's own initialisation."""
        if isinstance(module, RateModulation):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, MaskedLMBlock):
            if module.head_bias is not None:
                init.zeros_(module.head_bias)
        elif not getattr(module, "is_headless", False):
            name = getattr(module, "table_name", None)
            if name is not None:  # a base may initialise its token table by the module that holds it
                setattr(module, name, nn.Embedding(1, 1))
            next(iter(self.blocks.values())).network._init_weights(module)
            if name is not None:
                setattr(module, name, None)

    def get_output_embeddings(self) -> nn.Module | None:
        """The head's matrix if it is tied to the embeddings; None where each block has its own."""
        return self.embed_tokens if self.config.tied_head else None

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers, for the embeddings and every block's head; new tokens get the mean of a head's bias.

        Args:
            new_num_tokens: size of the vocabulary; the mask token must stay in it.
            pad_to_multiple_of: round the size up.
            mean_resizing: draw new rows around the mean of the old ones.

        Raises:
            ValueError: if not all blocks are loaded, or the mask token would be cut off.
        """
        if new_num_tokens is not None:
            check_mask_token(self.config.mask_token_id, new_num_tokens)
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    # -- a block -------------------------------------------------------------------------------------------------

    def features(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        block: int,
        *,
        mask_rate: Float[Tensor, "batch"] | float | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "rows tokens"] | None = None,
        token_type_ids: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """What a block's head is applied to.

        Args:
            input_ids: tokens, some of them hidden.
            block: which.
            mask_rate: m of each row, for a model with ``time_conditioning``; by default the share that is hidden.
            attention_mask: 0 at padding.
            position_ids: from 0; by default those of the base.
            token_type_ids: of bases that have them; 0 by default.
        """
        places = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        first = self.config.first_position
        if position_ids is not None:
            places["position_ids"] = position_ids + first
        elif first:  # as RoBERTa counts from tokens: padding has no position
            seen = (input_ids != first - 1).long()
            places["position_ids"] = seen.cumsum(1) * seen + first - 1
        if self.config.time_conditioning:
            rate = self.hidden_share(input_ids, attention_mask) if mask_rate is None else mask_rate
            rate = torch.as_tensor(rate, dtype=torch.float32, device=input_ids.device)
            places["mask_rate"] = rate.expand(len(input_ids))
        places = {name: value for name, value in places.items() if value is not None}
        return self.block(block)(self.embed_tokens(input_ids), **places)

    def head(self, block: int) -> tuple[Float[Tensor, "vocab width"], Float[Tensor, "vocab"] | None]:
        """The matrix and the bias of a block's head."""
        module = self.block(block)
        return self.embed_tokens.weight if self.config.tied_head else module.lm_head.weight, module.head_bias

    def denoising_head(self, block: int) -> tuple[Float[Tensor, "vocab width"], Float[Tensor, "vocab"]]:
        """``head`` with -inf for the mask token, which no hidden token is (MD4, arXiv 2406.04329, section 4)."""
        weight, bias = self.head(block)
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        at_mask = torch.arange(len(weight), device=weight.device) == self.config.mask_token_id
        return weight, bias.masked_fill(at_mask, -torch.inf)

    def hidden_share(
        self, input_ids: Int[Tensor, "batch tokens"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "batch"]:
        """Share of the tokens of each row, padding aside, that are hidden."""
        hidden = input_ids == self.config.mask_token_id
        if attention_mask is None or attention_mask.ndim != 2:
            return hidden.float().mean(-1)
        seen = attention_mask.bool()
        return (hidden & seen).sum(-1) / seen.sum(-1).clamp_min(1).float()

    # -- the denoiser --------------------------------------------------------------------------------------------

    def denoise(
        self,
        z: Int[Tensor, "batch tokens"],
        sigma: Tensor | float | None = None,
        *,
        block: int | None = None,
        **places: Any,
    ) -> Float[Tensor, "batch tokens vocab"]:
        """D_b: the posterior of each token, float32 (MD4, arXiv 2406.04329, section 4).

        Hidden tokens have the block's distribution, in which the mask token has probability 0; the others are known.

        Args:
            z: tokens, some of them hidden.
            sigma: mask rate, a number or [batch]; by default the share of each row that is hidden.
            block: by default the one that owns sigma.
            **places: ``attention_mask``, ``position_ids``, ``token_type_ids``, as in ``features``.

        Raises:
            ValueError: for mask rates outside [0, 1], a batch whose mask rates span blocks, a block that is not loaded,
                or tokens that do not fit the model.
        """
        self.check_tokens(z, places.get("attention_mask"), position_ids=places.get("position_ids"))
        sigma, block = self._route(z, sigma, block, places.get("attention_mask"))
        weight, bias = self.denoising_head(block)
        pairs = [(self.features(z, block, mask_rate=sigma, **places), weight)]
        p = linear_logits(pairs, bias).float().softmax(-1)
        known = (z != self.config.mask_token_id)[..., None]
        return torch.where(known, nn.functional.one_hot(z, self.config.vocab_size).to(p.dtype), p)

    def _route(
        self, z: Tensor, sigma: Tensor | float | None, block: int | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, int]:
        if sigma is None:
            sigma = self.hidden_share(z, attention_mask)
        rate = torch.as_tensor(sigma, device=z.device, dtype=torch.float32)
        if rate.shape not in ((), z.shape[:1]):
            raise ValueError(f"sigma has shape {list(rate.shape)}: give a mask rate or one per row, [{len(z)}].")
        rate = rate.expand(len(z))
        if block is None:
            return rate, self._single_block(rate)
        self.partition.check_sigma(rate)
        return rate, block

    def forward(  # type: ignore[override]  # tokens, as transformers' models
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        mask_rate: Tensor | float | None = None,
        block: int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple:
        """Logits of every token, as of any masked language model in transformers.

        Each row is read by the block that owns its mask rate.

        Args:
            input_ids: tokens, some of them hidden by the mask token.
            attention_mask: 0 at padding.
            token_type_ids: of bases that have them.
            position_ids: from 0.
            labels: -100 is ignored; the loss is the mean cross-entropy of the others, as in transformers.
            mask_rate: m, a number or [batch]; by default the share of each row that is hidden.
            block: for all rows, in place of the owner of their mask rates.
            return_dict: False for a tuple.

        Raises:
            ValueError: for input that does not fit the model, or outputs that it does not give.
            TypeError: for an unknown keyword.
        """
        _check_keywords(kwargs)
        if input_ids is None:
            raise ValueError("give input_ids: which tokens are hidden decides which block reads a row.")
        self.check_tokens(input_ids, attention_mask, position_ids=position_ids, labels=labels)
        rate = self.hidden_share(input_ids, attention_mask) if mask_rate is None else mask_rate
        rate = torch.as_tensor(rate, dtype=torch.float32, device=input_ids.device).expand(len(input_ids))
        owners = self.partition.block_of(rate) if block is None else torch.full_like(input_ids[:, 0], block)
        given: dict[str, Any] = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "token_type_ids": token_type_ids,
        }
        given = {k: v if len(v) == len(rate) else v.expand(len(rate), -1) for k, v in given.items() if v is not None}
        logits, losses = None, []
        for b in owners.unique().tolist():
            rows = owners == b
            part = {name: value[rows] for name, value in given.items()}
            hidden, (weight, bias) = self.features(input_ids[rows], b, mask_rate=rate[rows], **part), self.head(b)
            own = linear_logits([(hidden, weight)], bias)
            logits = own.new_empty(*input_ids.shape, own.shape[-1]) if logits is None else logits
            logits = own if bool(rows.all()) else logits.index_put((rows.nonzero()[:, 0],), own)
            if labels is not None:
                pairs = [(hidden.flatten(0, 1), weight)]
                losses.append(linear_cross_entropy(pairs, labels[rows].flatten(), bias=bias))
        loss = None
        if labels is not None:
            losses = torch.cat(losses)
            check_some_target(losses)
            loss = losses.mean()
        output = MaskedLMOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output

    # -- training data -------------------------------------------------------------------------------------------

    def check_batch(self, batch: dict[str, Tensor]) -> None:
        super().check_batch(batch)
        if bool((batch["input_ids"] == self.config.mask_token_id).all()):
            raise ValueError(
                f"every token of the batch is the mask token, {self.config.mask_token_id}: give clean text, which "
                "training hides itself."
            )

    def layer_modules(self, block: int) -> Iterator[nn.Module]:
        yield from self.block(block).layers()

    def dummy_batch(  # type: ignore[override]  # a family names its settings
        self, batch_size: int, tokens: int | None = None
    ) -> dict[str, Tensor]:
        tokens = tokens or min(256, self.config.max_position_embeddings)
        clean = 0 if self.config.mask_token_id else 1
        return {"input_ids": torch.full((batch_size, tokens), clean, dtype=torch.int64)}

    # -- conversion ----------------------------------------------------------------------------------------------

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel | PreTrainedConfig | str | os.PathLike | Mapping[str, Any],
        num_blocks: int | None = None,
        **settings: Any,
    ) -> "BlockedForMaskedLM":
        """Cut a masked language model into blocks.

        Args:
            base: a transformers masked language model (or a decoder like Llama, which then sees both sides), its
                directory or Hub id (weights are copied), or its config as an object or mapping (weights are new).
            num_blocks: B, default 3.
            **settings: fields of ``BlockedMaskedLMConfig``; ``mask_token_id`` is that of the tokenizer beside a
                base that is loaded by name, unless given. For such a base also ``dtype``, ``revision``, ``token`` and
                ``cache_dir``.

        Returns:
            The blocked model in the base's dtype. With one block its logits are the base's, bit for bit; several start
            from the base's layers, each with a copy of its stem and head.

        Raises:
            ValueError: if the base cannot be cut, has no mask token, or a setting is not allowed.
        """

        def beside(base: str | os.PathLike, loading: Mapping[str, Any]) -> dict[str, Any]:
            return {"mask_token_id": mask_token_of(base, loading)}

        return convert(cls, base, num_blocks, settings, load=find_base, fill=copy_weights, named=beside)

    @classmethod
    def config_from(
        cls, base_config: Mapping[str, Any] | PreTrainedConfig, num_blocks: int | None = None, **settings: Any
    ) -> BlockedMaskedLMConfig:
        """The config of a blocked model from the base's config and settings, as in ``from_base``."""
        if isinstance(base_config, PreTrainedConfig):
            base_config = base_config.to_dict()
        check_base_settings(base_config, BlockedMaskedLMConfig)
        allowed = fields_of(cls.config_class)
        unknown = [n for n in settings if n not in allowed]
        if unknown:
            raise ValueError(unknown_name("setting", unknown[0], allowed))
        if num_blocks is None:
            num_blocks = len(settings["layers_per_block"]) if settings.get("layers_per_block") else 3
        return cls.config_class(base_config=dict(base_config), num_blocks=num_blocks, **settings)

    def to_base(self, block: int | None = None) -> PreTrainedModel:
        """Give back a transformers masked language model; see ``masked_lm_conversion.base_of_block``.

        Args:
            block: a block, to get it as a model of its own layers. Not needed for B = 1, where the result is bitwise
                the network that was converted.

        Raises:
            ValueError: for B > 1 without ``block``, because blocks read tokens, not each other's output; for what
                transformers has no class for: a bidirectional decoder, or layers that are told the mask rate.
        """
        return base_of_block(self, block)


_NOT_GIVEN = ("output_hidden_states", "output_attentions", "inputs_embeds")
_ARGUMENTS = "input_ids attention_mask token_type_ids position_ids labels mask_rate block return_dict".split()


def _check_keywords(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in _NOT_GIVEN:
            if value is not None and value is not False:
                raise ValueError(
                    f"{name}: a blocked masked language model takes tokens and gives logits. Leave it out."
                )
        elif name != "num_items_in_batch" and value is not None:
            raise TypeError(unknown_name("keyword", name, _ARGUMENTS))


AutoConfig.register("blocked_masked_lm", BlockedMaskedLMConfig)
AutoModel.register(BlockedMaskedLMConfig, BlockedForMaskedLM)
AutoModelForMaskedLM.register(BlockedMaskedLMConfig, BlockedForMaskedLM)

__all__ = ["IGNORED", "BlockedForMaskedLM", "BlockedMaskedLMConfig"]
