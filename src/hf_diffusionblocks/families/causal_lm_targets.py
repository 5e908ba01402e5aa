"""Noisy targets of a causal language model: the second stream, its readout, and the denoiser (see ``causal_lm``)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from ..losses import linear_logits
from ..preconditioning import Coefficients
from .causal_lm_block import CausalLMBlock
from .causal_lm_layers import BlockedDecoder
from .two_stream import (
    TwoStreamMasks,
    attention_mask_for,
    document_numbers,
    make_masks,
    noisy_layer,
    two_stream_layer,
)


class DenoisingDecoder(BlockedDecoder):
    """A decoder in blocks that denoise the embedding of the next token, given the clean tokens before it."""

    def target_table(self) -> Float[Tensor, "vocab width"]:
        """e_k: the token embeddings with rows of norm 1, float32. Noisy targets are ``e_k + sigma * eps``.

        A row of zeros has no direction: transformers keeps that of the padding token at zero, which often ends
        documents as well. It gets the direction of all ones, so that the exact readout and the bound hold for it too.
        """
        rows = self.embed_tokens.weight.float()
        ones = torch.full_like(rows[:1], rows.shape[1] ** -0.5)
        return torch.where((rows == 0).all(-1, keepdim=True), ones, nn.functional.normalize(rows, dim=-1))

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

    def denoise(  # type: ignore[override]  # noisy targets beside clean tokens
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
        p = linear_logits(pairs).float().softmax(-1)
        with torch.autocast(p.device.type, enabled=False):
            return p @ table
