"""Blocked language models: conversion keeps what the base computes, and what its denoisers give."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hf_diffusionblocks.families.causal_lm import BlockedForCausalLM
from hf_diffusionblocks.serialization import same_tensors
from tiny import perturbed
from tiny_text import (
    ARCHITECTURES,
    WIDTH,
    base_config,
    base_lm,
    blocked_lm,
    left_padding,
    packed_positions,
    tokens,
)

CUTS: dict[str, dict[str, Any]] = {
    "1": {"num_blocks": 1},
    "2": {"num_blocks": 2},
    "3": {"num_blocks": 3},
    "6": {"num_blocks": 6},
    "1-2-3": {"layers_per_block": [1, 2, 3]},
    "5-1": {"layers_per_block": [5, 1]},
}


# -- with the clean readout in a cascade, the model is the base --------------------------------------------------


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_logits_are_bitwise_the_bases(architecture, cut):
    base = base_lm(architecture)
    model = BlockedForCausalLM.from_base(base, **CUTS[cut])
    assert len(model.blocks) == model.config.num_blocks == (len(cut.split("-")) if "-" in cut else int(cut))
    ids = tokens()
    for given in (
        {},
        left_padding(12, 3, 0),
        {"attention_mask": left_padding(12, 3, 0)["attention_mask"]},
        {"position_ids": packed_positions(12, 5, 9), "use_cache": False},  # documents are kept apart without a cache
        {"position_ids": packed_positions(12, 5, 9), "use_cache": True},
        {"logits_to_keep": 2},
        {"logits_to_keep": torch.tensor([1, 7])},
    ):
        assert torch.equal(model(ids, **given).logits, base(ids, **given).logits)
    embedded = base.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, base(inputs_embeds=embedded).logits)


@pytest.mark.parametrize("made_by", ["the model", "its config", "nobody"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_logits_after_a_cache_are_bitwise_the_bases(architecture, made_by):
    base = base_lm(architecture)
    model = BlockedForCausalLM.from_base(base)
    ids, mask = tokens(), left_padding(12, 3, 0)["attention_mask"]
    for masked in (False, True):
        caches = {
            "the model": [None, None],
            "its config": [DynamicCache(config=base.config), DynamicCache(config=model.config)],
            "nobody": [DynamicCache(), DynamicCache()],
        }[made_by]
        for chunk in (slice(0, 6), slice(6, 7), slice(7, 10), slice(10, 11), slice(11, 12)):
            given = {"attention_mask": mask[:, : chunk.stop]} if masked else {}
            outputs = [
                m(ids[:, chunk], past_key_values=past, use_cache=True, **given)
                for m, past in zip((base, model), caches, strict=True)
            ]
            assert torch.equal(outputs[1].logits, outputs[0].logits)
            caches = [output.past_key_values for output in outputs]
        assert len(caches[1].layers) == 6 and caches[1].get_seq_length() == 12


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_and_its_gradients_are_the_bases(architecture):
    base = base_lm(architecture)
    model = BlockedForCausalLM.from_base(base, num_blocks=2)
    ids = tokens()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    for given in ({}, {"num_items_in_batch": torch.tensor(40)}):  # as transformers' trainer accumulates gradients
        mine, theirs = model(ids, labels=labels, **given), base(ids, labels=labels, **given)
        torch.testing.assert_close(mine.loss, theirs.loss, rtol=1e-6, atol=1e-6)
        assert torch.equal(mine.logits, theirs.logits)
    mine.loss.backward()
    theirs.loss.backward()
    torch.testing.assert_close(
        model.block(1).model.layers[0].mlp.up_proj.weight.grad,
        base.model.layers[model.partition.layers(1)[0]].mlp.up_proj.weight.grad,
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_the_bases_attention_and_dtype_and_mode_are_kept(attention):
    base = base_lm("qwen2-mixed-window", attention=attention).to(torch.bfloat16).train()
    model = BlockedForCausalLM.from_base(base)
    assert model.dtype == torch.bfloat16 and model.training and base.training
    assert all(model.block(b).model.config._attn_implementation == attention for b in range(3))
    assert torch.equal(model(tokens()).logits, base(tokens()).logits)


@torch.no_grad()
def test_layers_that_are_told_apart_by_their_number_keep_it():
    config = AutoConfig.for_model(**base_config(model_type="smollm3", no_rope_layers=[1, 1, 0, 1, 0, 0]))
    base = perturbed(AutoModelForCausalLM.from_config(config), 0.2).eval()
    for cut in CUTS.values():
        assert torch.equal(BlockedForCausalLM.from_base(base, **cut)(tokens()).logits, base(tokens()).logits)


def test_a_directory_converts_like_the_model_in_it(tmp_path):
    base = base_lm("qwen3")
    base.save_pretrained(tmp_path / "base")
    for given in (tmp_path / "base", str(tmp_path / "base")):
        model = BlockedForCausalLM.from_base(given, num_blocks=2)
        assert same_tensors(model.state_dict(), BlockedForCausalLM.from_base(base, num_blocks=2).state_dict())
        assert model.config.pretrained


def test_auxiliary_layers_start_as_copies_of_those_that_follow():
    base = base_lm()
    model = BlockedForCausalLM.from_base(base, layers_per_block=[2, 3, 1], auxiliary_layers=2)
    layers = [layer.state_dict() for layer in base.model.layers]
    for block, copied in ((0, [2, 3]), (1, [5, 5])):  # past the last one, the last one again
        auxiliary = model.block(block).auxiliary.layers
        assert [same_tensors(a.state_dict(), layers[i]) for a, i in zip(auxiliary, copied, strict=True)] == [True] * 2
    assert model.block(2).auxiliary is None  # the last block's output is the model's
    for block in range(3):
        assert same_tensors(model.block(block).norm.state_dict(), base.model.norm.state_dict())
        assert torch.equal(model.block(block).lm_head.weight, base.lm_head.weight)


def test_a_conversion_leaves_the_base_alone():
    base = base_lm()
    before = copy.deepcopy(base.state_dict())
    model = perturbed(BlockedForCausalLM.from_base(base))
    model.generation_config.temperature = 0.3
    assert same_tensors(base.state_dict(), before) and base.generation_config.temperature != 0.3
    back = model.to_base()
    back.generation_config.temperature = 0.4
    perturbed(back)
    assert model.generation_config.temperature == 0.3
    assert not torch.equal(back.model.norm.weight, model.block(2).norm.weight)


# -- with two streams, the clean one is the base's layers --------------------------------------------------------


@torch.no_grad()
def states_of(base: PreTrainedModel, ids: Tensor, **given: Tensor) -> list[Tensor]:
    """What the base's layers are given, and what the last one gives."""
    seen: list[Tensor] = []
    layers = base.model.layers
    hooks = [layers[-1].register_forward_hook(lambda *args: seen.append(args[-1]))]
    hooks += [
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
        for layer in layers
    ]
    base(ids, use_cache=False, **given)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("given", [{}, {"position_ids": packed_positions(12, 5)}, left_padding(12, 3, 0)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_clean_stream_is_bitwise_the_bases_layers(architecture, given):
    base = base_lm(architecture)
    states = states_of(base, tokens(), **given)
    given = {"position_ids": torch.arange(12)[None]} | given
    real = given.get("attention_mask", torch.ones(2, 12)).bool()  # padding tokens give what nobody reads
    z, sigma = torch.randn(2, 12, WIDTH), torch.ones(2, 12)
    for readout in ("exact", "edm"):
        model = BlockedForCausalLM.from_base(base, layers_per_block=[1, 3, 2], readout=readout)
        for block in range(3):
            layers = model.partition.layers(block)
            start = model.context_of(block, tokens(), **given)
            assert torch.equal(start[real], states[layers[0]][real])
            clean, _ = model.two_streams(start, z, sigma, block, **given)
            assert torch.equal(clean[real], states[layers[-1] + 1][real])
            assert torch.equal(model.clean_block(start, block, **given)[real], clean[real])


@torch.no_grad()
def test_an_independent_block_reads_embeddings_and_a_cascades_what_is_below():
    ids = tokens()
    for context in ("independent", "cascade"):
        model = blocked_lm(context=context, readout="exact")
        hidden = model.embed_tokens(ids)
        for block in range(3):
            assert torch.equal(model.context_of(block, ids), hidden)
            if context == "cascade":
                hidden = model.clean_block(hidden, block)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_each_independent_block_is_a_language_model_of_its_own(architecture):
    base = base_lm(architecture)
    model = BlockedForCausalLM.from_base(base, context="independent")
    ids = tokens()
    for block in range(3):
        hidden = model.clean_block(base.get_input_embeddings()(ids), block)
        expected = base.lm_head(base.model.norm(hidden))
        assert torch.equal(model(ids, block=block).logits, expected)
        output = model(ids[:, :7], block=block, use_cache=True)  # its own layers' cache alone is filled
        for t in range(7, 12):
            output = model(ids[:, t : t + 1], block=block, past_key_values=output.past_key_values)
            torch.testing.assert_close(output.logits[:, 0], expected[:, t], rtol=1e-4, atol=1e-5)
    assert torch.equal(model(ids).logits, model(ids, block=0).logits)


# -- the denoiser ------------------------------------------------------------------------------------------------


def inputs(length: int = 12) -> tuple[Tensor, Tensor]:
    return tokens(2, length), torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(3))


def rows_of_norm_one(model: BlockedForCausalLM) -> Tensor:
    weight = model.embed_tokens.weight.double()
    return weight / weight.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0, 20.0])
