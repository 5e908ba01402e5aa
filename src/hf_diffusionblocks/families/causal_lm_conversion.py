"""Weights from a transformers decoder to a blocked one, and back."""

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

if TYPE_CHECKING:
    from .causal_lm import BlockedForCausalLM


@torch.no_grad()
def copy_weights(base: PreTrainedModel, model: "BlockedForCausalLM") -> None:
    """Copy a base's weights into the blocks: to each its layers, and a copy of the norm and the head.

    Raises:
        ValueError: if the base's head has a bias.
    """
    decoder, head = base.base_model, base.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"{type(base).__name__} cannot be cut: its head has a bias.")
    model.embed_tokens.weight.copy_(decoder.embed_tokens.weight)
    last = model.config.num_layers - 1
    for b in model.resident_blocks:
        module, layers = model.block(b), model.partition.layers(b)
        for layer, i in zip(module.model.layers, layers, strict=True):
            layer.load_state_dict(decoder.layers[i].state_dict())
        if module.auxiliary is not None:
            for k, layer in enumerate(module.auxiliary.layers):
                layer.load_state_dict(decoder.layers[min(layers[-1] + 1 + k, last)].state_dict())
        module.norm.load_state_dict(decoder.norm.state_dict())
        if module.lm_head is not None:
            module.lm_head.weight.copy_(head.weight)


def decoder_of(model: "BlockedForCausalLM") -> PreTrainedModel:
    """The transformers causal language model whose layers a cascade's blocks hold; see ``to_base``."""
    if model.config.two_stream or (model.config.context != "cascade" and model.partition.num_blocks > 1):
        raise ValueError(
            f"a model with readout={model.config.readout!r} and context={model.config.context!r} cannot be given "
            "back as one decoder: its blocks do not feed each other, or read noisy targets. Only readout='clean' with "
            "context='cascade' (or one block) can."
        )
    config = model.config.make_base_config()
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    base = base.to_empty(device=model.device).to(model.dtype)
    base.init_weights()
    base.tie_weights()
    with torch.no_grad():
        base.base_model.embed_tokens.weight.copy_(model.embed_tokens.weight)
        for b in range(model.partition.num_blocks):
            module = model.block(b)
            for layer, i in zip(module.model.layers, model.partition.layers(b), strict=True):
                base.base_model.layers[i].load_state_dict(layer.state_dict())
        base.base_model.norm.load_state_dict(module.norm.state_dict())
        if module.lm_head is not None:
            base.get_output_embeddings().weight.copy_(module.lm_head.weight)
    base.generation_config = model.generation_config
    return base.train(model.training)
