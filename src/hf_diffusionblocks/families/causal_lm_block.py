"""One block of a causal language model: transformers' own decoder of its layers, and what stands around it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init

from ..conditioning import Modulation, NoiseEmbedding
from .categorical import zero_branches
from .causal_lm_config import BlockedCausalLMConfig


class CausalLMBlock(nn.Module):
    """One block: the base's decoder of its layers, norm, head, and what its training or its noisy stream needs."""

    def __init__(self, config: BlockedCausalLMConfig, layers: Sequence[int], block: int, attention: str | None):
        super().__init__()
        self.is_first = layers[0] == 0
        self.model = _decoder(config, layers, attention)
        self.norm = self.model.norm
        self.model.norm = nn.Identity()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if config.own_heads else None
        count = config.auxiliary_layers_of(block)
        self.auxiliary = _decoder(config, range(layers[-1] + 1, layers[-1] + 1 + count), attention) if count else None
        if self.auxiliary is not None:
            self.auxiliary.norm = nn.Identity()
        self.noise_embedding: Any = None  # the two streams' own parts
        self.modulations: Any = None
        self.noisy_in: Any = None
        self.logit_scale: Any = None
        if config.two_stream:
            width = config.noise_embedding_dim
            self.noise_embedding = NoiseEmbedding(width)
            self.modulations = nn.ModuleList(Modulation(width, config.hidden_size) for _ in layers)
            self.noisy_in = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        if config.readout == "edm":
            self.logit_scale = nn.Parameter(torch.zeros(()))

    @property
    def layers(self) -> nn.ModuleList:
        """The base's layers."""
        return self.model.layers

    @property
    def auxiliary_layers(self) -> Sequence[nn.Module]:
        """Layers that only the block's training loss sees."""
        return () if self.auxiliary is None else self.auxiliary.layers

    def zero_branches(self) -> None:
        """Make each layer the identity: what its branches add is zero."""
        zero_branches(self.layers, _OUTPUTS)

    def zero_auxiliary_branches(self) -> None:
        """The same for the auxiliary layers."""
        zero_branches(self.auxiliary_layers, _OUTPUTS)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each layer: no one calls a block as a whole. Of two streams, what runs on each: the MLPs."""
        for decoder in (self.model, self.auxiliary):
            for layer in decoder.layers if decoder is not None else ():
                (layer if self.modulations is None else layer.mlp).compile(*args, **kwargs)


_OUTPUTS = (("self_attn", "o_proj"), ("mlp", "down_proj"))


def _decoder(config: BlockedCausalLMConfig, layers: Sequence[int], attention: str | None) -> PreTrainedModel:
    """transformers' decoder of these layers of the base, without embeddings."""
    base = config.make_base_config(layers)
    base._attn_implementation = attention
    vocab_size, base.vocab_size, padding = base.vocab_size, 1, base.pad_token_id
    base.pad_token_id = None
    try:
        with init.no_init_weights():  # the model initialises each block from a random stream of its own
            decoder = AutoModel.from_config(base)
    except ValueError as error:
        raise ValueError(f"a model of type {base.model_type!r} cannot be cut: {error}") from error
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:  # settings that transformers took
        raise ValueError(f"the base's config does not describe a model that can be built: {error!r}.") from error
    base.vocab_size, base.pad_token_id = vocab_size, padding
    _check_decoder(decoder)
    decoder.embed_tokens = None
    return decoder


def _check_decoder(decoder: PreTrainedModel) -> None:
    """Raise a ``ValueError`` if the decoder is not built of the pieces that can be cut."""
    kind = decoder.config.model_type
    mend = "Models built like Llama, Mistral, Qwen2 and Qwen3 can be cut."
    for name in ("layers", "norm", "rotary_emb", "embed_tokens"):
        if getattr(decoder, name, None) is None:
            raise ValueError(f"a model of type {kind!r} cannot be cut: its decoder has no {name!r}. {mend}")
    pieces = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    for layer in decoder.layers:
        own = [name for name, _ in layer.named_parameters(recurse=False)]
        odd = sorted({name for name, _ in layer.named_children()} ^ pieces) + own
        odd = odd or [f"{a}.{b}" for a, b in _OUTPUTS if not hasattr(getattr(layer, a), b)]
        if odd:
            raise ValueError(f"a model of type {kind!r} cannot be cut: its layers differ from Llama's in {odd}. {mend}")