@torch.no_grad()
def test_edms_denoiser_is_its_formula(sigma):
    model = blocked_lm(readout="edm", sigma_data=0.25)
    ids, z = inputs()
    block = model.partition.block_of(sigma)
    hidden = model.context_of(block, ids)
    levels = torch.full((2, 12), sigma)
    f = model.two_streams(hidden, z, levels, block, position_ids=torch.arange(12)[None])[1].double()
    # EDM, arXiv 2206.00364, Table 1, with the standard deviation 1/4 that this model's config names.
    c_skip = 0.0625 / (sigma**2 + 0.0625)
    c_out = sigma * 0.25 / (sigma**2 + 0.0625) ** 0.5
    table, temperature = rows_of_norm_one(model), model.block(block).logit_scale.double().exp()
    logits = temperature * (c_skip * z.double() + c_out * f) @ table.T
    torch.testing.assert_close(
        model.denoise(z, sigma, input_ids=ids).double(), logits.softmax(-1) @ table, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0, 20.0])
@pytest.mark.parametrize("readout", ["clean", "exact"])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied-biases"])
@torch.no_grad()
def test_the_exact_denoiser_weighs_tokens_by_their_likelihood(architecture, readout, sigma):
    model = blocked_lm(architecture, readout=readout, context="cascade")
    ids, z = inputs()
    block = model.partition.block_of(sigma)
    hidden = model.context_of(block, ids)
    levels = torch.full((2, 12), sigma)
    if readout == "clean":
        features = model.block(block).norm(model.clean_block(hidden, block))
    else:
        features = model.two_streams(hidden, z, levels, block, position_ids=torch.arange(12)[None])[1]
    table = rows_of_norm_one(model)
    log_prior = (features.double() @ model.head_weight(block).double().T).log_softmax(-1)
    # log N(z; e_k, sigma^2 I), up to what all tokens share: no use of |e_k| = 1 here.
    log_likelihood = -((z.double()[:, :, None] - table) ** 2).sum(-1) / (2 * sigma**2)
    posterior = (log_prior + log_likelihood).softmax(-1)
    logits = sum(x.double() @ w.double().T for x, w in model.readout(features, z, levels, block))
    torch.testing.assert_close(logits.softmax(-1), posterior, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.denoise(z, sigma, input_ids=ids).double(), posterior @ table, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_row_of_zeros_as_transformers_keeps_for_padding_gets_a_direction():
    model = blocked_lm("llama", readout="exact", context="cascade")
    before = model.target_table()
    model.embed_tokens.weight[3] = 0
    after = model.target_table()
    torch.testing.assert_close(after.norm(dim=-1), torch.ones(len(after)))
    torch.testing.assert_close(after[3], torch.full_like(after[3], after.shape[1] ** -0.5))
    others = torch.arange(len(after)) != 3
    torch.testing.assert_close(after[others], before[others], rtol=0, atol=0)


@pytest.mark.parametrize("readout", ["clean", "exact"])
@torch.no_grad()
def test_at_little_noise_the_denoiser_gives_the_tokens_embedding(readout):
    model = blocked_lm(readout=readout)
    ids = tokens()
    y = model.target_table()[ids.roll(-1, dims=1)]
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(2, 12))
    denoised = model.denoise(y + 0.01 * torch.randn(y.shape), 0.01, input_ids=ids)
    torch.testing.assert_close(denoised, y, rtol=0, atol=1e-5)
    far = model.denoise(80 * torch.randn(y.shape), 80.0, input_ids=ids)
    assert not torch.allclose(far, y, atol=0.1)


