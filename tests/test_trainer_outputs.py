"""What a run gives: averages, held-out figures, logs, callbacks, and the files in its directory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_diffusionblocks import BlockedDiTModel, DiffusionBlocksTrainer
from hf_diffusionblocks.objectives import held_out_loss
from hf_diffusionblocks.serialization import same_tensors
from hf_diffusionblocks.training.checkpoint import find_checkpoints
from hf_diffusionblocks.training.run_files import overwrite_run
from runs import make_trainer, reset_accelerate, updates
from tiny import TinyImages, tiny_dit


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


# -- averages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inv_gamma, power, highest", [(8.0, 1.0, 0.9999), (1.0, 2 / 3, 0.9999), (8.0, 1.0, 0.4)])
def test_the_average_follows_the_ramp_of_its_decay(tmp_path, inv_gamma, power, highest):
    trainer = make_trainer(
        tmp_path, tiny_dit(1, 1), ema_inv_gamma=inv_gamma, ema_power=power, ema_max_decay=highest, learning_rate=0.05
    )
    one = trainer.trainers[0]
    average: list[Tensor] = []
    for update in range(12):
        one.step()
        current = [p.detach().double() for p in one.parameters]
        decay = min(highest, 1 - (1 + update / inv_gamma) ** -power)
        old = current if update == 0 else average
        average = [decay * a + (1 - decay) * c for a, c in zip(old, current, strict=True)]
    for mine, expected in zip(one.ema.shadow_params, average, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-6)
    assert any((a - c).abs().max() > 0.01 for a, c in zip(average, current, strict=True))


def test_averaged_weights_are_put_in_place_and_taken_back_exactly(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=0.05)
    trainer.train()
    trained = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    averages = {n: v.clone() for one in trainer.trainers.values() for n, v in one.ema_tensors().items()}
    assert averages.keys() == trained.keys() and not same_tensors(averages, trained)
    with trainer.averaged_weights():
        assert same_tensors(trainer.model.state_dict(), averages)
    assert same_tensors(trainer.model.state_dict(), trained)
    with pytest.raises(RuntimeError, match="inside"), trainer.averaged_weights():
        raise RuntimeError("inside")
    assert same_tensors(trainer.model.state_dict(), trained)
    path = trainer.save_model()
    assert path == tmp_path / "model"
    assert same_tensors(BlockedDiTModel.from_pretrained(path).state_dict(), averages)
    assert same_tensors(trainer.model.state_dict(), trained)


def test_without_an_average_the_trained_weights_are_saved(tmp_path):
    trainer = make_trainer(tmp_path, use_ema=False)
    trainer.train()
    path = trainer.save_model(tmp_path / "elsewhere")
    assert same_tensors(BlockedDiTModel.from_pretrained(path).state_dict(), trainer.model.state_dict())


def test_held_out_figures_are_those_of_the_averaged_weights(tmp_path):
    data = TinyImages(32, seed=1)
    trainer = make_trainer(tmp_path, eval_dataset=data, eval_steps=4, learning_rate=0.05, eval_samples=16)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [4, 8, 9]
    with trainer.averaged_weights():
        expected = held_out_loss(trainer.model, data, max_samples=16, seed=0)
    assert rows[-1]["eval_loss"] == expected.total
    assert [rows[-1][f"eval_loss/block_{b}"] for b in range(3)] == expected.per_range
    assert expected.total != held_out_loss(trainer.model, data, max_samples=16, seed=0).total
    assert trainer.model.training
    with pytest.raises(ValueError, match="no held-out data"):
        make_trainer(tmp_path).evaluate()


# -- logs, trackers, callbacks -----------------------------------------------------------------------------------


def test_every_update_is_logged_once(tmp_path):
    summary = make_trainer(tmp_path, logging_steps=4).train()
    rows = updates(tmp_path)
    assert [row["iteration"] for row in rows] == list(range(1, 10))
    for block in range(3):
        assert [row["update"] for row in rows if row["block"] == block] == [1, 2, 3]
        losses = [row["loss"] for row in rows if row["block"] == block]
        assert summary["last_losses"][block] == pytest.approx(sum(losses) / 3)
    assert summary["iterations"] == 9 and summary["updates_per_block"] == {0: 3, 1: 3, 2: 3}
    assert summary["training_seconds"] > 0


def test_tensorboard_gets_the_means_of_each_block(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(
        tmp_path, report_to="tensorboard", logging_steps=9, eval_dataset=TinyImages(16), block_order="sequential"
    )
    trainer.train()
    (directory,) = {p.parent for p in tmp_path.rglob("events.out.tfevents.*") if "loss/block_0" in tags_of(p.parent)}
    events = EventAccumulator(str(directory)).Reload()
    for block in range(3):
        (event,) = events.Scalars(f"loss/block_{block}")
        rows = [row["loss"] for row in updates(tmp_path) if row["block"] == block]
        assert event.step == 9 and event.value == pytest.approx(sum(rows) / 3)
    assert events.Scalars("eval_loss")[0].value > 0


def tags_of(directory: Path) -> list[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory)).Reload().Tags()["scalars"]


class Recorder(TrainerCallback):
    """Writes down the events that it gets, and acts at some iterations."""

    def __init__(self, **acts: int):
        self.events: list[str] = []
        self.acts = acts

    def note(self, name: str, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        assert isinstance(kwargs["model"], BlockedDiTModel) and isinstance(kwargs["trainer"], DiffusionBlocksTrainer)
        self.events.append(f"{name}@{state.global_step}")
        for act, iteration in self.acts.items():
            if name == "on_step_end" and state.global_step == iteration:
                setattr(control, act, True)

    def on_train_begin(self, args, state, control, **kwargs):
        self.note("on_train_begin", args, state, control, kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        self.note("on_step_end", args, state, control, kwargs)

    def on_log(self, args, state, control, **kwargs):
        assert any(name.startswith("loss/block_") for name in kwargs["logs"])
        self.note("on_log", args, state, control, kwargs)

    def on_evaluate(self, args, state, control, **kwargs):
        assert kwargs["metrics"]["eval_loss"] > 0
        self.note("on_evaluate", args, state, control, kwargs)

    def on_save(self, args, state, control, **kwargs):
        assert (Path(args.output_dir) / f"checkpoint-{state.global_step}").is_dir()
        self.note("on_save", args, state, control, kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        self.note("on_train_end", args, state, control, kwargs)


def test_callbacks_are_called_in_order(tmp_path):
    recorder = Recorder()
    make_trainer(
        tmp_path, callbacks=[recorder], max_steps=1, logging_steps=2, save_steps=2, eval_dataset=TinyImages(8)
    ).train()
    assert recorder.events == [
        "on_train_begin@0",
        "on_step_end@1",
        "on_step_end@2",
        "on_log@2",
        "on_save@2",
        "on_step_end@3",
        "on_log@3",
        "on_save@3",
        "on_evaluate@3",
        "on_train_end@3",
    ]


def test_callbacks_can_save_evaluate_and_stop(tmp_path):
    recorder = Recorder(should_save=2, should_evaluate=3, should_training_stop=5)
    summary = make_trainer(tmp_path, callbacks=[recorder], eval_dataset=TinyImages(8)).train()
    assert summary["iterations"] == 5
    assert {"on_save@2", "on_evaluate@3", "on_save@5"} <= set(recorder.events)
    assert [p.name for p in find_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-5"]


# -- the output directory ----------------------------------------------------------------------------------------


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    make_trainer(tmp_path, save_steps=2, save_total_limit=3).train()
    assert [p.name for p in find_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-8", "checkpoint-9"]


@pytest.mark.parametrize("save_steps", [0, 3])
def test_a_new_run_in_the_directory_of_a_longer_one_keeps_its_own_checkpoints(tmp_path, save_steps):
    make_trainer(tmp_path, max_steps=4, save_steps=2).train()
    trainer = make_trainer(tmp_path, max_steps=2, save_steps=save_steps, learning_rate=1e-2)
    trainer.train()
    newest = find_checkpoints(tmp_path)[-1]
    assert newest.name == "checkpoint-6"
    assert same_tensors(BlockedDiTModel.from_pretrained(newest).state_dict(), trainer.model.state_dict())


def test_a_new_run_of_the_same_length_saves_its_end(tmp_path):
    make_trainer(tmp_path).train()
    trainer = make_trainer(tmp_path, learning_rate=1e-2)
    trainer.train()
    newest = find_checkpoints(tmp_path)[-1]
    assert same_tensors(BlockedDiTModel.from_pretrained(newest).state_dict(), trainer.model.state_dict())


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    trainer = make_trainer(tmp_path, save_steps=3, eval_dataset=TinyImages(8))
    trainer.train()
    trainer.save_model()
    (tmp_path / "notes.txt").write_text("mine")
    overwrite_run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
