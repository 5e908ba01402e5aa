"""Recurrent-depth language models: prelude, a core that is run again and again, coda (Huginn, arXiv 2502.05171).

Huginn trains the core unrolled: some 33 recurrences of a state that starts as noise, with the gradient through the
last 8. DiffusionBlocks (arXiv 2506.14202, its recurrent-depth models) makes the core a denoiser: the state is the next
token's embedding with noise, ``z = y + sigma eps``, the prelude's output is what it is conditioned on, and one pass at
a random sigma takes the place of the unrolled ones. It is one block, B = 1, that serves the whole noise range.

Nothing leaks: position i's state is a noisy version of token i + 1, and it sees the states of positions j <= i only,
which are versions of the tokens up to i, and its own.

``readout="edm"`` and ``"exact"`` are those of ``causal_lm``. ``readout="clean"`` has no noisy target: the state is
Huginn's own and is unrolled. So one class holds both, and the same trainer runs them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..losses import Pairs
from ..suggest import unknown_name
from .base_config import check_base_settings, fields_of
from .causal_lm import BlockedForCausalLM
from .causal_lm_checks import STOP_STRING_TOOLS, check_keywords
from .recurrent_block import Places, RecurrentBlock, has_values
from .recurrent_config import PRESETS, BlockedRecurrentConfig, check_recurrences, config_fields
from .recurrent_walk import unrolled, walk
from .two_stream import document_numbers


class BlockedRecurrentForCausalLM(BlockedForCausalLM):
    """A recurrent-depth language model whose core is one denoiser, or, with ``readout="clean"``, Huginn's.

    Example:
        >>> base = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8,
        ...         "num_attention_heads": 4, "vocab_size": 100}
        >>> model = BlockedRecurrentForCausalLM.from_base(base)
        >>> model(torch.tensor([[1, 2, 3]]), num_recurrences=4).logits.shape
        torch.Size([1, 3, 100])
    """

    config_class = BlockedRecurrentConfig
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    # -- building ------------------------------------------------------------------------------------------------

    def make_block(self, block: int) -> RecurrentBlock:
        return RecurrentBlock(self.config, self.config._attn_implementation)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RecurrentBlock):
            # x passes; a state of unit variance adds as much as token embeddings start with, to a trained base nothing.
            width = self.config.hidden_size
            state = 0.0 if self.config.pretrained else self.config.get_text_config().initializer_range
            weight = module.adapter.weight
            eye = torch.eye(width, device=weight.device, dtype=weight.dtype)
            init.copy_(weight, torch.cat([eye, state * eye], dim=1))

    # -- one pass ------------------------------------------------------------------------------------------------

    def make_places(
        self,
        hidden: Tensor,
        position_ids: Int[Tensor, "rows tokens"],
        *,
        attention_mask: Int[Tensor, "batch columns"] | None = None,
        earlier: int = 0,
        columns: Int[Tensor, "tokens"] | None = None,
        walking: Tensor | None = None,
        documents_of: Int[Tensor, "rows columns"] | None = None,
    ) -> Places:
        """Where tokens stand and whom they see, see ``Places``; by default in the next columns, none walking.

        Args:
            hidden: of the right device and dtype.
            position_ids: of the tokens; without a cache, restarts mark packed documents.
            attention_mask: of all columns, 0 at padding.
            earlier: number of columns before them whose keys and values a cache holds.
            columns: of the tokens.
            walking: which of them walk.
            documents_of: positions of all columns, if they are not those of the tokens.
        """
        device = hidden.device
        documents = None
        if earlier == 0 and attention_mask is None and has_values(position_ids):  # a count is of rows of one document
            documents = document_numbers(position_ids if documents_of is None else documents_of)
        plain = columns is None
        if columns is None or walking is None:
            columns = torch.arange(earlier, earlier + position_ids.shape[1])
            walking = torch.zeros(len(columns), dtype=torch.bool)
        rotary = self.block(0).model.rotary_emb(hidden, position_ids)
        columns, walking = columns.to(device), walking.to(device)
        return Places(rotary, columns, walking, earlier, attention_mask, documents, plain)

    def features(
        self,
        x: Float[Tensor, "batch tokens width"],
        z: Float[Tensor, "batch tokens width"],
        sigma: Tensor | float,
        places: Places,
        core: Any = (),
        coda: Any = (),
    ) -> Float[Tensor, "batch tokens width"]:
        """f: one recurrence of noisy states through core and coda, normed.

        Args:
            x: the prelude's output.
            z: the states.
            sigma: their noise levels, one or [batch, tokens].
            places: where they stand.
            core: caches of the core's layers.
            coda: caches of the coda's layers.
        """
        module = self.block(0)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=z.device)
        if sigma.ndim == 0:
            sigma = sigma.expand(1, 1)
        elif sigma.stride(1) == 0:  # one for each row
            sigma = sigma[:, :1]
        c = self._coefficients(sigma)
        embedded = module.noise_embedding(c.c_noise)
        state = module.run_core(x, (c.c_in[..., None] * z).to(x.dtype), places, core, embedded)
        return module.norm(module.run_coda(state, places, coda, embedded))

    def two_streams(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        z: Float[Tensor, "batch tokens width"],
        sigma: Float[Tensor, "batch tokens"],
        block: int = 0,
        *,
        position_ids: Int[Tensor, "rows tokens"],
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The prelude on the tokens, and one recurrence of their noisy targets as states.

        Args:
            hidden: token embeddings.
            z: noisy targets: z_j of token j + 1.
            sigma: their noise levels.
            block: 0, the only one.
            position_ids: of the tokens; restarts mark packed documents.
            attention_mask: 0 at padding.

        Returns:
            The prelude's output, and f of the states.
        """
        places = self.make_places(hidden, position_ids, attention_mask=attention_mask)
        x = self.block(block).run_prelude(hidden, places)
        return x, self.features(x, z, sigma, places)

    def noisy_targets(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not of this family: its states are in the one stream.

        Raises:
            ValueError: always.
        """
        raise ValueError("a recurrent model has no second stream: use two_streams, or forward with num_recurrences.")

    def clean_block(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        block: int = 0,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        num_recurrences: int | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "batch tokens width"]:
        """All layers on clean tokens, before the norm: unrolled; of a denoiser, with a state of zeros and no noise."""
        cache = past_key_values
        position_ids = self._positions(hidden, position_ids, cache).expand(hidden.shape[:2])
        if not self.config.two_stream:
            recurrences = num_recurrences or self.config.recurrences
            how: dict[str, Any] = {"recurrences": recurrences, "cache": cache, "attention_mask": attention_mask}
            return unrolled(self, hidden, position_ids, **how, seed=kwargs.get("noise_seed"))
        module, places = self.block(block), self.make_places(hidden, position_ids, attention_mask=attention_mask)
        x = module.run_prelude(hidden, places)
        return module.run_coda(module.run_core(x, torch.zeros_like(x), places), places)

    # -- the language model --------------------------------------------------------------------------------------

    def _cache_of(self, cache: Cache, block: int) -> Cache:
        return cache

    def language_hidden(
        self, hidden: Tensor, block: int | None, cache: Cache | None, *, keep: int = 0, **kwargs: Any
    ) -> Float[Tensor, "batch tokens width"]:
        """Features of the next token's logits, before ``language_head``: a denoiser's at sigma_max, else unrolled.

        Of the last ``keep`` tokens, 0 for all; the other arguments are those of ``forward``.
        """
        return self.language_pairs(hidden, cache, keep=keep, **kwargs | {"num_recurrences": None})[0][0]

    def language_pairs(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        cache: Cache | None = None,
        *,
        position_ids: Int[Tensor, "rows tokens"],
        attention_mask: Tensor | None = None,
        keep: int = 0,
        num_recurrences: int | None = None,
        noise_seed: int | None = None,
        **_: Any,
    ) -> Pairs:
        """The next token's logits as pairs of features and matrices; a denoiser's after one recurrence by default."""
        how = {"cache": cache, "attention_mask": attention_mask, "seed": noise_seed}
        position_ids = position_ids.expand(hidden.shape[:2])
        if self.config.two_stream:
            return walk(self, hidden, position_ids, recurrences=num_recurrences or 1, keep=keep, **how)
        recurrences = num_recurrences or self.config.recurrences
        state = unrolled(self, hidden, position_ids, recurrences=recurrences, **how)
        return [(self.block(0).norm(state[:, -keep:] if keep else state), self.head_weight(0))]

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
        num_recurrences: int | None = None,
        noise_seed: int | None = None,
        block: int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """The next token's logits after so many recurrences.

        Each gives a distribution that knows the past alone, so ``loss`` is a likelihood for any number of them. With
        more, more of the choice is made by the noise: the logits of a long walk are nearly a point.

        Args:
            input_ids: tokens.
            attention_mask: [batch, tokens seen], 0 at padding.
            position_ids: [batch, tokens]; restarts mark packed documents.
            past_key_values: cache, of one number of recurrences.
            inputs_embeds: in place of ``input_ids``.
            labels: -100 is ignored; shifted inside.
            use_cache: as in ``BlockedForCausalLM.forward``.
            logits_to_keep: only the last so many positions; 0 for all.
            num_recurrences: how often the core runs, any number of at least 1; by default as the config says.
            noise_seed: of the states' noise, which then differs from row to row; None for one fixed draw.
            block: 0, the only one.
            return_dict: False for a tuple.
            **kwargs: what transformers passes to a decoder.

        Raises:
            ValueError: for input that does not fit the model, no recurrence, or outputs that it does not give.
            TypeError: for an unknown keyword.
        """
        for name in STOP_STRING_TOOLS:
            kwargs.pop(name, None)
        check_keywords(kwargs)
        if num_recurrences is not None:
            check_recurrences(num_recurrences)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        self.language_blocks(block)
        also = {"inputs_embeds": inputs_embeds, "position_ids": position_ids, "labels": labels}
        self.check_tokens(input_ids, attention_mask, past_key_values, **also)
        if use_cache is None and labels is None:
            use_cache = self._caches_by_default(position_ids, attention_mask)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        last = logits_to_keep if isinstance(logits_to_keep, int) and labels is None else 0
        pairs = self.language_pairs(
            hidden,
            past_key_values,
            position_ids=self._positions(hidden, position_ids, past_key_values),
            attention_mask=attention_mask,
            keep=min(last, hidden.shape[1]),
            num_recurrences=num_recurrences or self.config.recurrences,
            noise_seed=noise_seed,
        )
        items = kwargs.get("num_items_in_batch")
        return self._language_output(pairs, labels, items, logits_to_keep, past_key_values, return_dict)

    def generate(self, *args: Any, num_recurrences: int | None = None, **kwargs: Any) -> Any:
        """As in transformers, with ``num_recurrences`` per token; sampling draws the noise as well.

        Raises:
            ValueError: for no recurrence, or a ``custom_generate`` for models with two streams.
        """
        if num_recurrences is not None:
            check_recurrences(num_recurrences)
        if getattr(kwargs.get("custom_generate"), "__name__", "") == "denoising_generate":
            raise ValueError(
                "denoising_generate walks through the blocks of BlockedForCausalLM; a recurrent model walks by itself: "
                "leave custom_generate out and give num_recurrences."
            )
        given = kwargs.get("generation_config") or self.generation_config
        sampled = kwargs.get("do_sample", getattr(given, "do_sample", False))
        recurrences = num_recurrences or self.config.recurrences
        if sampled and self.config.two_stream and recurrences > 1 and kwargs.get("noise_seed") is None:
            kwargs["noise_seed"] = int(torch.randint(2**31, ()))
        return super().generate(*args, num_recurrences=recurrences, **kwargs)

    # -- conversion ----------------------------------------------------------------------------------------------

    @classmethod
    def config_from(
        cls,
        base_config: Mapping[str, Any] | PreTrainedConfig,
        num_blocks: int | None = None,
        *,
        preset: str | None = None,
        **settings: Any,
    ) -> BlockedRecurrentConfig:
        """The config from the base's config and settings; ``preset`` is ``default``, ``paper`` or ``huginn``."""
        if isinstance(base_config, PreTrainedConfig):
            base_config = base_config.to_dict()
        check_base_settings(base_config, BlockedRecurrentConfig)
        if preset is not None:
            if preset not in PRESETS:
                raise ValueError(unknown_name("preset", preset, PRESETS))
            settings = PRESETS[preset] | settings
        allowed = config_fields() | fields_of(cls.config_class)
        for name in settings:
            if name not in allowed:
                raise ValueError(unknown_name("setting", name, allowed))
        if num_blocks is not None:
            settings["num_blocks"] = num_blocks
        if settings.get("pretrained"):
            settings.setdefault("core_norm", False)  # the base has none there
        return cls.config_class(base_config=dict(base_config), **settings)

    def to_base(self) -> PreTrainedModel:
        """Not of this family.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a recurrent model cannot be given back as a decoder of transformers: its core reads a state and runs any "
            "number of times, and a decoder has no place for that."
        )


AutoConfig.register("blocked_recurrent", BlockedRecurrentConfig)
AutoModel.register(BlockedRecurrentConfig, BlockedRecurrentForCausalLM)
AutoModelForCausalLM.register(BlockedRecurrentConfig, BlockedRecurrentForCausalLM)

__all__ = ["PRESETS", "BlockedRecurrentConfig", "BlockedRecurrentForCausalLM"]
