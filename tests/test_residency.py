"""Residency: the same numbers wherever the blocks rest, with one block's state on the device at a time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from devices import DEVICE, ON_CPU
from hf_diffusionblocks import BlockedDiTModel, DiffusionBlocksTrainer
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.memory import measure_step
from hf_diffusionblocks.streaming import Layout, stream_blocks
from hf_diffusionblocks.training.residency import StreamedResidency
from runs import arguments, everything, make_trainer
from test_exact_gradient import Rows, everything_of
from tiny import TinyImages, tiny_dit, tiny_dit_config
from tiny_text import blocked_lm

HOMES = ["host", "disk"]


def same_everything(trainer: DiffusionBlocksTrainer, wanted: dict) -> None:
    """Weights, moments, averages and counters of all blocks, bit by bit, one block at a time."""
    for block in trainer.blocks:
        trainer.residency.pin(block)
        found = everything_of(trainer, block)
        assert found.keys() == wanted[block].keys()
        for name, value in wanted[block].items():
            assert torch.equal(value, found[name]), (block, name)
    for name, value in wanted["shared"].items():
        assert torch.equal(value, dict(trainer.model.shared_parameters())[name])
    trainer.residency.release()


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("block_order", ["random", "round_robin"])
def test_training_gives_the_same_numbers_everywhere(home, block_order, tmp_path):
    settings = {
        "max_steps": 5,
        "steps_per_visit": 2,  # and a last visit of one
        "block_order": block_order,
        "save_steps": 4,
        "eval_steps": 6,
        "eval_dataset": TinyImages(16),
        "weight_decay": 0.01,
    }
    wanted = make_trainer(tmp_path / "device", tiny_dit(3, base_config={"dropout": 0.1}), **settings)
    wanted.train()
    trainer = make_trainer(tmp_path / home, tiny_dit(3, base_config={"dropout": 0.1}), residency=home, **settings)
    trainer.train()
    for name in ("updates.jsonl", "evaluations.jsonl"):
        assert (tmp_path / home / name).read_text() == (tmp_path / "device" / name).read_text()
    same_everything(trainer, everything(wanted))
    models = [BlockedDiTModel.from_pretrained(t.save_model()).state_dict() for t in (wanted, trainer)]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize(
    "settings",
    [
        {},  # a cascade, trained in sequence, lower blocks run again
        {"hand_over": True, "lower_outputs": "disk"},
        {"order": "simultaneous", "train_shared": "all"},
    ],
    ids=["sequential", "lower outputs on disk", "simultaneous"],
)
def test_cascades_give_the_same_numbers_everywhere(home, settings, tmp_path):
    def train(residency: str) -> DiffusionBlocksTrainer:
        settings_of = {"max_steps": 3, "save_steps": 4, "residency": residency} | settings
        args = arguments(tmp_path / residency, **settings_of)
        trainer = DiffusionBlocksTrainer(blocked_lm(), args, Rows(), Rows(8))
        trainer.train()
        return trainer

    wanted, trainer = train("device"), train(home)
    same_everything(trainer, everything(wanted))
    for name in ("updates.jsonl", "evaluations.jsonl"):
        assert (tmp_path / home / name).read_text() == (tmp_path / "device" / name).read_text()


@pytest.mark.parametrize("home", HOMES)
def test_one_blocks_state_is_on_the_device_and_the_next_ones_comes(home, tmp_path):
    seen: list[tuple[int, dict[str, int], int]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, *, trainer, **kwargs):
            here = [b for b in range(3) if not next(trainer.model.blocks[str(b)].parameters()).isnan().all()]
            assert here == [trainer.residency.active]
            moments = [
                s["exp_avg"].untyped_storage().nbytes()
                for b, t in trainer.trainers.items()
                for s in t.optimizer.state.values()
                if b not in here
            ]
            seen.append((here[0], trainer.model.streamer.held_bytes(), sum(moments)))

    trainer = make_trainer(
        tmp_path,
        residency=home,
        steps_per_visit=3,
        max_steps=9,
        block_order="round_robin",
        callbacks=[Watch()],
        logging_steps=100,
    )
    trainer.train()
    assert [block for block, *_ in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2] * 3
    parameters = list(tiny_dit(3).block(0).parameters())
    one = Layout.of(parameters).nbytes  # weights; the average is as large, the moments are twice that
    for _, held, absent in seen[9:-3]:
        assert held["pinned"] == held["next pinned"] == 4 * one
        assert held["visitor"] == held["next visitor"] == 0
        assert absent <= 4 * 2 * len(parameters)  # four bytes stand for each tensor that is away
    assert seen[-1][1]["next pinned"] == 0  # nothing follows


@pytest.mark.parametrize("home", HOMES)
def test_a_step_counts_as_much_as_in_a_job_that_holds_its_block_alone(home, tmp_path):
    alone = make_trainer(tmp_path / "alone", tiny_dit(3, blocks=[1]), max_steps=4)
    alone.train()
    wanted = measure_step(alone.trainers[1])
    trainer = make_trainer(tmp_path / "all", residency=home, max_steps=4)
    trainer.train()
    trainer.residency.pin(1)
    found = measure_step(trainer.trainers[1])
    buffers = sum(b.nbytes for b in trainer.model.buffers())
    for kind in ("gradients", "activations"):
        assert getattr(found, kind) == getattr(wanted, kind)
    padding = 256 * len(list(trainer.model.block(1).parameters()))  # every tensor starts at a multiple of 256 bytes
    assert wanted.weights <= found.weights <= wanted.weights + padding + buffers + 4
    assert wanted.ema <= found.ema <= wanted.ema + padding
    assert wanted.moments <= found.moments <= wanted.moments + 2 * padding


def test_runs_go_on_wherever_their_blocks_rest(tmp_path):
    """A run that was begun in one place goes on in another, and ends like one that never stopped."""
    settings = {"max_steps": 6, "steps_per_visit": 2, "save_steps": 5, "save_total_limit": None}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    begun = make_trainer(tmp_path / "moved", residency="disk", **settings)
    begun.train()
    for place, at in (("host", 5), ("device", 10), ("disk", 15)):
        trainer = make_trainer(tmp_path / "moved", residency=place, **settings)
        trainer.train(resume_from_checkpoint=tmp_path / "moved" / f"checkpoint-{at}")
        same_everything(trainer, everything(whole))
    assert not list((tmp_path / "moved").glob("residency/*"))


KILLED = """
import random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import os, killing

