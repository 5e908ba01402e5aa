"""Adapters per block: training them alone, their files, and merging them into the weights."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_diffusionblocks import BlockedForCausalLM, DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments
from hf_diffusionblocks.families.dit import BlockedDiTModel
from hf_diffusionblocks.modeling import BlockedPreTrainedModel
from hf_diffusionblocks.serialization import same_tensors, sha256
from tiny import TinyImages, tiny_dit
from tiny_prompts import BATCH, FLUX, PIXART, SD3, TinyPrompts, prompts, tiny_prompted
from tiny_text import TokenRows, base_lm

peft = pytest.importorskip("peft", reason="adapters need peft")

from hf_diffusionblocks.adapters import (  # noqa: E402
    add_block_adapter,
    load_block_adapter,
    merge_block_adapter,
    save_block_adapter,
)

NAMES = [PIXART, SD3, FLUX]


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**({"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_v", "to_out.0"]} | settings))


@torch.no_grad()
def output(model: BlockedDiTModel, block: int) -> torch.Tensor:
    low, high = model.partition.range(block)
    z = torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.denoise(z, (low * high) ** 0.5, **prompts(model.config.base_class))


def adapted(name: str, block: int = 1, **settings: Any) -> BlockedDiTModel:
    """A model with an adapter on one block that is not zero."""
    model = tiny_prompted(name, **settings)
    add_block_adapter(model, block, lora())
    with torch.no_grad():
        for key, parameter in model.block_parameters(block):
            if "lora_B" in key:
                parameter.copy_(torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_new_adapter_changes_nothing_and_a_trained_one_its_block_alone(name):
    plain, model = tiny_prompted(name), tiny_prompted(name)
    count = add_block_adapter(model, 1, lora())
    trained = [n for n, p in model.named_parameters() if p.requires_grad and n.startswith("blocks.1.")]
    assert trained and all(".lora_" in n for n in trained)
    assert count == sum(p.numel() for n, p in model.block_parameters(1) if p.requires_grad)
    assert count < 0.1 * sum(p.numel() for _, p in plain.block_parameters(1))
    assert torch.equal(output(model, 0), output(plain, 0)) and torch.equal(output(model, 2), output(plain, 2))
    torch.testing.assert_close(output(model, 1), output(plain, 1), rtol=1e-6, atol=1e-6)  # it adds B A x = 0
    changed = adapted(name)
    assert [torch.allclose(output(changed, b), output(plain, b)) for b in range(3)] == [True, False, True]


def test_the_trainer_trains_an_adapter_alone(tmp_path):
    plain, model = tiny_prompted(SD3), tiny_prompted(SD3)
    add_block_adapter(model, 1, lora())
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "blocks": [1], "learning_rate": 1e-2, "save_steps": 2}
    args = DiffusionBlocksTrainingArguments(output_dir=tmp_path / "run", **settings)
    trainer = DiffusionBlocksTrainer(model, args, TinyPrompts(SD3))
    trainer.train()
    moments = trainer.trainers[1].optimizer.state
    assert moments and sum(p.numel() for p in moments) == sum(p.numel() for p in trainer.trainers[1].parameters)
    frozen = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if ".lora_" not in k}
    assert same_tensors(frozen, plain.state_dict())
    with trainer.averaged_weights():
        expected = output(model, 1)
        save_block_adapter(model, 1, tmp_path / "adapters")
    assert not torch.allclose(expected, output(plain, 1))
    load_block_adapter(plain, 1, tmp_path / "adapters")
    assert torch.equal(output(plain, 1), expected)
    again = tiny_prompted(SD3)  # a run goes on where it stopped, adapter and moments
    add_block_adapter(again, 1, lora())
    resumed = DiffusionBlocksTrainer(again, args, TinyPrompts(SD3))
    resumed.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    assert same_tensors(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_survives_its_files_and_merges_into_the_weights(name, tmp_path):
    model = adapted(name)
    expected = output(model, 1)
    folder = save_block_adapter(model, 1, tmp_path)
    assert folder == tmp_path / "block-01"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["block-01"]
    alone = tiny_prompted(name, blocks=[1])
    load_block_adapter(alone, 1, tmp_path)
    assert torch.equal(output(alone, 1), expected)
    assert not any(p.requires_grad for p in alone.parameters())
    merge_block_adapter(alone, 1)
    torch.testing.assert_close(output(alone, 1), expected, rtol=1e-4, atol=1e-5)
    assert alone.state_dict().keys() == tiny_prompted(name, blocks=[1]).state_dict().keys()
    assert all(p.requires_grad for p in alone.parameters())
    alone.save_pretrained(tmp_path / "merged")
    loaded = BlockedDiTModel.from_pretrained(tmp_path / "merged", blocks=[1])
    assert torch.equal(output(loaded, 1), output(alone, 1))


def test_pefts_own_loader_reads_it(tmp_path):
    model = adapted(SD3, num_blocks=1, block=0)
    save_block_adapter(model, 0, tmp_path)
    network = peft.PeftModel.from_pretrained(tiny_prompted(SD3, 1).to_base(), str(tmp_path / "block-00"))
    z, t = torch.randn(BATCH, 1, 8, 8), torch.full((BATCH,), 300.0)
    with torch.no_grad():
        ours = model.run_block(0, z, t, **prompts(SD3))
        theirs = network(z, timestep=t, **prompts(SD3)).sample
    torch.testing.assert_close(theirs, ours)


def test_training_an_adapter_goes_on_after_loading(tmp_path):
    save_block_adapter(adapted(PIXART), 1, tmp_path)
    model = tiny_prompted(PIXART)
    load_block_adapter(model, 1, tmp_path, trainable=True)
    assert {n for n, p in model.block_parameters(1) if p.requires_grad} == {
        n for n, _ in model.block_parameters(1) if ".lora_" in n
    }
    save_block_adapter(model, 1, tmp_path / "again")
    files = (load_file(p / "block-01" / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "again"))
    assert same_tensors(*files)


def test_class_labelled_dits_and_language_models_take_adapters_too(tmp_path):
    llama = BlockedForCausalLM.from_base(base_lm(), num_blocks=3)
    cases: list[tuple[BlockedPreTrainedModel, Any, list[str]]] = [
        (tiny_dit(), TinyImages(), ["to_q", "to_v"]),
        (llama, TokenRows(), ["q_proj", "o_proj"]),
    ]
    for i, (model, dataset, targets) in enumerate(cases):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        for block in range(3):
            add_block_adapter(model, block, lora(target_modules=targets))
        args = DiffusionBlocksTrainingArguments(
            tmp_path / f"run-{i}",
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=0.1,
            use_ema=False,
            train_shared="none",
        )
        DiffusionBlocksTrainer(model, args, dataset).train()
        for block in range(3):
            save_block_adapter(model, block, tmp_path / str(i))
        if model is llama:
            logits = model(input_ids=dataset[:2]["input_ids"]).logits
        for block in range(3):
            merge_block_adapter(model, block)
        if model is llama:
            torch.testing.assert_close(model(input_ids=dataset[:2]["input_ids"]).logits, logits, rtol=1e-4, atol=1e-4)
        after = model.state_dict()
        changed = {k for k in before if not torch.equal(before[k], after[k])}
        adapted = {k for k in before if any(k.endswith(f".{t}.weight") for t in targets)}
        assert before.keys() == after.keys() and changed == adapted


def test_adapters_that_are_refused(tmp_path):
    model = adapted(SD3)
    with pytest.raises(ValueError, match="block 1 has an adapter 'default' already"):
        add_block_adapter(model, 1, lora())
    with pytest.raises(ValueError, match="block 0 has no adapter 'default'; it has none"):
        save_block_adapter(model, 0, tmp_path)
    with pytest.raises(ValueError, match="block 3 does not exist"):
        add_block_adapter(model, 3, lora())
    with pytest.raises(ValueError, match="is a dict: give one of peft"):
        add_block_adapter(model, 0, {"r": 2})
    with pytest.raises(ValueError, match="holds no adapter of block 2"):
        load_block_adapter(model, 2, tmp_path)
    folder = save_block_adapter(model, 1, tmp_path)
    with pytest.raises(ValueError, match=r"belongs to another model: its noise\['p_mean'\] is -1.2, this one's 0.0"):
        load_block_adapter(tiny_prompted(SD3, noise={"p_mean": 0.0}), 1, tmp_path)
    (folder).rename(tmp_path / "block-02")
    with pytest.raises(ValueError, match="is of block 1, which has other layers"):
        load_block_adapter(tiny_prompted(SD3), 2, tmp_path)
    (tmp_path / "block-02").rename(folder)
    path, card = folder / "adapter_model.safetensors", json.loads((folder / "block_adapter.json").read_text())
    weights = load_file(path)
    first = sorted(weights)[0]
    save_file(weights | {first: weights[first][:1]}, path)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is corrupted: its SHA-256"):
        load_block_adapter(tiny_prompted(SD3), 1, tmp_path)
    card["sha256"][path.name] = sha256(path)
    (folder / "block_adapter.json").write_text(json.dumps(card))
    fresh, untouched = tiny_prompted(SD3), tiny_prompted(SD3)
    with pytest.raises(ValueError, match="does not fit block 1: 'transformer_blocks.0.attn"):
        load_block_adapter(fresh, 1, tmp_path)
    assert same_tensors(fresh.state_dict(), untouched.state_dict())
    streamed = tiny_prompted(SD3)
    streamed.enable_block_streaming("cpu", offload_to_disk_path=tmp_path / "scratch")
    with pytest.raises(ValueError, match=r"call disable_block_streaming\(\) first"):
        add_block_adapter(streamed, 1, lora())
    path.unlink()
    with pytest.raises(ValueError, match="is missing: copy or download the adapter again"):
        load_block_adapter(tiny_prompted(SD3), 1, tmp_path)
