"""Blocked masked language models: conversion bit for bit, routing, independence of blocks, files, memory, bad input."""

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, pipeline

from hf_diffusionblocks import DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments, merge_blocks, plan_memory
from hf_diffusionblocks.compute import training_flops
from hf_diffusionblocks.data import train_tokenizer
from hf_diffusionblocks.data.tokenizing import with_mask_token
from hf_diffusionblocks.families.masked_lm import BlockedForMaskedLM, BlockedMaskedLMConfig
from hf_diffusionblocks.memory import measure_memory
from hf_diffusionblocks.objectives import MaskedDiffusion
from tiny import as_users_run, perturbed
from tiny_masked import ENCODERS, MASK, VOCAB_SIZE, base_config, base_mlm, blocked_mlm, hidden_rows
from tiny_text import TokenRows

# -- conversion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ENCODERS)
def test_one_block_is_the_base_bit_for_bit_and_gives_it_back(architecture):
    base, ids = base_mlm(architecture), hidden_rows()
    padding = torch.ones_like(ids)
    padding[1, 15:] = 0
    ids = ids.masked_fill(padding == 0, 0)
    model = BlockedForMaskedLM.from_base(base, 1, mask_token_id=MASK)
    logits = base(input_ids=ids, attention_mask=padding).logits
    assert torch.equal(model(ids, attention_mask=padding).logits, logits)
    assert torch.equal(model.to_base()(input_ids=ids, attention_mask=padding).logits, logits)


def test_a_decoder_becomes_one_that_sees_both_sides():
    base, ids = base_mlm("llama"), hidden_rows()
    model = BlockedForMaskedLM.from_base(base, 1, mask_token_id=MASK)
    causal = base(input_ids=ids).logits
    assert not torch.allclose(model(ids).logits, causal)
    base.config.is_causal = False
    for layer in base.model.layers:
        layer.self_attn.is_causal = False
    torch.testing.assert_close(model(ids).logits, base(input_ids=ids).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match="no class of a bidirectional 'llama'"):
        model.to_base()


@pytest.mark.parametrize("architecture", [*ENCODERS, "llama"])
def test_every_block_holds_its_layers_of_the_base_and_sees_both_sides(architecture):
    base, ids = base_mlm(architecture), hidden_rows()
    model = BlockedForMaskedLM.from_base(base, 3, mask_token_id=MASK)
    whole = BlockedForMaskedLM.from_base(base, 1, mask_token_id=MASK)
    last = list(whole.block(0).layers())[4:]
    for mine, theirs in zip(model.block(2).layers(), last, strict=True):
        assert all(torch.equal(mine.state_dict()[name], value) for name, value in theirs.state_dict().items())
    for block in range(3):
        first = model(ids, block=block).logits[:, 0]
        other = ids.clone()
        other[:, -1] = 7
        assert not torch.equal(model(other, block=block).logits[:, 0], first)
    with pytest.raises(ValueError, match="3 blocks cannot be given back as one network"):
        model.to_base()


def test_a_block_is_given_back_as_a_network_of_its_own_layers():
    model, ids = blocked_mlm("bert-untied"), hidden_rows()
    assert torch.equal(model.to_base(1)(input_ids=ids).logits, model(ids, block=1).logits)


# -- routing and the denoiser --------------------------------------------------------------------------------------


def test_each_row_is_read_by_the_block_of_its_mask_rate():
    model, ids = blocked_mlm(), hidden_rows((0.1, 0.5, 0.9))
    logits = model(ids).logits
    for row, block in enumerate((2, 1, 0)):
        torch.testing.assert_close(logits[row : row + 1], model(ids[row : row + 1], block=block).logits)
    named = model(ids, mask_rate=torch.tensor([0.9, 0.9, 0.9])).logits
    torch.testing.assert_close(named, model(ids, block=0).logits, rtol=0, atol=0)


def test_the_loss_of_labels_is_the_mean_cross_entropy():
    model, ids = blocked_mlm(), hidden_rows()
    labels = torch.full_like(ids, -100)
    labels[:, 3:6] = 5
    output = model(ids, labels=labels)
    wanted = torch.nn.functional.cross_entropy(output.logits[:, 3:6].flatten(0, 1), labels[:, 3:6].flatten())
    torch.testing.assert_close(output.loss, wanted)


def test_the_denoiser_knows_what_it_sees_and_never_answers_the_mask_token():
    model, ids = blocked_mlm("bert"), hidden_rows((0.4, 0.5))
    p = model.denoise(ids)
    torch.testing.assert_close(p.sum(-1), torch.ones(ids.shape))
    assert not bool(p[..., MASK].any())
    known = ids != MASK
    assert torch.equal(p[known].argmax(-1), ids[known]) and bool((p[known].max(-1).values == 1).all())
    with pytest.raises(ValueError, match=r"span blocks \[0, 2\]"):
        model.denoise(hidden_rows((0.1, 0.9)))
    with pytest.raises(ValueError, match=r"sigma=2\.0 is outside"):
        model.denoise(ids, 2.0)


