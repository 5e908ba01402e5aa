"""Blocked language models on disk and at birth: files by block, Auto classes, `to_base`, initial weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_diffusionblocks.families.causal_lm import BlockedCausalLMConfig, BlockedForCausalLM
from hf_diffusionblocks.families.causal_lm_config import PRESETS
from hf_diffusionblocks.serialization import same_tensors
from tiny import perturbed
from tiny_text import ARCHITECTURES, SPECIAL, VOCAB_SIZE, WIDTH, base_config, base_lm, blocked_lm, tokens

KINDS = {
    "clean-cascade": {"readout": "clean", "context": "cascade", "auxiliary_layers": 1},
    "exact-independent": {"readout": "exact", "context": "independent"},
    "edm-cascade": {"readout": "edm", "context": "cascade"},
}


def fresh(seed: int = 0, blocks: list[int] | None = None, **settings) -> BlockedForCausalLM:
    """A model with new weights, not perturbed."""
    config = BlockedForCausalLM.config_from(base_config(settings.pop("architecture", "llama")), **settings)
    torch.manual_seed(seed)
    return BlockedForCausalLM(config, blocks=blocks)


def output(model: BlockedForCausalLM, block: int) -> Tensor:
    """What a block alone gives: its layers on the embeddings, its noisy targets."""
    ids = tokens()
    z, sigma = torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(0)), torch.ones(2, 12)
    with torch.no_grad():
        hidden = model.embed_tokens(ids)
        if model.config.two_stream:
            return model.two_streams(hidden, z, sigma, block, position_ids=torch.arange(12)[None])[1]
        return model.training_hidden(model.clean_block(hidden, block), block)


# -- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama-tied-biases", "qwen3", "qwen2-mixed-window"])
def test_one_file_per_block_and_the_embedding_alone_is_shared(tmp_path, architecture, kind):
    model = blocked_lm(architecture, **KINDS[kind])
    model.save_pretrained(tmp_path / "model")
    keys = {}
    for path in sorted((tmp_path / "model").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            keys[path.name] = set(file.keys())
    assert set(keys) == {"shared.safetensors", "block-00.safetensors", "block-01.safetensors", "block-02.safetensors"}
    assert keys.pop("shared.safetensors") == {"embed_tokens.weight"}
    for block, names in enumerate(keys.values()):
        assert names == {name for name, _ in model.block_parameters(block)}
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages)  # a tied head is the embedding itself, not a second parameter
    assert [name for name, _ in model.shared_parameters()] == ["embed_tokens.weight"]
    loaded = BlockedForCausalLM.from_pretrained(tmp_path / "model")
    assert same_tensors(loaded.state_dict(), model.state_dict())
    assert all(torch.equal(output(loaded, b), output(model, b)) for b in range(3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_loads_without_the_others_files(tmp_path, kind):
    model = blocked_lm("qwen2-mixed-window", **KINDS[kind])
    model.generation_config.update(do_sample=True, top_k=7)
    model.save_pretrained(tmp_path / "model")
    for block in (0, 2):
        (tmp_path / "model" / f"block-{block:02d}.safetensors").unlink()
    for load in (BlockedForCausalLM, AutoModel, AutoModelForCausalLM):
        part = load.from_pretrained(tmp_path / "model", blocks=[1])
        assert type(part) is BlockedForCausalLM and part.resident_blocks == (1,)
        assert torch.equal(output(part, 1), output(model, 1))
        assert part.generation_config.top_k == 7
        with pytest.raises(ValueError, match=r"block 0 is not loaded.*blocks=\[0\]"):
            part.block(0)
    with pytest.raises(ValueError, match=r"block-00\.safetensors \(block 0\) is missing"):
        BlockedForCausalLM.from_pretrained(tmp_path / "model")


def test_blocks_saved_one_after_the_other_make_the_whole_model(tmp_path):
    model = blocked_lm(**KINDS["clean-cascade"])
    model.save_pretrained(tmp_path / "whole")
    for block in (2, 0, 1):
        BlockedForCausalLM.from_pretrained(tmp_path / "whole", blocks=[block]).save_pretrained(tmp_path / "parts")
    together = BlockedForCausalLM.from_pretrained(tmp_path / "parts")
    assert same_tensors(together.state_dict(), model.state_dict())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_classes_and_bfloat16(tmp_path, architecture):
    model = blocked_lm(architecture)
    model.save_pretrained(tmp_path / "model")
    for load in (AutoModel, AutoModelForCausalLM):
        loaded = load.from_pretrained(tmp_path / "model")
        assert type(loaded) is BlockedForCausalLM and not loaded.training
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert type(AutoConfig.from_pretrained(tmp_path / "model")) is BlockedCausalLMConfig
    half = BlockedForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(half(tokens()).logits.float(), model(tokens()).logits, rtol=0.1, atol=0.3)
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16 and same_tensors(again.state_dict(), half.state_dict())


@pytest.mark.parametrize("kind", ["exact-independent", "edm-cascade"])
def test_bfloat16_denoises_in_float32(kind):
    model = blocked_lm(**KINDS[kind])
    z, ids = torch.randn(2, 12, WIDTH), tokens()
    expected = model.denoise(z, 0.3, input_ids=ids)
    found = model.to(torch.bfloat16).denoise(z, 0.3, input_ids=ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
    assert model(ids, labels=ids).loss.isfinite()


# -- back to the base --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_files", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_cascade_is_given_back_bitwise(tmp_path, architecture, through_files):
    base = base_lm(architecture)
    model = BlockedForCausalLM.from_base(base, layers_per_block=[1, 3, 2], auxiliary_layers=2)
    if through_files:
        model.save_pretrained(tmp_path / "model")
        model = BlockedForCausalLM.from_pretrained(tmp_path / "model")
    back = model.to_base()
    assert type(back) is type(base) and same_tensors(back.state_dict(), base.state_dict())
    assert same_tensors(dict(back.named_buffers()), dict(base.named_buffers()))
    assert torch.equal(back(tokens()).logits, base(tokens()).logits)
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == base.config.tie_word_embeddings
    ours, theirs = back.config.to_dict(), base.config.to_dict()
    assert {k for k in theirs if ours[k] != theirs[k]} <= {"architectures", "dtype"}
    back.save_pretrained(tmp_path / "back")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(again(tokens()).logits, base(tokens()).logits)


@torch.no_grad()
def test_a_trained_cascade_and_a_single_block_are_given_back_with_their_weights():
    for settings in ({"num_blocks": 3}, {"num_blocks": 1, "context": "independent"}):
        model = perturbed(BlockedForCausalLM.from_base(base_lm("qwen3"), **settings), 0.3).to(torch.bfloat16).eval()
        back = model.to_base()
        assert back.dtype == torch.bfloat16 and not back.training
        assert torch.equal(back(tokens()).logits, model(tokens()).logits)


def test_what_is_not_one_decoder_is_not_given_back(tmp_path):
    for settings in ({"context": "independent"}, {"readout": "exact"}, {"readout": "edm", "num_blocks": 1}):
        model = blocked_lm(**({"num_blocks": 3} | settings))
        with pytest.raises(ValueError, match="cannot be given back as one decoder.*Only readout='clean' with"):
            model.to_base()
    blocked_lm().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="block 0 is not loaded"):
        BlockedForCausalLM.from_pretrained(tmp_path / "model", blocks=[1, 2]).to_base()


# -- the config --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_config_survives_json_and_rebuilds_the_model(tmp_path, architecture, kind):
    config = BlockedForCausalLM.config_from(
        base_config(architecture), layers_per_block=[1, 3, 2], overlap=0.1, noise={"p_mean": -0.35}, **KINDS[kind]
    )
    again = BlockedCausalLMConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    config.save_pretrained(tmp_path)
    for other in (again, AutoConfig.from_pretrained(tmp_path)):
        assert other.to_dict() | {"_name_or_path": ""} == config.to_dict()
        assert other.make_partition() == config.make_partition()
        theirs = {k: v.shape for k, v in BlockedForCausalLM(other).state_dict().items()}
        assert theirs == {k: v.shape for k, v in BlockedForCausalLM(config).state_dict().items()}
    assert (config.num_layers, config.vocab_size, config.hidden_size) == (6, VOCAB_SIZE, WIDTH)
    assert {name: getattr(config, name) for name in SPECIAL} == SPECIAL


def test_defaults_are_the_cascade_and_the_paper_is_a_preset():
    config = BlockedForCausalLM.config_from(base_config())
    assert (config.readout, config.context, config.auxiliary_layers) == ("clean", "cascade", 1)
    assert BlockedForCausalLM.config_from(base_config(), preset="default").to_dict() == config.to_dict()
    paper = BlockedForCausalLM.config_from(base_config(), preset="paper")
    assert (paper.readout, paper.context, paper.auxiliary_layers) == ("edm", "independent", 0)
    assert paper.overlap == 0.1 and paper.noise["p_std"] == 1.2
    mixed = BlockedForCausalLM.config_from(base_config(), 2, preset="paper", readout="exact", overlap=0.2)
    assert (mixed.readout, mixed.context, mixed.overlap, mixed.num_blocks) == ("exact", "independent", 0.2, 2)
    assert PRESETS["paper"]["readout"] == "edm"  # a preset is not changed by its use
    from_object = BlockedForCausalLM.config_from(AutoConfig.for_model(**base_config()))
    assert from_object.to_dict() == config.to_dict()


# -- initial weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_blocks_initial_weights_are_the_same_alone_and_with_all(kind):
    whole = fresh(5, **KINDS[kind])
    for block in range(3):
        alone = fresh(5, blocks=[block], **KINDS[kind])
        assert same_tensors(alone.block(block).state_dict(), whole.block(block).state_dict())
        assert torch.equal(alone.embed_tokens.weight, whole.embed_tokens.weight)
    other = fresh(6, **KINDS[kind])
    assert not same_tensors(other.block(0).state_dict(), whole.block(0).state_dict())


def test_blocks_start_unequal_and_with_the_bases_spread():
    model = fresh(initialization="default", readout="exact", context="independent")
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
    weights = [[model.block(b).get_parameter(name) for name in names] for b in range(3)]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert not any(torch.equal(x, y) for x, y in zip(weights[a], weights[b], strict=True))
    for weight in (w.detach() for block in weights for w in block):
        assert 0.015 < float(weight.std()) < 0.025 and abs(float(weight.mean())) < 0.005
    # c_in z has unit variance; what enters the layers has the size of fresh token embeddings.
    torch.testing.assert_close(model.block(1).noisy_in.weight, 0.02 * torch.eye(WIDTH))


def test_identity_initialisation_passes_everything_on():
    model = fresh(auxiliary_layers=2)
    hidden = torch.randn(2, 12, WIDTH)
    for block in range(3):
        assert torch.equal(model.clean_block(hidden, block), hidden) == (block > 0)
        # Auxiliary layers add nothing either: what the local loss reads is the norm of the block's output.
        assert torch.equal(model.training_hidden(hidden, block), model.block(block).norm(hidden))
    assert model.block(0).auxiliary is not None and model.block(2).auxiliary is None
    plain = fresh(initialization="default", auxiliary_layers=2)
    assert not torch.equal(plain.clean_block(hidden, 1), hidden)
    assert not torch.equal(plain.training_hidden(hidden, 0), plain.block(0).norm(hidden))
    # Blocks that nothing feeds learn from the start: only what a cascade puts on top is the identity.
    independent = fresh(context="independent")
    assert not torch.equal(independent.clean_block(hidden, 1), hidden)


def test_layers_that_start_as_the_identity_learn():
    model = fresh()
    for block in (1, 2):
        loss = model.training_hidden(model.clean_block(torch.randn(2, 12, WIDTH), block), block)
        model.zero_grad()
        (loss @ model.head_weight(block).T).logsumexp(-1).sum().backward()
        assert model.block(block).model.layers[0].mlp.down_proj.weight.grad.any()
        assert model.block(block).model.layers[1].self_attn.o_proj.weight.grad.any()


def test_a_cascades_block_begins_with_the_norm_and_head_below_it():
    model = perturbed(fresh(auxiliary_layers=1))
    before = {b: {k: v.clone() for k, v in model.block(b).state_dict().items()} for b in range(3)}
    model.begin_block(0)
    model.begin_block(1)
    changed = [k for k, v in model.block(1).state_dict().items() if not torch.equal(v, before[1][k])]
    assert sorted(changed) == ["lm_head.weight", "norm.weight"]
    assert all(torch.equal(model.block(1).state_dict()[k], before[0][k]) for k in changed)
    model.begin_block(2, hand_over=True)
    layers = model.block(2).model.layers
    assert same_tensors(layers[0].state_dict(), model.block(1).auxiliary.layers[0].state_dict())
    assert torch.equal(layers[1].mlp.up_proj.weight, before[2]["model.layers.1.mlp.up_proj.weight"])
    assert all(same_tensors(model.block(b).model.state_dict(), before_layers(before[b])) for b in (0, 1))


def before_layers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}


def test_blocks_of_a_pretrained_base_keep_its_weights():
    for model in (blocked_lm(), blocked_lm(context="independent"), perturbed(fresh(context="independent"))):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        for block in range(3):
            model.begin_block(block, hand_over=True)
        assert same_tensors(model.state_dict(), before)


def test_saved_files_hold_nothing_of_where_they_came_from(tmp_path):
    base_lm().save_pretrained(tmp_path / "secret-base")
    BlockedForCausalLM.from_base(tmp_path / "secret-base").save_pretrained(tmp_path / "model")
    for path in Path(tmp_path / "model").glob("*.json"):
        assert "secret-base" not in path.read_text()
