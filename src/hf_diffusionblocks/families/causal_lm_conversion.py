"""Weights from a transformers decoder to a blocked one, and back."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..adapter_checks import check_no_adapter
from .base_loading import empty_base

if TYPE_CHECKING:
    from .causal_lm import BlockedForCausalLM


@torch.no_grad()
def copy_weights(base: PreTrainedModel, model: "BlockedForCausalLM") -> None:
    """Copy a base's weights into the blocks: to each its layers, and a copy of the norm and the head.

    Raises:
        ValueError: if the base's head has a bias, or it ties parameters that the blocks do not.
    """
    decoder, head = base.base_model, base.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"{type(base).__name__} cannot be cut: its head has a bias.")
    check_ties(base)
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


def check_ties(base: PreTrainedModel) -> None:
    """Raise a ``ValueError`` unless a base's head is tied to its embeddings exactly if its config says so, and no other
    parameters are one tensor: each block has its own, so training would part them."""
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    said = bool(getattr(base.config, "tie_word_embeddings", False))
    if said and head is not embedding and (head.is_meta or not torch.equal(head, embedding)):
        raise ValueError(
            f"{type(base).__name__} cannot be cut: its config has tie_word_embeddings=True, but the weights of "
            f"{names[id(head)][0]} and {names[id(embedding)][0]} differ. Tie them with base.tie_weights(), or set "
            "base.config.tie_word_embeddings=False."
        )
    for tied in (group for group in names.values() if len(group) > 1):
        if tied is names[id(embedding)] and head is embedding and len(tied) == 2:
            if said:
                continue
            raise ValueError(
                f"{type(base).__name__} cannot be cut: {' and '.join(tied)} are one tensor, but its config has "
                "tie_word_embeddings=False. Set base.config.tie_word_embeddings=True, or give the head a copy of the "
                "weights."
            )
        raise ValueError(
            f"{type(base).__name__} cannot be cut: {', '.join(tied)} are one tensor, and blocks that are trained alone "
            "share nothing but the embeddings. Give each a copy of the weights before converting."
        )


@torch.no_grad()
def check_same_function(base: PreTrainedModel, model: "BlockedForCausalLM") -> None:
    """Raise a ``ValueError`` if the chain of blocks gives other logits than the base, on a few tokens.

    A decoder may do more than its layers show: scale its embeddings or its logits, or tell its layers by their number.
    """
    if base.device.type == "meta":
        return
    training = base.training
    base.eval()
    model.eval()
    tokens = torch.arange(min(4, model.config.vocab_size), device=base.device)[None]
    hidden = model.embed_tokens(tokens)
    for b in range(model.partition.num_blocks):
        hidden = model.clean_block(hidden, b)
    mine = nn.functional.linear(model.block(b).norm(hidden), base.get_output_embeddings().weight).float()
    theirs = base(input_ids=tokens, use_cache=False).logits.float()
    base.train(training)
    if not torch.allclose(mine, theirs, rtol=0, atol=1e-2 * float(theirs.abs().max()), equal_nan=True):
        raise ValueError(
            f"{type(base).__name__} cannot be cut: its layers one after the other do not give its logits. Models built "
            "like Llama, Mistral, Qwen2 and Qwen3 can be cut."
        )


def decoder_of(model: "BlockedForCausalLM") -> PreTrainedModel:
    """The transformers causal language model whose layers a cascade's blocks hold; see ``to_base``."""
    check_no_adapter(model.blocks, "give the base back")
    if model.config.two_stream or (model.config.context != "cascade" and model.partition.num_blocks > 1):
        raise ValueError(
            f"a model with readout={model.config.readout!r} and context={model.config.context!r} cannot be given "
            "back as one decoder: its blocks do not feed each other, or read noisy targets. Only readout='clean' with "
            "context='cascade' (or one block) can."
        )
    base = empty_base(AutoModelForCausalLM.from_config, model.config.make_base_config(), model)
    with torch.no_grad():
        base.base_model.embed_tokens.weight.copy_(model.embed_tokens.weight)
        for b in range(model.partition.num_blocks):
            module = model.block(b)
            for layer, i in zip(module.model.layers, model.partition.layers(b), strict=True):
                base.base_model.layers[i].load_state_dict(layer.state_dict())
        base.base_model.norm.load_state_dict(module.norm.state_dict())
        if module.lm_head is not None:
            base.get_output_embeddings().weight.copy_(module.lm_head.weight)
    base.generation_config = copy.deepcopy(model.generation_config)
    return base.train(model.training)
