"""Blocked language models under the habits of transformers' users: ties, caches, loops by hand, resizing, keywords."""

import pytest
import torch
from torch import nn

from hf_diffusionblocks import plan_memory
from hf_diffusionblocks.families.causal_lm import BlockedForCausalLM
from hf_diffusionblocks.generation import denoising_generate
from hf_diffusionblocks.objectives.next_token import NextTokenPrediction
from tiny_text import VOCAB_SIZE, WIDTH, base_lm, blocked_lm, packed_positions, tokens


@pytest.fixture(scope="module")
def model() -> BlockedForCausalLM:
    """A blocked model, not to be changed."""
    return blocked_lm()


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


# -- what goes with the tokens -----------------------------------------------------------------------------------

ONES = torch.ones(2, 11, dtype=torch.int64)
MISFITS = {
    "no rows": ({"input_ids": tokens(2)[:0]}, r"input_ids has shape \[0, 12\], a batch of no rows"),
    "flat embeddings": ({"inputs_embeds": torch.zeros(2, WIDTH)}, r"inputs_embeds has shape \[2, 16\].*tokens, 16\]"),
    "embeddings too long": ({"inputs_embeds": torch.zeros(2, 65, WIDTH)}, "65 tokens are more than the model's 64"),
    "positions outside": (
        {"position_ids": torch.arange(60, 72)[None]},
        "position_ids go up to 71; the model has 64 po",
    ),
    "positions missing": ({"position_ids": torch.arange(11)[None]}, r"position_ids has shape \[1, 11\].*\[2, 12\]"),
    "short mask": ({"attention_mask": ONES}, r"attention_mask has shape \[2, 11\]: give \[2, 12\]"),
    "short labels": ({"labels": ONES}, r"labels has shape \[2, 11\].*\[2, 12\]"),
    "labels outside": ({"labels": torch.full((2, 12), VOCAB_SIZE)}, "labels hold 40; .* 40 tokens, 0 to 39. Set posit"),
    "padding as label": ({"labels": torch.full((2, 12), -1)}, "labels hold -1; "),
    "nothing to predict": ({"labels": torch.full((2, 12), -100)}, "no position of the batch has a token to predict"),
}


@pytest.mark.parametrize("kind", MISFITS)
@pytest.mark.parametrize("readout", ["clean", "exact"])
def test_input_that_does_not_fit_is_refused(readout, kind):
    given, message = MISFITS[kind]
    if "inputs_embeds" not in given:
        given = {"input_ids": tokens()} | given
    with pytest.raises(ValueError, match=message):
        blocked_lm(readout=readout)(**given)


def test_a_cache_fits_embeddings_and_a_mask_covers_what_it_holds(model):
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.int64)
    past = model(ids[:, :5]).past_key_values
    with pytest.raises(ValueError, match="holds a batch of 2, inputs_embeds one of 3"):
        model(inputs_embeds=torch.zeros(3, 1, WIDTH), past_key_values=past)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 1\]: give \[2, 6\].*5 of them in past_key"):
        model(ids[:, 5:], attention_mask=mask[:, 5:], past_key_values=past)
    found = model(ids[:, 5:], attention_mask=mask, past_key_values=past).logits
    torch.testing.assert_close(found, model(ids).logits[:, 5:], rtol=1e-4, atol=1e-5)


def test_more_tokens_than_positions_are_refused_before_any_work(model):
    def fail(*_):
        raise AssertionError("a block ran")

    hook = model.block(0).register_forward_pre_hook(fail), model.embed_tokens.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ValueError, match="12 tokens of prompt and 53 new ones.*at most 52"):
            model.generate(tokens(1), max_new_tokens=53)
    finally:
        [h.remove() for h in hook]
    assert model.generate(tokens(1), max_new_tokens=52, eos_token_id=None).shape == (1, 64)


def test_a_training_batch_without_a_target_says_so(model):
    batch = {"input_ids": tokens(), "labels": torch.full((2, 12), -100)}
    for readout in ("clean", "exact"):
        with pytest.raises(ValueError, match="no position of the batch has a token to predict"):
            NextTokenPrediction()(blocked_lm(readout=readout), 0, batch, torch.Generator())
    with pytest.raises(ValueError, match="labels hold 40"):
        model.check_batch({"input_ids": tokens(), "labels": torch.full((2, 12), VOCAB_SIZE)})


# -- caches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"context": "independent"}, {"readout": "exact"}, {"readout": "edm"}], ids=str
)
def test_a_decoding_loop_by_hand_needs_no_flag(settings):
    model, ids = blocked_lm(**settings), tokens(2, 5)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    output, found = model(ids), ids
    for _ in range(6):
        found = torch.cat([found, output.logits[:, -1:].argmax(-1)], dim=1)
        output = model(found[:, -1:], past_key_values=output.past_key_values)
    assert torch.equal(found, expected)


