"""One block of a masked language model: transformers' own network of its layers, without token table and head."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers import initialization as init

from ..conditioning import NoiseEmbedding
from .masked_lm_config import MEND, BlockedMaskedLMConfig


class RateModulation(nn.Linear):
    """Shift, scale and gate of a whole layer, from the embedded mask rate; all zero at the start."""

    def __init__(self, dim: int, width: int):
        super().__init__(dim, 3 * width)


class ModulatedLayer(nn.Module):
    """A base's layer ``h + f(h)`` told the mask rate: ``h' + (1 + g) f(h')``, ``h' = (1 + s) h + t`` (AdaLN, arXiv
    2212.09748, section 3.2, around the layer as a whole, which may have its norms before or after its branches).

    At zero modulation it is the layer itself, bit for bit.
    """

    def __init__(self, layer: nn.Module, dim: int, width: int):
        super().__init__()
        self.layer = layer
        self.modulation = RateModulation(dim, width)

    @property
    def attention_type(self) -> Any:
        """ModernBERT asks its layers which of its masks they use."""
        return self.layer.attention_type

    def forward(self, hidden: Tensor, *args: Any, embedded_rate: Tensor, **kwargs: Any) -> Tensor:
        """``embedded_rate`` [batch, 1, dim]; all else as the layer's own."""
        shift, scale, gate = self.modulation(embedded_rate).chunk(3, dim=-1)
        hidden = hidden * (1 + scale) + shift
        output = self.layer(hidden, *args, **kwargs)
        return output + gate * (output - hidden)


class MaskedLMBlock(nn.Module):
    """One block: the base's network of its layers with stem and head of its own.

    The token table is shared by all blocks and lies outside; so does the head's matrix where it is tied to it. What is
    left of the base's class (position embeddings, norms, the head's transform) is the block's, and is small.
    """

    def __init__(self, config: BlockedMaskedLMConfig, layers: Sequence[int], attention: str | None):
        super().__init__()
        self.network, head = make_network(config, layers, attention)
        self.lm_head = None if config.tied_head else nn.Linear(head.in_features, config.vocab_size, bias=False)
        self.head_bias = None if head.bias is None else nn.Parameter(torch.zeros(config.vocab_size))
        self.rate_embedding = None
        if config.time_conditioning:
            self.rate_embedding = NoiseEmbedding(config.noise_embedding_dim)
            inner = layers_of(self.network)
            for i, layer in enumerate(inner):
                inner[i] = ModulatedLayer(layer, config.noise_embedding_dim, config.hidden_size)

    def layers(self) -> Iterator[nn.Module]:
        """The layers, in order."""
        yield from layers_of(self.network)

    def forward(
        self,
        embeddings: Float[Tensor, "batch tokens width"],
        mask_rate: Float[Tensor, "batch"] | None = None,
        **places: Any,
    ) -> Float[Tensor, "batch tokens width"]:
        """The features that the head's matrix is applied to, from token embeddings."""
        if self.rate_embedding is not None and mask_rate is not None:
            # -logit(m) / 4, in the range of c_noise; the ends of [0, 1] stay finite.
            c_noise = torch.logit(mask_rate.float(), eps=1e-4) / 4
            places["embedded_rate"] = self.rate_embedding(c_noise)[:, None].to(embeddings.dtype)
        return self.network(inputs_embeds=embeddings, **places).logits


def layers_of(network: nn.Module) -> nn.ModuleList:
    """The list of a network's layers, by its name and length."""
    count = network.config.num_hidden_layers
    found = [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in ("layer", "layers") and len(module) == count
    ]
    if len(found) != 1:
        raise ValueError(
            f"a model of type {network.config.model_type!r} cannot be cut: it has no one list of its {count} layers. "
            f"{MEND}"
        )
    return found[0]


def make_network(
    config: BlockedMaskedLMConfig, layers: Sequence[int], attention: str | None
) -> tuple[PreTrainedModel, nn.Linear]:
    """transformers' network of some layers of the base, its token table and head matrix taken out; and that head.

    Weights are not initialised. A base's first layer may differ from the others (ModernBERT's has no norm), so one that
    begins later is built with the layer before and that is dropped.
    """
    before = int(layers[0] > 0)
    base = config.make_base_config([*range(layers[0] - before, layers[0]), *layers])
    base._attn_implementation = attention
    base.use_cache = False
    if not config.is_encoder:
        base.is_causal = False  # transformers' masks then hide no later token
    vocab_size, base.vocab_size = base.vocab_size, int(base.pad_token_id or 0) + 1  # the table is thrown away
    kind = AutoModelForMaskedLM if config.is_encoder else AutoModelForCausalLM
    try:
        with init.no_init_weights():  # the model initialises each block from a random stream of its own
            network = kind.from_config(base)
    except ValueError as error:
        raise ValueError(f"a model of type {base.model_type!r} cannot be cut: {error}. {MEND}") from error
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:  # settings that transformers took
        raise ValueError(f"the base's config does not describe a model that can be built: {error!r}.") from error
    own = layers_of(network)
    if before:
        del own[0]
    network.config.vocab_size, network.config.num_hidden_layers = vocab_size, len(layers)
    if not config.is_encoder:
        _make_bidirectional(network, own)
    return network, _take_out_tables(network, config)


def _make_bidirectional(network: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Without a mask, attention kernels ask each module whether it is causal."""
    for layer in layers:
        attention: Any = getattr(layer, "self_attn", None)
        if not isinstance(getattr(attention, "is_causal", None), bool):
            raise ValueError(
                f"a model of type {network.config.model_type!r} cannot be made bidirectional: its layers have no "
                f"self_attn.is_causal. {MEND}"
            )
        attention.is_causal = False


def _take_out_tables(network: PreTrainedModel, config: BlockedMaskedLMConfig) -> nn.Linear:
    table, head = network.get_input_embeddings(), network.get_output_embeddings()
    kind = network.config.model_type
    if not isinstance(table, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ValueError(f"a model of type {kind!r} cannot be cut: it has no token table and linear head. {MEND}")
    if table.embedding_dim != config.hidden_size or (config.tied_head and head.in_features != config.hidden_size):
        raise ValueError(
            f"a model of type {kind!r} cannot be cut: its tokens are {table.embedding_dim} wide, its layers "
            f"{config.hidden_size}. {MEND}"
        )
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if child is table:
                setattr(module, name, None)
                module.table_name = name
            elif child is head:
                setattr(module, name, nn.Identity())
                if module._parameters.get("bias") is not None:  # the head's, a second time
                    module.bias = None
                module.is_headless = True
    network._tied_weights_keys, network.all_tied_weights_keys = {}, {}
    return head


__all__ = ["MaskedLMBlock", "ModulatedLayer", "RateModulation", "layers_of", "make_network"]
