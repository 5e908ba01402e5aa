"""``diffusionblocks convert``: each family from its bases, what it would write, and what cannot be cut."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import DiTTransformer2DModel, UNet2DModel
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_diffusionblocks import (
    BlockedForCausalLM,
    BlockedForImageClassification,
    BlockedForMaskedLM,
    BlockedRecurrentForCausalLM,
)
from hf_diffusionblocks.base_names import CUT_FROM, what_can_be_cut
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.recipes.families import FAMILIES

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
NARROW = {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "in_channels": 1}
PIECES = {"block_out_channels": (8, 8), "norm_num_groups": 4}
DOWN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
MAKE = {
    "dit": lambda: DiTTransformer2DModel(num_embeds_ada_norm=10, **NARROW),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, **TINY)),
    "vit": lambda: ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, **TINY)),
    "bert": lambda: BertForMaskedLM(BertConfig(vocab_size=50, **TINY)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=4, n_head=2)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2)),
    "bert-classifier": lambda: BertForSequenceClassification(BertConfig(vocab_size=50, **TINY)),
    "resnet": lambda: ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
    "unet": lambda: UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **PIECES, **DOWN),
}
CUT = {"dit": "dit", "llama": "causal_lm", "vit": "image_classification", "bert": "masked_lm"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases")
    for name, make in MAKE.items():
        make().save_pretrained(folder / name)
    return folder


def convert(*words: object) -> int:
    return main(["convert", *map(str, words)])


def test_help_names_what_every_family_is_cut_from(capsys):
    assert CUT_FROM.keys() == FAMILIES.keys()
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{family}: {names}" in text for family, names in CUT_FROM.items())


@pytest.mark.parametrize("name", CUT)
def test_a_dry_run_says_what_is_then_written(name, bases, tmp_path, capsys):
    out, settings = tmp_path / "out", ["mask_token_id=3"] if name == "bert" else []
    command = [bases / name, "--num-blocks", 2, "--output-dir", out, "--json", *settings]
    assert convert(*command, "--dry-run") == 0
    said = json.loads(capsys.readouterr().out)
    assert not out.exists() and said["family"] == CUT[name] and sum(said["layers_per_block"]) == 4
    assert convert(*command) == 0
    assert json.loads(capsys.readouterr().out) == {"model": str(out), "family": CUT[name]}
    held = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["bytes"]
    assert said["bytes"] <= sum(held.values()) < said["bytes"] + 10_000  # headers
    assert json.loads((out / "config.json").read_text())["layers_per_block"] == said["layers_per_block"]
    assert convert(out, "--output-dir", tmp_path / "again") == 2
    assert "has been cut into blocks already" in capsys.readouterr().err


def test_a_decoder_becomes_a_recurrent_core(bases, tmp_path, capsys):
    out = tmp_path / "core"
    assert convert(bases / "llama", "--family", "recurrent", "--output-dir", out, "num_recurrences=2") == 0
    assert f"next: diffusionblocks push {out}" in capsys.readouterr().out
    model = BlockedRecurrentForCausalLM.from_pretrained(out)
    assert model.config.num_recurrences == 2 and model.config.pretrained and len(model.config.core) == 2
    base = AutoModelForCausalLM.from_pretrained(bases / "llama")
    layer = base.model.layers[2].state_dict()
    held = model.block(0).state_dict()
    assert any(torch.equal(layer["mlp.up_proj.weight"], t) for t in held.values() if t.shape == (24, 16))
    assert convert(bases / "llama", "--family", "recurrent", "--num-blocks", 2, "--output-dir", tmp_path / "two") == 2
    assert "is one block" in capsys.readouterr().err
    assert convert(bases / "vit", "--family", "recurrent", "--output-dir", tmp_path / "x") == 2
    error = capsys.readouterr().err
    assert "is of family image_classification" in error and what_can_be_cut() in error


def test_a_base_that_is_nowhere_is_not_called_a_dit(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert convert("no-such-base", "--family", "recurrent", "--output-dir", tmp_path / "x") == 2
    assert "there is no directory no-such-base" in capsys.readouterr().err


def test_a_decoder_becomes_bidirectional(bases, tmp_path, capsys):
    out, masked = tmp_path / "masked", ["--family", "masked_lm", "mask_token_id=49"]
    assert convert(bases / "llama", *masked, "--output-dir", out, "--dry-run") == 0
    assert convert(bases / "llama", *masked, "--output-dir", out) == 0
    assert "no tokenizer could be loaded" in capsys.readouterr().out
    model = BlockedForMaskedLM.from_pretrained(out).eval()
    tokens = torch.tensor([[1, 2, 49]])
    changed = model(torch.tensor([[1, 2, 3]])).logits[0, 0], model(tokens).logits[0, 0]
    assert not torch.allclose(*changed)  # the first position sees the last


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpt2", "its config has no num_hidden_layers"),
        ("t5", "holds a T5ForConditionalGeneration"),
        ("bert-classifier", "holds a BertForSequenceClassification"),
        ("resnet", "a model of type 'resnet' cannot be cut"),
        ("unet", "UNet2DModel"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["", "dry"])
def test_what_cannot_be_cut_is_told_why_and_what_can(name, why, dry, bases, tmp_path, capsys):
    assert convert(bases / name, "--output-dir", tmp_path / "out", *dry) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert why in error and what_can_be_cut() in error and len(error) < 1000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["llama", "--num-blocks", 9], "num_blocks=9 is more than the 4 layers"),
        (["llama", "--num-blocks", 0], "num_blocks=0 must be a whole number"),
        (
            ["llama", "--family", "recurrent", "num_recurrences=0"],
            "num_recurrences=0 must be a whole number of at least 1",
        ),
        (["llama", "--family", "recurrent", "backprop_depth=0"], "backprop_depth=0 must be"),
        (["bert"], "the vocabulary has no mask token"),
        (["bert", "mask_token_id=50"], "mask_token_id=50 is none of the vocabulary's 50 tokens"),
        (["vit", "num_inference_steps=0"], "num_inference_steps=0"),
        (["vit", "readot=clean"], "did you mean 'readout'"),
    ],
)
def test_settings_that_are_none_end_in_one_line(words, said, bases, tmp_path, capsys):
    assert convert(bases / words[0], *words[1:], "--output-dir", tmp_path / "out", "--dry-run") == 2
    assert said in capsys.readouterr().err.strip().split("\n")[-1]


def test_the_ways_that_a_missing_mask_token_is_told_to_be_named_work(bases, tmp_path, capsys):
    options = ["--num-blocks", 2, "--output-dir", tmp_path / "out", "--dry-run"]
    assert convert(bases / "bert", *options) == 2
    told = capsys.readouterr().err
    assert "from_base(..., mask_token_id=4)" in told and "blocks.mask_token_id=4" in told
    assert "`diffusionblocks convert ... mask_token_id=4`" in told
    assert convert(bases / "bert", *options, "mask_token_id=4") == 0
    assert BlockedForMaskedLM.from_base(str(bases / "bert"), 2, mask_token_id=4).config.mask_token_id == 4


def test_bad_input_in_python_is_refused_by_name(bases):
    transformers.logging.set_verbosity_error()
    vit = BlockedForImageClassification.from_base(str(bases / "vit"), num_blocks=2).eval()
    with pytest.raises(ValueError, match=r"labels|class_labels"):
        vit(torch.zeros(1, 1, 8, 8), labels=torch.tensor([2]))  # classes 0 and 1
    with pytest.raises(ValueError, match=r"pixel_values has shape \[1, 1, 8, 9\]"):
        vit(torch.zeros(1, 1, 8, 9))
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        BlockedForImageClassification.from_base(str(bases / "vit"), 2, preset="paper").eval()(
            torch.zeros(1, 1, 8, 8), num_inference_steps=0
        )
    core = BlockedRecurrentForCausalLM.from_base(str(bases / "llama"))
    with pytest.raises(ValueError, match="num_recurrences=0"):
        core.generate(torch.tensor([[1]]), num_recurrences=0)
    llama = BlockedForCausalLM.from_base(str(bases / "llama"), num_blocks=2)
    with pytest.raises(ValueError, match="64"):
        llama(torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="50"):
        llama(torch.tensor([[50]]))
    with pytest.raises(ValueError, match="the vocabulary has no mask token"):
        BlockedForMaskedLM.from_base(str(bases / "bert"), num_blocks=2)
    with pytest.raises(ValueError, match="num_blocks=5 is more than the 4 layers"):
        BlockedForCausalLM.from_base(str(bases / "llama"), num_blocks=5)