def test_layers_are_told_the_mask_rate_only_if_asked_to():
    ids, rates = hidden_rows((0.5, 0.5)), (0.4, 0.6)
    plain = blocked_mlm("bert")
    assert torch.equal(plain(ids, mask_rate=rates[0], block=1).logits, plain(ids, mask_rate=rates[1], block=1).logits)
    for architecture in ("bert", "modernbert", "llama"):
        base = base_mlm(architecture)
        told = BlockedForMaskedLM.from_base(base, 3, mask_token_id=MASK, time_conditioning=True).eval()
        untold = BlockedForMaskedLM.from_base(base, 3, mask_token_id=MASK)
        assert torch.equal(told(ids).logits, untold(ids).logits)  # zero-initialised
        perturbed(told, 0.1)
        low, high = (told(ids, mask_rate=rate, block=1).logits for rate in rates)
        assert not torch.allclose(low, high)
    with pytest.raises(ValueError, match="time_conditioning"):
        blocked_mlm("bert", 1, time_conditioning=True).to_base()


# -- training ------------------------------------------------------------------------------------------------------


def settings(folder, **changes) -> DiffusionBlocksTrainingArguments:
    values = {"max_steps": 3, "per_device_train_batch_size": 4, "train_shared": "none", "use_ema": False} | changes
    return DiffusionBlocksTrainingArguments(
        output_dir=str(folder), learning_rate=1e-2, save_steps=100, disable_tqdm=True, **values
    )


def trained(folder, model=None, **changes) -> BlockedForMaskedLM:
    model = blocked_mlm() if model is None else model
    DiffusionBlocksTrainer(model, settings(folder, **changes), TokenRows()).train()
    return model


def test_an_update_of_one_block_leaves_all_others_as_they_are(tmp_path):
    before = blocked_mlm("bert-untied").state_dict()
    after = trained(tmp_path, blocked_mlm("bert-untied"), blocks=[1]).state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("blocks.1.") for name in changed)


def test_jobs_merge_to_what_one_process_trains_wherever_blocks_rest(tmp_path):
    whole = trained(tmp_path / "whole").state_dict()
    streamed = trained(tmp_path / "host", residency="host")
    streamed.disable_block_streaming()
    assert all(torch.equal(streamed.state_dict()[name], value) for name, value in whole.items())
    blocked_mlm().save_pretrained(tmp_path / "start")
    folders = []
    for block in range(3):
        model = BlockedForMaskedLM.from_pretrained(tmp_path / "start", blocks=[block])
        trained(tmp_path / f"job-{block}", model, blocks=[block])
        model.save_pretrained(tmp_path / f"block-{block}")
        folders.append(tmp_path / f"block-{block}")
    merge_blocks(folders, tmp_path / "merged")
    merged = BlockedForMaskedLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(merged[name], value) for name, value in whole.items())


def test_training_lowers_the_loss_of_every_block(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BlockedForMaskedLM.from_base(base_config(), 3, mask_token_id=MASK)
    held_out = TokenRows(num_rows=64, seed=1)
    before = MaskedDiffusion().held_out(model, held_out, num_draws=4)
    trained(tmp_path, model, max_steps=50, per_device_train_batch_size=16, train_shared="all")
    after = MaskedDiffusion().held_out(model, held_out, num_draws=4)
    gained = [a - b for a, b in zip(before.per_range, after.per_range, strict=True)]
    assert min(gained) > 0.01, gained  # block 0 sees next to nothing of the rows
    assert before.total == pytest.approx(sum(before.per_range) / 3)


def test_a_plan_is_what_a_step_holds_and_blocks_hold_a_third():
    model = blocked_mlm("bert-untied", num_layers=12)
    plan = plan_memory(model, batch_size=4, tokens=16, alternatives=False)
    batch = model.dummy_batch(4, tokens=16)
    for block in (0, 1):
        alone = BlockedForMaskedLM(model.config, blocks=[block])
        real = measure_memory(alone, block, batch)
        row = next(r for r in plan.rows if r.block == block and r.method == "blocked")
        assert (row.gradients, row.moments, row.weights) == (real.gradients, real.moments, real.weights)
        # A plan has no values: it counts the head at all tokens, a step at the hidden ones.
        assert 0.9 * row.activations <= real.activations <= row.activations
    assert plan.worst("blocked").ratio < 0.42
    cost = training_flops(model.config, batch_size=4, tokens=16)
    assert 1 <= cost.ratio < 1.2


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "llama"])
def test_a_saved_model_is_one_for_transformers_whole_or_by_block(architecture, tmp_path):
    model, ids = blocked_mlm(architecture), hidden_rows()
    model.save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForMaskedLM):
        again = auto.from_pretrained(tmp_path).eval()
        assert isinstance(again, BlockedForMaskedLM)
        assert torch.equal(again(ids).logits, model(ids).logits)
    one = BlockedForMaskedLM.from_pretrained(tmp_path, blocks=[2]).eval()
    assert torch.equal(one(ids, block=2).logits, model(ids, block=2).logits)
    with pytest.raises(ValueError, match="block 0 is not loaded"):
        one(ids, block=0)
    assert BlockedMaskedLMConfig.from_pretrained(tmp_path).to_dict() == model.config.to_dict()