def test_when_there_is_no_cache_by_default():
    model, ids = blocked_lm(), tokens()
    packed = packed_positions(12, 5)
    apart = model(ids, position_ids=packed)
    assert apart.past_key_values is None  # a cache would let the second document see the first
    torch.testing.assert_close(apart.logits[:, 5:], model(ids[:, 5:]).logits, rtol=1e-4, atol=1e-5)
    assert model(ids, labels=ids).past_key_values is None and model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None
    model.eval().config.use_cache = False
    assert model(ids).past_key_values is None


# -- keywords ----------------------------------------------------------------------------------------------------


def test_keywords_of_forward(model):
    ids = tokens()
    with pytest.raises(TypeError, match="unknown keyword 'attention_maks': did you mean 'attention_mask'"):
        model(ids, attention_maks=torch.ones_like(ids))
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=f"{name}=True: a blocked language model gives logits and a cache only"):
            model(ids, **{name: True})
    passed = {"cache_position": torch.arange(12), "output_attentions": False, "return_dict": True}
    expected = model(ids)
    assert torch.equal(model(ids, **passed).logits, expected.logits)
    last = model(ids, logits_to_keep=1, return_dict=False)[0]
    torch.testing.assert_close(last, expected.logits[:, -1:])
    summed = model(ids, labels=ids, num_items_in_batch=22, return_dict=False)[0]
    torch.testing.assert_close(summed, model(ids, labels=ids).loss)


# -- another vocabulary ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])  # heads of their own, and the embeddings as the head
@pytest.mark.parametrize("size", [VOCAB_SIZE + 8, VOCAB_SIZE - 4])
def test_a_resized_vocabulary_is_saved_and_loaded(tmp_path, architecture, size):
    model, ids = blocked_lm(architecture), tokens() % 30
    before, kept = model(ids).logits, min(size, VOCAB_SIZE)
    assert model.resize_token_embeddings(size) is model.embed_tokens
    after = model(ids).logits
    assert after.shape == (2, 12, size) and model.config.vocab_size == size
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    assert all(model.head_weight(block).shape == (size, WIDTH) for block in range(3))
    model.save_pretrained(tmp_path)
    loaded = BlockedForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, after)
    assert loaded.to_base()(ids).logits.shape == after.shape
    part = BlockedForCausalLM.from_pretrained(tmp_path, blocks=[0])
    with pytest.raises(ValueError, match=r"blocks \[1, 2\] are not loaded, and their heads would keep"):
        part.resize_token_embeddings(size + 1)


def test_blocks_of_the_papers_readout_hold_no_heads_which_its_loss_would_never_use(tmp_path):
    base = base_lm()  # head and embeddings are two tensors
    models = {r: BlockedForCausalLM.from_base(base, 3, readout=r, context="cascade").eval() for r in ("exact", "edm")}
    head = base.lm_head.weight.numel()
    counts = {r: sum(p.numel() for _, p in model.block_parameters(1)) for r, model in models.items()}
    assert counts["edm"] == counts["exact"] - head + 1  # its logit_scale
    held = {r: plan_memory(model, batch_size=2).worst("blocked").parameters for r, model in models.items()}
    assert held["exact"] - held["edm"] == head - 1
    model, ids = models["edm"], tokens()
    assert model.get_output_embeddings() is None and torch.equal(model.language_head(), model.target_table())
    model.save_pretrained(tmp_path)
    loaded = BlockedForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.resize_token_embeddings(40) and loaded(ids).logits.shape[-1] == 40
    for blocks in (1, 3):
        with pytest.raises(ValueError, match="readout='edm' .*cannot be given back as one decoder"):
            BlockedForCausalLM.from_base(base, blocks, readout="edm").to_base()


def test_the_output_embeddings_are_the_head_that_gives_the_logits(model):
    assert model.get_output_embeddings() is model.block(2).lm_head
    tied, independent = blocked_lm("qwen3"), blocked_lm(context="independent")
    assert tied.get_output_embeddings() is tied.embed_tokens
    assert independent.get_output_embeddings() is independent.block(0).lm_head


def test_settings_of_a_walk_need_the_walk(model):
    with pytest.raises(ValueError, match="steps, bridge: .*Give custom_generate=denoising_generate"):
        model.generate(tokens(1, 3), steps=4, bridge="argmax_row", max_new_tokens=2)
    walked = model.generate(
        tokens(1, 3), custom_generate=denoising_generate, steps=4, min_new_tokens=2, max_new_tokens=2
    )
    assert walked.shape == (1, 5)
