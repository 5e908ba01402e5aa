"""What training, plans and commands do with every family of `battery.FAMILIES`; none of them knows one from another."""

import json

import pytest
import torch
from transformers import TrainerCallback

from battery import BATCH, LENGTH, Family
from battery import parametrize as pytest_generate_tests  # noqa: F401
from devices import ON_CPU, on_cpu
from hf_diffusionblocks import DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments, plan_memory
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.memory import measure_memory
from hf_diffusionblocks.modeling import BlockedPreTrainedModel
from hf_diffusionblocks.serialization import same_tensors
from tiny_text import words_file


class StopAfter(TrainerCallback):
    def __init__(self, iterations: int):
        self.iterations = iterations

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.iterations


def trained(model: BlockedPreTrainedModel, family: Family, folder, stop: int | None = None, **settings):
    given = {"max_steps": 2, "per_device_train_batch_size": BATCH, "learning_rate": 1e-2, "block_order": "round_robin"}
    given |= {"save_steps": 100, "use_ema": False, "disable_tqdm": True, "cpu": ON_CPU} | settings
    trainer = DiffusionBlocksTrainer(
        model, DiffusionBlocksTrainingArguments(output_dir=str(folder), **given), family.dataset()
    )
    if stop:
        trainer.callbacks.append(StopAfter(stop))
    trainer.train(resume_from_checkpoint=True)
    return model


def test_an_update_of_one_block_leaves_all_others_as_they_are(family, tmp_path):
    before = family.build(family.num_blocks).state_dict()
    frozen = {"train_shared": "none"} if family.shares else {}
    after = trained(family.build(family.num_blocks), family, tmp_path, blocks=[1], max_steps=1, **frozen)
    after = on_cpu(after.state_dict())
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("blocks.1.") for name in changed)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights_with_blocks_at_rest_in_host_memory(family, tmp_path):
    start = family.build(family.num_blocks)
    whole = trained(family.build(family.num_blocks), family, tmp_path / "whole")
    moved = [
        not same_tensors(on_cpu(dict(whole.block_parameters(b))), dict(start.block_parameters(b)))
        for b in range(family.num_blocks)
    ]
    assert all(moved)
    trained(family.build(family.num_blocks), family, tmp_path / "part", stop=family.num_blocks, residency="host")
    part = trained(family.build(family.num_blocks), family, tmp_path / "part", residency="host")
    if part.streamer is not None:
        part.disable_block_streaming()
    assert same_tensors(part.state_dict(), whole.state_dict())


@pytest.mark.slow  # each family's own tests have faster ones
def test_the_plan_is_what_a_step_holds(family):
    block = family.last
    config = family.build(family.num_blocks).config
    alone = family.build(family.num_blocks, blocks=[block])
    tokens = {"tokens": LENGTH} if family.shares else {}
    plan = plan_memory(config, batch_size=BATCH, device="cpu", alternatives=False, **tokens)
    row = next(r for r in plan.rows if r.block == block and r.method == "blocked")
    real = measure_memory(alone, block, alone.dummy_batch(BATCH, **tokens))
    assert (row.weights, row.gradients, row.moments) == (real.weights, real.gradients, real.moments)
    # A plan has no values: of masked tokens it counts the head at all, a step at those that are hidden.
    assert 0.9 * row.activations <= real.activations <= 1.02 * row.activations


@pytest.mark.slow  # each family's own tests have faster ones
def test_its_commands_plan_train_and_evaluate(family, tmp_path, capsys):
    recipe = list(family.recipe)
    if family.shares:
        recipe.append(f"data.name={words_file(tmp_path, 400)}")
    assert main(["plan", *recipe]) == 0
    assert "blocked" in capsys.readouterr().out
    assert main(["train", *recipe, "--output-dir", str(tmp_path / "run"), "--no-report", "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert main(["evaluate", model, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert any(isinstance(value, float) and value > 0 for value in figures.values())
    assert main(["evaluate", model, "data.name=/nowhere/at/all", "--json"]) == 2
    assert "/nowhere/at/all" in capsys.readouterr().err


def test_a_batch_that_does_not_fit_is_refused(family):
    model = family.build(family.num_blocks)
    with pytest.raises(ValueError, match="the trainer needs"):
        model.check_batch({"something": torch.zeros(BATCH, 3)})
