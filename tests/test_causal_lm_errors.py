"""Bad input to blocked language models: one `ValueError` that names the value and how to mend it."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hf_diffusionblocks.families.causal_lm import BlockedCausalLMConfig, BlockedForCausalLM
from tiny import perturbed
from tiny_text import SHAPE, VOCAB_SIZE, WIDTH, base_config, base_lm, blocked_lm, tokens


@pytest.fixture(scope="module")
def model() -> BlockedForCausalLM:
    """A blocked model, not to be changed."""
    return blocked_lm()


# -- tokens ------------------------------------------------------------------------------------------------------

BAD_TOKENS = {
    "empty": (torch.zeros(2, 0, dtype=torch.int64), "input_ids is empty: give at least one token"),
    "outside": (
        torch.tensor([[3, VOCAB_SIZE]]),
        f"input_ids run from 3 to {VOCAB_SIZE}; the model's vocabulary has {VOCAB_SIZE} tokens, 0 to {VOCAB_SIZE - 1}",
    ),
    "negative": (torch.tensor([[-100, 3]]), "input_ids run from -100 to 3.*Use the tokenizer that"),
    "long": (tokens(1, 65), "65 tokens are more than the model's 64 positions. Shorten"),
    "flat": (torch.tensor([3, 4]), r"input_ids has shape \[2\].*\[batch, tokens\]"),
    "real": (torch.rand(2, 3), "dtype torch.float32: give whole numbers"),
}


@pytest.mark.parametrize("kind", BAD_TOKENS)
@pytest.mark.parametrize("readout", ["clean", "exact"])
def test_tokens_that_do_not_fit(readout, kind):
    ids, message = BAD_TOKENS[kind]
    model = blocked_lm(readout=readout)
    with pytest.raises(ValueError, match=message):
        model(ids)
    with pytest.raises(ValueError, match=message):
        model.denoise(torch.zeros(*ids.shape, WIDTH), 0.3, input_ids=ids)
    with pytest.raises(ValueError, match=message):
        model.check_batch({"input_ids": ids})


def test_the_longest_sequence_is_allowed(model):
    assert model(tokens(1, 64)).logits.shape == (1, 64, VOCAB_SIZE)
    output = model(tokens(1, 60), use_cache=True)
    with pytest.raises(ValueError, match="65 tokens are more than the model's 64 positions"):
        model(tokens(1, 5), past_key_values=output.past_key_values)


def test_a_training_batch_needs_two_tokens_and_a_name(model):
    with pytest.raises(ValueError, match="the rows have one token: two are needed"):
        model.check_batch({"input_ids": tokens(2, 1)})
    with pytest.raises(ValueError, match=r"a batch holds \['text'\]; the trainer needs 'input_ids'"):
        model.check_batch({"text": tokens()})
    model.check_batch({"input_ids": tokens(2, 2)})
    assert model(tokens(2, 1)).logits.shape == (2, 1, VOCAB_SIZE)  # to go on from, one token is enough


def test_a_row_of_padding_alone(model):
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1] = 0
    for run in (
        lambda: model(tokens(3), attention_mask=mask),
        lambda: model.check_batch({"input_ids": tokens(3), "attention_mask": mask}),
        lambda: model.denoise(torch.zeros(3, 12, WIDTH), 0.3, input_ids=tokens(3), attention_mask=mask),
        lambda: model.generate(tokens(3), attention_mask=mask, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="row 1 of attention_mask is all padding: drop that row"):
            run()


def test_tokens_or_embeddings_but_not_both(model):
    embedded = model.embed_tokens(tokens())
    for given in ({}, {"input_ids": tokens(), "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**given)


# -- caches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["cascade", "independent"])
def test_the_cache_of_another_batch(context):
    model = blocked_lm(context=context)
    block = 1 if context == "independent" else None
    past = model(tokens(3, 5), use_cache=True, block=block).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds a batch of 3, input_ids one of 2.*another batch's"):
        model(tokens(2, 1), past_key_values=past, block=block)


def test_the_cache_of_another_model(model):
    for other in (base_lm(num_layers=8), base_lm(num_layers=4)):
        for past in (DynamicCache(config=other.config), DynamicCache()):
            other(tokens(2, 5), past_key_values=past, use_cache=True)
            layers = other.config.num_hidden_layers
            with pytest.raises(ValueError, match=f"past_key_values has {layers} layers, the model 6: it is another"):
                model(tokens(2, 1), past_key_values=past)


# -- blocks and noise levels -------------------------------------------------------------------------------------


def test_blocks_that_give_no_logits_or_do_not_exist(model):
    with pytest.raises(ValueError, match="block=1: a cascade's logits come from its last block, 2"):
        model(tokens(), block=1)
    assert torch.equal(model(tokens(), block=2).logits, model(tokens()).logits)
    independent = blocked_lm(context="independent")
    for run in (lambda: independent(tokens(), block=3), lambda: independent.block(-1)):
        with pytest.raises(ValueError, match="block -?[13] does not exist: the model has blocks 0 to 2"):
            run()


@pytest.mark.parametrize(
    "sigma, message",
    [
        (torch.ones(3), r"sigma has shape \[3\]: give a number, \[batch\] or \[batch, tokens\]"),
        (torch.ones(2, 1), r"sigma has shape \[2, 1\]"),
        (torch.ones(2, 12, 1), r"sigma has shape \[2, 12, 1\]"),
        (100.0, "sigma=100.0 is outside the noise range"),
        (torch.full((2, 12), float("nan")), "sigma=nan is outside the noise range"),
        (0.0, "sigma=0.0 is outside the noise range"),
    ],
)
def test_noise_levels_that_do_not_fit(model, sigma, message):
    for block in (None, 0):
        with pytest.raises(ValueError, match=message):
            model.denoise(torch.zeros(2, 12, WIDTH), sigma, block=block, input_ids=tokens())


def test_one_noisy_target_per_token(model):
    with pytest.raises(ValueError, match=r"z has shape \[2, 11, 16\]; \[2, 12\] tokens need one noisy target each"):
        model.denoise(torch.zeros(2, 11, WIDTH), 0.3, input_ids=tokens())


# -- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"readout": "exakt"}, "unknown readout 'exakt': did you mean 'exact'. Allowed: clean, edm, exact"),
        ({"context": "cascad"}, "unknown context 'cascad': did you mean 'cascade'"),
        ({"initialization": "identiy"}, "unknown initialization 'identiy': did you mean 'identity'"),
        ({"preset": "papr"}, "unknown preset 'papr': did you mean 'paper'"),
        ({"readouts": "clean"}, "unknown setting 'readouts': did you mean 'readout'"),
        ({"partition": "unifrm"}, "unknown partition 'unifrm': did you mean 'uniform'"),
        ({"auxiliary_layers": 1, "readout": "exact"}, "auxiliary_layers=1 needs readout='clean'; .*set it to 0"),
        ({"auxiliary_layers": 2, "preset": "paper"}, "auxiliary_layers=2 needs readout='clean'"),
        ({"auxiliary_layers": -1}, "auxiliary_layers=-1 must be at least 0"),
        ({"auxiliary_layers": True}, "auxiliary_layers=True must be a whole number"),
        ({"preconditioning": "vp_epsilon", "noise_schedule": {"num_train_timesteps": 10}}, "is for images"),
        ({"num_blocks": 7}, "num_blocks=7 is more than the 6 layers"),
        ({"num_blocks": 2, "layers_per_block": [1, 2, 3]}, r"layers_per_block=\[1, 2, 3\] must name 2 numbers"),
        ({"noise": {"p_meen": 0.0}}, "unknown noise setting 'p_meen': did you mean 'p_mean'"),
    ],
)
def test_settings_that_are_not_allowed(settings, message):
    with pytest.raises(ValueError, match=message):
        BlockedForCausalLM.from_base(base_config(), **settings)


def test_a_config_names_its_kind_and_knows_its_settings():
    nameless = {k: v for k, v in base_config().items() if k != "model_type"}
    with pytest.raises(ValueError, match="base_config has no model_type: give the config of a decoder, such as 'llama"):
        BlockedForCausalLM.from_base(nameless)
    with pytest.raises(ValueError, match="base_config has no model_type"):
        BlockedCausalLMConfig()
    with pytest.raises(ValueError, match="model_type='lama' is not known to transformers"):
        BlockedForCausalLM.from_base(base_config(model_type="lama"))
    with pytest.raises(ValueError, match="unknown llama setting 'num_key_value_head': did you mean 'num_key_value_he"):
        BlockedForCausalLM.from_base(base_config(num_key_value_head=2))
    # A published config.json may hold names that its class does not know.
    published = base_config(transformers_version="4.40.1", is_llama_config=True)
    assert BlockedForCausalLM.from_base(published).config.num_layers == 6
    for older in ({"rope_theta": 5e4}, {"torch_dtype": "bfloat16"}, {"rope_scaling": None}):
        assert BlockedForCausalLM.from_base(base_config(**older)).config.num_layers == 6


# -- bases that cannot be cut ------------------------------------------------------------------------------------

UNCUT: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({"n_embd": 16, "n_head": 4, "n_layer": 6}, "its config has no num_hidden_layers. Models built like"),
    "opt": (
        {"ffn_dim": 16, "word_embed_proj_dim": 16},
        "its decoder has no 'layers'. Models built like Llama, Mistral",
    ),
    "gemma2": ({"head_dim": 4, "final_logit_softcapping": None}, "Gemma2Model does not support an attention"),
    "gemma3_text": ({"head_dim": 4}, "differ from Llama's in .'post_feedforward_layernorm'.*Models built like Llama"),
    "phi3": ({}, "differ from Llama's in .'resid_attn_dropout'"),
    "mixtral": ({"num_local_experts": 2}, "differ from Llama's in .'mlp.down_proj'"),
    "doge": ({}, "differ from Llama's in .'input_residual'"),
    "granite": ({"logits_scaling": 4.0}, "it acts outside the layers"),
}


@pytest.mark.parametrize("kind", UNCUT)
def test_a_base_that_cannot_be_cut_says_why(kind):
    settings, message = UNCUT[kind]
    config = AutoConfig.for_model(**(SHAPE | {"num_hidden_layers": 6, "model_type": kind} | settings))
    for given in (config, config.to_dict()):
        with pytest.raises(ValueError, match=f"a model of type '{kind}'.* cannot be cut: .*{message}"):
            BlockedForCausalLM.from_base(given, num_blocks=2)


@pytest.mark.parametrize("kind", ["gemma", "diffllama"])
def test_a_base_whose_layers_are_not_all_there_is(kind):
    """Gemma scales its embeddings, DiffLlama's layers know their number: the pieces look the same, the sum differs."""
    config = AutoConfig.for_model(**SHAPE, model_type=kind, num_hidden_layers=6, head_dim=4)
    base = perturbed(AutoModelForCausalLM.from_config(config), 0.2)
    with pytest.raises(ValueError, match="ForCausalLM cannot be cut: its layers one after the other do not give its l"):
        BlockedForCausalLM.from_base(base)
    assert base.training


def test_a_head_with_a_bias():
    base = base_lm()
    base.lm_head = nn.Linear(WIDTH, VOCAB_SIZE)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be cut: its head has a bias"):
        BlockedForCausalLM.from_base(base)