@pytest.mark.parametrize("architecture", ["bert", "bert-untied", "llama"])
def test_a_vocabulary_grows_with_every_head(architecture, tmp_path):
    model, ids = blocked_mlm(architecture), hidden_rows()
    before = model(ids).logits
    model.resize_token_embeddings(VOCAB_SIZE + 3)
    logits = model(ids).logits
    torch.testing.assert_close(logits[..., :VOCAB_SIZE], before)
    assert logits.shape[-1] == model.config.vocab_size == VOCAB_SIZE + 3
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(BlockedForMaskedLM.from_pretrained(tmp_path).eval()(ids).logits, logits)
    with pytest.raises(ValueError, match="mask_token_id=39 is none of the vocabulary's 20 tokens"):
        model.resize_token_embeddings(20)


def test_transformers_fills_masks_with_it(tmp_path):
    tokenizer = with_mask_token(train_tokenizer("abcdefghijklmnopqrstuvwxyz ", "character"))
    config = base_config("bert", vocab_size=len(tokenizer))
    model = BlockedForMaskedLM.from_base(config, 3, mask_token_id=tokenizer.mask_token_id).eval()
    filled = pipeline("fill-mask", model=model, tokenizer=tokenizer)(f"a b{tokenizer.mask_token}c", top_k=3)
    assert len(filled) == 3 and all(0 < answer["score"] < 1 for answer in filled)


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": None}, r"no mask token.*add_special_tokens\(\{'mask_token'"),
        ({"mask_token_id": VOCAB_SIZE}, r"mask_token_id=40 is none of the vocabulary's 40 tokens"),
        ({"schedule": "sine"}, r"schedule 'sine'"),
        ({"partition": "log_uniform"}, r"partition of a masked language model"),
        ({"partition": "explicit"}, "needs edges: B \\+ 1 mask rates"),
        ({"edges": [1.0, 0.5, 0.2, 0.1]}, r"outer edge 0\.1 must equal sigma_min=0\.0"),
        ({"noise": {"p_mean": 0.0}}, "has no meaning where tokens are masked"),
        ({"preconditioning": "vp_epsilon", "noise_schedule": {}}, "preconditioning|noise_schedule"),
        ({"layers_per_blok": [1]}, "layers_per_block"),
    ],
)
def test_settings_that_cannot_be_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        BlockedForMaskedLM.from_base(base_config(), 3, **({"mask_token_id": MASK} | changes))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"model_type": "bert", "is_decoder": True}, "is_decoder=True"),
        ({"model_type": "albert", "embedding_size": 16}, r"'albert' cannot be cut.*BERT, RoBERTa and ModernBERT"),
        ({"model_type": "electra", "embedding_size": 8}, r"tokens are 8 wide, its layers 16"),
        ({"model_type": "gpt2"}, "cannot be cut|cannot be made bidirectional|gpt2 setting"),
        ({"model_type": "vit"}, "vit"),
    ],
)
def test_bases_that_cannot_be_cut_say_which_can(base, message):
    with pytest.raises(ValueError, match=message):
        BlockedForMaskedLM.from_base(base_config("bert") | base, 3, mask_token_id=MASK)


def test_a_base_without_a_mask_token_says_how_to_add_one(tmp_path):
    base_mlm("bert").save_pretrained(tmp_path)
    train_tokenizer("abc", "character").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no mask token.*resize_token_embeddings"):
        BlockedForMaskedLM.from_base(tmp_path, 3)


def test_input_that_does_not_fit_is_named():
    model, ids = blocked_mlm(), hidden_rows()
    with as_users_run():
        for call, message in (
            (lambda: model(ids + 40), "vocabulary has 40 tokens"),
            (lambda: model(), "give input_ids"),
            (lambda: model(ids, output_attentions=True), "output_attentions"),
            (lambda: model(hidden_rows(length=65)), "64 positions"),
            (
                lambda: model.check_batch({"input_ids": torch.full((2, 4), MASK)}),
                "every token of the batch is the mask",
            ),
            (lambda: model.check_batch({"labels": ids}), "needs 'input_ids'"),
            (lambda: model(ids, labels=ids[:, :2]), "as input_ids. Each is of the token in its own place"),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        with pytest.raises(TypeError, match="attention_mask"):
            model(ids, attention_maks=ids)
