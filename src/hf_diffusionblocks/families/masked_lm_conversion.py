"""Weights from a transformers masked language model to a blocked one, and back."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..adapter_checks import check_no_adapter
from .base_loading import empty_base
from .masked_lm_block import ModulatedLayer, layers_of
from .masked_lm_config import MEND

if TYPE_CHECKING:
    from .masked_lm import BlockedForMaskedLM


def find_base(name: str | os.PathLike, **loading: Any) -> PreTrainedModel:
    """A pretrained base: its masked-language-model class, or the causal one of a decoder."""
    hub = {k: v for k, v in loading.items() if k != "dtype"}
    kind = AutoConfig.from_pretrained(name, **hub).model_type
    auto = AutoModelForMaskedLM if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES else AutoModelForCausalLM
    return auto.from_pretrained(name, **loading)


def mask_token_of(name: str | os.PathLike, loading: Mapping[str, Any]) -> int | None:
    """Id of the mask token of the tokenizer beside a base; None if there is no tokenizer or it has none.

    Where there are no files of a tokenizer, transformers makes one of special tokens alone: that is none.
    """
    hub = {k: v for k, v in loading.items() if k != "dtype"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        return tokenizer.mask_token_id if len(tokenizer) > len(tokenizer.all_special_ids) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@torch.no_grad()
def copy_weights(base: PreTrainedModel, model: "BlockedForMaskedLM") -> None:
    """Copy a base's weights into the blocks: to each its layers, and a copy of what stands around them.

    Raises:
        ValueError: if the base does more than its layers, token table and head show, or ties parameters that the blocks
            do not.
    """
    table, head = base.get_input_embeddings(), base.get_output_embeddings()
    _check_tie(base, model, table, head)
    _check_tables(base, table, head)
    model.embed_tokens.weight.copy_(table.weight)
    state, prefix = base.state_dict(), _layers_name(base)
    for b in model.resident_blocks:
        module, layers = model.block(b), model.partition.layers(b)
        own = layers_of(module.network)
        for layer, i in zip(own, layers, strict=True):
            part = {k.removeprefix(f"{prefix}.{i}."): v for k, v in state.items() if k.startswith(f"{prefix}.{i}.")}
            (layer.layer if isinstance(layer, ModulatedLayer) else layer).load_state_dict(part)
        outside = {n: t for n, t in module.network.state_dict().items() if not n.startswith(f"{prefix}.")}
        for name, tensor in outside.items():
            tensor.copy_(state[name])
        if module.lm_head is not None:
            module.lm_head.weight.copy_(head.weight)
        if module.head_bias is not None:
            module.head_bias.copy_(head.bias)


def _layers_name(network: PreTrainedModel) -> str:
    layers = layers_of(network)
    return next(name for name, module in network.named_modules() if module is layers)


def _check_tie(base: PreTrainedModel, model: "BlockedForMaskedLM", table: nn.Module, head: nn.Module) -> None:
    said, tied = model.config.tied_head, head.weight is table.weight
    if said and not tied and (head.weight.is_meta or not torch.equal(head.weight, table.weight)):
        raise ValueError(
            f"{type(base).__name__} cannot be cut: its config has tie_word_embeddings=True, but the weights of head "
            "and embeddings differ. Tie them with base.tie_weights(), or set base.config.tie_word_embeddings=False."
        )
    if tied and not said:
        raise ValueError(
            f"{type(base).__name__} cannot be cut: head and embeddings are one tensor, but its config has "
            "tie_word_embeddings=False. Set it to True, or give the head a copy of the weights."
        )
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    known = {id(head.weight), id(head.bias)}
    for key, tied_names in names.items():
        if len(tied_names) > 1 and key not in known:
            raise ValueError(
                f"{type(base).__name__} cannot be cut: {', '.join(tied_names)} are one tensor, and blocks that are "
                "trained alone share nothing but the embeddings. Give each a copy of the weights before converting."
            )


def _check_tables(base: PreTrainedModel, table: nn.Module, head: nn.Module) -> None:
    """Check that a base is its token table, what reads embeddings, and a linear head, by running it on a few tokens."""
    if table.weight.is_meta:
        return
    read: list[Tensor] = []
    training = base.training
    base.eval()
    tokens = torch.arange(min(4, table.num_embeddings), device=base.device)[None]
    tokens = tokens[tokens != (base.config.pad_token_id if base.config.pad_token_id is not None else -1)][None]
    hook = head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    try:
        theirs = base(input_ids=tokens).logits
        base(inputs_embeds=table(tokens))
    finally:
        hook.remove()
        base.train(training)
    same = len(read) == 2 and torch.equal(nn.functional.linear(read[0], head.weight, head.bias), theirs)
    if not same or not torch.equal(read[0], read[1]):
        raise ValueError(
            f"{type(base).__name__} cannot be cut: its logits are not its head's of what its layers make of token "
            f"embeddings. {MEND}"
        )


def base_of_block(model: "BlockedForMaskedLM", block: int | None) -> PreTrainedModel:
    """The transformers masked language model of a block's layers; see ``BlockedForMaskedLM.to_base``."""
    config, count = model.config, model.partition.num_blocks
    if block is None:
        if count > 1:
            raise ValueError(
                f"a model of {count} blocks cannot be given back as one network: each reads tokens at its own mask "
                "rates, not another block's output. Use to_base(block=b) for one block as a model of its own layers, "
                "or the blocked model itself."
            )
        block = 0
    if not config.is_encoder:
        raise ValueError(
            f"transformers has no class of a bidirectional {config.base_config['model_type']!r}: its own would hide "
            "later tokens again. Keep the blocked model."
        )
    if config.time_conditioning:
        raise ValueError("the layers are told the mask rate (time_conditioning), which the base's class cannot be.")
    check_no_adapter(model.blocks, "give the base back", [block])
    module, layers = model.block(block), model.partition.layers(block)
    made = config.make_base_config(layers)
    base = empty_base(AutoModelForMaskedLM.from_config, made, model)
    table, head = base.get_input_embeddings(), base.get_output_embeddings()
    state, own = base.state_dict(), module.network.state_dict()
    missing = own.keys() - state.keys()
    if missing:
        raise ValueError(
            f"block {block} cannot be given back as a {made.model_type!r} model: the first layer of that class has no "
            f"{sorted(missing)[0]!r}. Keep the blocked model."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            state[name].copy_(tensor)
        table.weight.copy_(model.embed_tokens.weight)
        if module.lm_head is not None:
            head.weight.copy_(module.lm_head.weight)
        if module.head_bias is not None:
            head.bias.copy_(module.head_bias)
    return base.train(model.training)
