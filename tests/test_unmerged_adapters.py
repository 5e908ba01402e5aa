"""What a model with an adapter beside its weights refuses, and how a run with adapters is told from another one."""

import pytest
import torch

from hf_diffusionblocks import (
    BlockedForCausalLM,
    BlockedForImageClassification,
    BlockedForMaskedLM,
    DiffusionBlocksTrainer,
    DiffusionBlocksTrainingArguments,
)
from hf_diffusionblocks.families.dit import BlockedDiTModel
from hf_diffusionblocks.serialization import same_tensors
from tiny import tiny_dit
from tiny_masked import MASK, base_mlm
from tiny_prompts import SD3, TinyPrompts, tiny_prompted
from tiny_text import base_lm
from tiny_vit import base_vit

peft = pytest.importorskip("peft", reason="adapters need peft")

from hf_diffusionblocks.adapters import add_block_adapter, merge_block_adapter  # noqa: E402

MEND = r"block 1 holds an adapter that is not merged.*merge_block_adapter\(model, 1\).*save_block_adapter\(model, 1"


def lora(**settings):
    return peft.LoraConfig(**({"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_v"]} | settings))


@pytest.mark.parametrize("blocks", [None, [1]])
def test_a_model_is_saved_after_its_adapter_is_merged(blocks, tmp_path):
    model = tiny_prompted(SD3, blocks=blocks)
    add_block_adapter(model, 1, lora())
    with pytest.raises(ValueError, match=MEND):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=MEND):
        model.push_to_hub("user/model", blocks=[1])
    assert list(tmp_path.iterdir()) == []
    merge_block_adapter(model, 1)
    model.save_pretrained(tmp_path / "saved")
    loaded = BlockedDiTModel.from_pretrained(tmp_path / "saved", blocks=blocks)
    assert same_tensors(loaded.state_dict(), model.state_dict())


def test_weights_of_other_blocks_are_saved_all_the_same(tmp_path):
    model = tiny_dit()
    add_block_adapter(model, 1, lora())
    others = {k: v for k, v in model.state_dict().items() if not k.startswith("blocks.1.")}
    model.save_pretrained(tmp_path / "saved", state_dict=others)
    assert same_tensors(BlockedDiTModel.from_pretrained(tmp_path / "saved", blocks=[0, 2]).state_dict(), others)
    with pytest.raises(ValueError, match=MEND):
        model.save_pretrained(tmp_path / "whole", state_dict=model.state_dict())


def trainer(directory, settings=None, **arguments):
    model = tiny_prompted(SD3, blocks=[1])
    if settings is not None:
        add_block_adapter(model, 1, lora(**settings))
    args = DiffusionBlocksTrainingArguments(
        directory, per_device_train_batch_size=4, blocks=[1], **({"max_steps": 2, "save_steps": 1} | arguments)
    )
    return DiffusionBlocksTrainer(model, args, TinyPrompts(SD3))


@pytest.fixture(scope="module")
def adapted_run(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("adapted") / "run", {})
    run.train()
    return run


def test_the_trainer_saves_checkpoints_with_adapters_and_no_model(adapted_run):
    output = adapted_run.output_dir
    assert (output / "checkpoint-2").is_dir()
    with pytest.raises(ValueError, match=MEND):
        adapted_run.save_model()
    assert not (output / "model").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 3}, r"its adapters has block 1, 'default'\.r=2, this one block 1, 'default'\.r=3"),
        ({"lora_alpha": 8}, r"lora_alpha=4, this one block 1, 'default'\.lora_alpha=8"),
        ({"target_modules": ["to_q"]}, r"target_modules=\['to_q', 'to_v'\]"),
        (None, "this one block 1, 'default'=None"),
    ],
)
def test_a_run_with_another_adapter_is_another_run(settings, words, adapted_run):
    with pytest.raises(ValueError, match=f"checkpoint-2 belongs to another run: .*{words}"):
        trainer(adapted_run.output_dir, settings).train(resume_from_checkpoint=True)
    trainer(adapted_run.output_dir, {}).train(resume_from_checkpoint=True)  # the same one goes on


def test_an_adapter_is_no_part_of_a_run_without(tmp_path):
    trainer(tmp_path / "run").train()
    with pytest.raises(ValueError, match=r"belongs to another run: its adapters has block 1, 'default'=None"):
        trainer(tmp_path / "run", {}).train(resume_from_checkpoint=True)


def test_weights_that_do_not_fit_a_checkpoint_are_named(adapted_run, monkeypatch):
    """As of a checkpoint that does not say which adapters it holds."""
    monkeypatch.setattr("hf_diffusionblocks.training.trainer.check_identity", lambda *args: None)
    with pytest.raises(ValueError, match=r"belongs to another run: block 1 has '.*' of shape \[2, 16\] there and"):
        trainer(adapted_run.output_dir, {"r": 3}).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("family", ["lm", "vit", "masked", "dit"])
def test_a_base_is_given_back_after_its_adapter_is_merged(family):
    if family == "lm":
        base, target = base_lm(), "q_proj"
        model = BlockedForCausalLM.from_base(base, num_blocks=2)
    elif family == "vit":
        base, target = base_vit(), "q_proj"
        model = BlockedForImageClassification.from_base(base, num_blocks=2)
    elif family == "masked":
        base, target = base_mlm(), "query"
        model = BlockedForMaskedLM.from_base(base, num_blocks=2, mask_token_id=MASK)
    else:
        model, target = tiny_dit(2), "to_q"
    give = (lambda: model.to_base(block=1)) if family in ("masked", "dit") else (lambda: model.to_base())
    expected = give().state_dict()
    add_block_adapter(model, 1, lora(target_modules=[target]))
    with pytest.raises(ValueError, match="cannot give the base back: " + MEND):
        give()
    if family in ("masked", "dit"):
        assert model.to_base(block=0) is not None
    merge_block_adapter(model, 1)
    assert all(torch.equal(v, expected[k]) for k, v in give().state_dict().items())
