"""Blocked language models under the habits of transformers' users: ties, caches, loops by hand, resizing, keywords."""

import pytest
import torch
from torch import nn

from hf_diffusionblocks.families.causal_lm import BlockedForCausalLM
from tiny_text import base_lm

# -- tied parameters ---------------------------------------------------------------------------------------------


def test_parameters_that_are_one_tensor_are_named():
    base = base_lm()
    base.model.layers[3].mlp.up_proj.weight = base.model.layers[1].mlp.up_proj.weight
    message = r"model.layers.1.mlp.up_proj.weight, model.layers.3.mlp.up_proj.weight are one tensor"
    with pytest.raises(ValueError, match=message):
        BlockedForCausalLM.from_base(base)
    base.model.layers[3].mlp.up_proj.weight = nn.Parameter(base.model.layers[1].mlp.up_proj.weight.detach().clone())
    BlockedForCausalLM.from_base(base)


def test_the_head_is_tied_exactly_if_the_config_says_so():
    base = base_lm()
    base.lm_head.weight = base.model.embed_tokens.weight
    with pytest.raises(ValueError, match="one tensor, but its config has tie_word_embeddings=False. Set"):
        BlockedForCausalLM.from_base(base)
    base.config.tie_word_embeddings = True
    assert BlockedForCausalLM.from_base(base).config.tied_head
    base.lm_head.weight = nn.Parameter(torch.zeros_like(base.lm_head.weight))
    with pytest.raises(ValueError, match="tie_word_embeddings=True, but the weights of lm_head.weight and model.embed"):
        BlockedForCausalLM.from_base(base)