@pytest.mark.parametrize("readout", ["clean", "exact", "edm"])
@torch.no_grad()
def test_noise_levels_per_token_act_on_their_token(readout):
    model = blocked_lm(readout=readout, context="independent")
    ids, z = inputs()
    low, high = model.partition.range(1)
    per_token = low + (high - low) * torch.rand(2, 12)
    mixed = model.denoise(z, per_token, input_ids=ids)
    for row, j in ((0, 0), (1, 4), (0, 11)):
        alone = model.denoise(z, float(per_token[row, j]), input_ids=ids)
        torch.testing.assert_close(mixed[row, j], alone[row, j], rtol=1e-5, atol=1e-6)
    per_row = model.denoise(z, per_token[:, 0], input_ids=ids)
    assert torch.equal(per_row, model.denoise(z, per_token[:, :1].expand(2, 12), input_ids=ids))


@pytest.mark.parametrize("readout", ["clean", "exact", "edm"])
def test_the_noise_level_chooses_the_block_and_a_batch_needs_one(readout):
    model = blocked_lm(readout=readout, context="independent")
    ids, z = inputs()
    for block in range(3):
        low, high = model.partition.range(block)
        sigma = (low * high) ** 0.5
        small = z * sigma**2  # so that z does not decide alone
        named = model.denoise(small, sigma, block=block, input_ids=ids)
        assert torch.equal(model.denoise(small, sigma, input_ids=ids), named)
        assert not torch.equal(model.denoise(small, sigma, block=(block + 1) % 3, input_ids=ids), named)
    spanning = torch.ones(2, 12)
    spanning[1, 3] = 0.01
    with pytest.raises(ValueError, match=r"noise levels span blocks \[0, 2\]: call denoise once per block"):
        model.denoise(z, spanning, input_ids=ids)
    assert model.denoise(z, spanning, block=0, input_ids=ids).shape == (2, 12, WIDTH)


def test_what_a_readout_needs_and_no_more():
    for readout, parts in {"clean": set(), "exact": {"noisy_in"}, "edm": {"noisy_in", "logit_scale"}}.items():
        model = BlockedForCausalLM(BlockedForCausalLM.config_from(base_config(), readout=readout))
        names = {name.split(".")[0] for name, _ in model.block(0).named_parameters()}
        assert names & {"noisy_in", "logit_scale"} == parts
    # c_in z has unit variance; what enters the layers has the size of fresh token embeddings.
    torch.testing.assert_close(model.block(1).noisy_in.weight, 0.02 * torch.eye(WIDTH))
    assert model.block(1).logit_scale.item() == 2.0