folder, settings = Path(sys.argv[2]), {"residency": sys.argv[3], "steps_per_visit": 2}
killing.trainer_of(folder / "unused")
begin = time.perf_counter()
whole = killing.status_of(killing.fork(lambda: killing.train(folder / "whole", **settings)))
seconds, draw, kills = time.perf_counter() - begin, random.Random(0), 0
for _ in range(5):
    child = killing.fork(lambda: killing.train(folder / "killed", **settings))
    time.sleep(draw.uniform(0.1, 0.5) * seconds)
    os.kill(child, signal.SIGKILL)
    kills += killing.status_of(child) == -signal.SIGKILL
final = killing.status_of(killing.fork(lambda: killing.train(folder / "killed", **settings)))
print(whole, final, kills)
"""


@pytest.mark.parametrize("home", ["disk", pytest.param("host", marks=pytest.mark.slow)])
def test_killed_runs_end_like_undisturbed_ones(home, tmp_path):
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(here), str(tmp_path), home],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    whole, final, kills = map(int, done.stdout.split())
    assert (whole, final) == (0, 0) and kills >= 1, done.stderr[-2000:]
    for name in ("whole", "killed"):
        (checkpoint,) = sorted((tmp_path / name).glob("checkpoint-24"))
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        files = {file: digest for file, digest in state["files"].items() if file.endswith(".safetensors")}
        moments = [torch.load(p, weights_only=True) for p in sorted(checkpoint.glob("optimizer-*.pt"))]
        if name == "whole":
            wanted = files, moments
    assert files == wanted[0] and len(files) == 7
    for mine, theirs in zip(moments, wanted[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert not [p for p in (tmp_path / "killed").glob("residency/*")]  # scratch files go with their process


@pytest.mark.parametrize("home", HOMES)
def test_averages_stand_in_for_weights_and_go_again(home, tmp_path):
    trainer = make_trainer(tmp_path, residency=home, max_steps=4)
    trainer.train()
    wanted = everything_all(trainer)
    with torch.no_grad(), trainer.averaged_weights():
        assert not torch.is_grad_enabled()
        for block in (0, 2, 1, 0):
            for name, parameter in trainer.model.block_parameters(block):
                assert torch.equal(parameter, wanted[block][f"average {name}"])
    with pytest.raises(RuntimeError, match="inside"), trainer.averaged_weights():
        trainer.model.block(1)
        raise RuntimeError("inside")
    assert trainer.model.streamer.on_visit is None
    same_everything(trainer, wanted)


def everything_all(trainer: DiffusionBlocksTrainer) -> dict:
    wanted: dict = {"shared": dict(trainer.model.shared_parameters())}
    for block in trainer.blocks:
        trainer.residency.pin(block)
        wanted[block] = everything_of(trainer, block)
    trainer.residency.release()
    return wanted


def test_a_model_made_on_disk_trains_there(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        whole = make_trainer(tmp_path / "device", BlockedDiTModel(tiny_dit_config(3)))
        torch.manual_seed(1)
        with stream_blocks("disk", device=DEVICE, folder=tmp_path):
            model = BlockedDiTModel(tiny_dit_config(3))
    trainer = make_trainer(tmp_path / "disk", model, residency="disk")
    whole.train()
    trainer.train()
    same_everything(trainer, everything(whole))


def test_a_second_trainer_of_the_same_model_starts_with_fresh_moments(tmp_path):
    model = tiny_dit(3)
    make_trainer(tmp_path / "first", model, residency="host").train()
    second = make_trainer(tmp_path / "second", model, residency="host")
    second.residency.pin(0)
    assert not second.trainers[0].optimizer.state
    second.train()

    other = tiny_dit(3)
    make_trainer(tmp_path / "third", other).train()
    last = make_trainer(tmp_path / "fourth", other)
    last.train()
    averaged = [t.save_model() for t in (second, last)]
    states = [BlockedDiTModel.from_pretrained(path).state_dict() for path in averaged]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_states_made_of_several_tensors_move_piece_by_piece():
    from hf_diffusionblocks.training.residency import _plain

    class Quantised(torch.Tensor):
        codes: Tensor
        scale: Tensor

        def __tensor_flatten__(self):
            return ["codes", "scale"], None

    value = torch.zeros(4).as_subclass(Quantised)
    value.codes, value.scale = torch.zeros(4, dtype=torch.uint8), torch.ones(2)
    assert [t.dtype for t in _plain(value)] == [torch.uint8, torch.float32]
    assert list(_plain(torch.tensor(3.0))) == [] and list(_plain(7)) == []  # counters stay


def test_residency_must_fit_the_model(tmp_path):
    model = tiny_dit(3)
    model.enable_block_streaming(DEVICE)
    with pytest.raises(ValueError, match="residency='device' with a model whose blocks are streamed"):
        make_trainer(tmp_path, model)
    with pytest.raises(ValueError, match=f"residency='disk' on {DEVICE}, but this model's blocks rest in 'host'"):
        make_trainer(tmp_path, model, residency="disk")
    assert isinstance(make_trainer(tmp_path, model, residency="host").residency, StreamedResidency)
    with pytest.raises(ValueError, match="residency.*'disk'"):
        make_trainer(tmp_path, residency="disc")


def test_signals_save_a_checkpoint_with_every_block(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    settings = {"residency": "disk", "steps_per_visit": 2}
    trainer = make_trainer(tmp_path / "stopped", callbacks=[Stop()], **settings)
    with pytest.raises(KeyboardInterrupt, match="saved in"):
        trainer.train()
    again = make_trainer(tmp_path / "stopped", **settings)
    again.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", steps_per_visit=2)
    whole.train()
    same_everything(again, everything(whole))


def test_the_commands_train_and_sample_with_one_block_at_a_time(tmp_path, capsys):
    recipe = ["digits-dit", "model.num_layers=3", "model.num_attention_heads=2", "model.attention_head_dim=8"]
    recipe += [
        "training.max_steps=2",
        "training.save_steps=0",
        f"training.cpu={ON_CPU}".lower(),
        "training.disable_tqdm=true",
    ]
    pictures = {}
    for place, streaming in (("device", []), ("disk", ["--block-streaming", "disk"])):
        folder = tmp_path / place
        train = ["train", *recipe, "--residency", place, "--no-report", "--output-dir", str(folder)]
        assert main(train) == 0, capsys.readouterr().err
        picture = ["sample", str(folder / "model"), "--output-dir", str(folder / "png"), "--steps", "4", *streaming]
        assert main([*picture, "--classes", "1", "2"]) == 0, capsys.readouterr().err
        pictures[place] = [p.read_bytes() for p in sorted((folder / "png").glob("0*.png"))]
        pictures[place] += [p.read_bytes() for p in sorted((folder / "model").glob("*.safetensors"))]
    assert pictures["device"] == pictures["disk"] and len(pictures["disk"]) == 6
