"""Runs that are killed, stopped or resumed wrongly: the same weights bit for bit, or an error that says why not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from devices import on_cpu
from hf_diffusionblocks import BlockedDiTModel, DiffusionBlocksTrainer
from hf_diffusionblocks.serialization import same_tensors
from hf_diffusionblocks.training import checkpoint as checkpoint_module
from hf_diffusionblocks.training.checkpoint import clean_staging, find_checkpoints, read_state
from runs import arguments, everything, make_trainer, reset_accelerate, updates
from tiny import TinyImages, tiny_dit

KILLING = Path(__file__).parent / "killing.py"


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """A nested state as one dict, to compare its tensors bitwise."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}.{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for key, item in enumerate(value) for k, v in flat(item, f"{name}.{key}").items()}
    return {name: value}


def saved_state(directory: Path) -> dict[str, Any]:
    """Everything in the newest checkpoint of a run, under one name each: weights, averages, moments, counters."""
    newest = find_checkpoints(directory)[-1]
    state: dict[str, Any] = {"name": newest.name}
    for path in sorted(newest.iterdir()):
        if path.suffix == ".safetensors":
            state |= flat(load_file(path), path.name)
        elif path.suffix == ".pt":
            state |= flat(torch.load(path, weights_only=True), path.name)
    trainer_state = read_state(newest)
    return state | flat(trainer_state["blocks"], "blocks") | {"iteration": trainer_state["iteration"]}


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "updates.jsonl").read_bytes() == (b / "updates.jsonl").read_bytes()
    first, second = saved_state(a), saved_state(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        assert same, name


# -- kills -------------------------------------------------------------------------------------------------------


def run_killing(directory: Path, *options: str) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(KILLING), str(directory), *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((directory / "report.json").read_text())


def assert_kills_left_no_trace(directory: Path, report: dict[str, Any], kills: int, stops: int) -> None:
    whole = directory / "whole"
    assert report["whole"] == report["short"] == 0
    assert len(updates(whole)) == 24
    # SIGTERM before the first update, while the run is being set up, ends it at once.
    for name, count, statuses in (("random", kills, {-signal.SIGKILL}), ("stopped", stops, {3, -signal.SIGTERM})):
        outcome = report[name]
        assert outcome["final"] == 0 and len(outcome["statuses"]) == count
        assert set(outcome["statuses"]) <= statuses
        assert_same_run(directory / name, whole)
        assert [p.name for p in (directory / name).glob(".*")] == []
    for name, point in report["points"].items():
        assert point["status"] == -signal.SIGKILL and point["final"] == 0, name
        # one whole checkpoint at least is there at every instant, with whatever is half written beside it
        assert point["found"] in (["checkpoint-3"], ["checkpoint-3", "checkpoint-6"], ["checkpoint-6"]), name
        assert_same_run(directory / name, directory / "short")
        assert [p.name for p in (directory / name).glob(".*")] == []
    half_written = [name for point in report["points"].values() for name in point["half_written"]]
    assert any(name.endswith(".writing") for name in half_written)
    assert any(".removed-" in name for name in half_written)


@pytest.mark.timeout(600)
def test_killed_runs_go_on_to_the_same_bits(tmp_path):
    report = run_killing(tmp_path, "--kills", "6", "--stops", "2", "--stride", "7")
    assert_kills_left_no_trace(tmp_path, report, kills=6, stops=2)
    assert len(report["points"]) >= 8


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_forty_kills_and_every_instant_of_a_checkpoint(tmp_path):
    report = run_killing(tmp_path, "--kills", "40", "--stops", "8", "--stride", "1", "--seed", "7")
    assert_kills_left_no_trace(tmp_path, report, kills=40, stops=8)
    assert len(report["points"]) >= 55


# -- resuming in the same process --------------------------------------------------------------------------------


class At(TrainerCallback):
    """Calls something after an iteration."""

    def __init__(self, **actions: Callable[[], Any]):
        self.actions = {int(name.removeprefix("i")): action for name, action in actions.items()}

    def on_step_end(self, args, state, control, **kwargs):
        action = self.actions.get(state.global_step)
        if action is not None:
            action()


def stop_after(output_dir: Path, iteration: int, **settings: Any) -> DiffusionBlocksTrainer:
    """A run that was stopped by SIGTERM after an iteration."""
    callback = At(**{f"i{iteration}": lambda: signal.raise_signal(signal.SIGTERM)})
    trainer = make_trainer(output_dir, callbacks=[callback], **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A run of 9 iterations, stopped after 5; not to be changed."""
    path = tmp_path_factory.mktemp("interrupted") / "run"
    stop_after(path, 5)
    return path


@pytest.fixture
def run_dir(interrupted, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_finishes_the_update_saves_and_interrupts(tmp_path, number, name):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    trainer = make_trainer(tmp_path, callbacks=[At(i4=lambda: signal.raise_signal(number))], save_steps=3)
    message = rf"stopped by {name} after 4 updates; saved in {tmp_path / 'checkpoint-4'}"
    with pytest.raises(KeyboardInterrupt, match=message):
        trainer.train()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert len(updates(tmp_path)) == 4 and find_checkpoints(tmp_path)[-1].name == "checkpoint-4"
    # the same trainer, and another one, go on to what an uninterrupted run reaches
    other = make_trainer(tmp_path / "other", save_steps=3)
    other.train()
    again = make_trainer(tmp_path, save_steps=3)
    again.train(resume_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=True)
    for resumed in (again, trainer):
        assert all(same_tensors(everything(resumed)[b], everything(other)[b]) for b in range(3))
    assert_same_run(tmp_path, tmp_path / "other")


def test_a_second_signal_interrupts_at_once(tmp_path):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal did nothing")

    with pytest.raises(KeyboardInterrupt, match="No checkpoint was whole yet"):
        make_trainer(tmp_path, callbacks=[At(i2=twice)]).train()
    assert find_checkpoints(tmp_path) == []


def test_a_second_signal_while_the_last_checkpoint_is_written_names_the_one_before(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, callbacks=[At(i5=lambda: signal.raise_signal(signal.SIGINT))], save_steps=3)
    write = trainer._save_checkpoint

    def write_or_stop() -> None:
        if trainer.iteration == 5:
            signal.raise_signal(signal.SIGINT)
        write()

    monkeypatch.setattr(trainer, "_save_checkpoint", write_or_stop)
    with pytest.raises(KeyboardInterrupt, match=rf"whole checkpoint is {tmp_path / 'checkpoint-3'}; the updates since"):
        trainer.train()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-3"]


@pytest.mark.parametrize("iteration", [1, 4, 8])
@pytest.mark.parametrize("settings", [{}, {"use_ema": False}, {"block_order": "sequential"}], ids=str)
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, iteration, settings):
    settings = {"lr_scheduler_type": "linear", "warmup_steps": 1, "gradient_accumulation_steps": 2} | settings
    stop_after(tmp_path / "a", iteration, **settings)
    resumed, whole = make_trainer(tmp_path / "a", **settings), make_trainer(tmp_path / "b", **settings)
    summary = resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{iteration}"))
    expected = whole.train()
    assert {k: v for k, v in summary.items() if k != "training_seconds"} == {
        k: v for k, v in expected.items() if k != "training_seconds"
    }
    assert all(same_tensors(everything(resumed)[b], everything(whole)[b]) for b in range(3))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_job_of_one_block_resumes_too(tmp_path):
    callback = At(i2=lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "a", tiny_dit(3, blocks=[1]), callbacks=[callback]).train()
    resumed, whole = (make_trainer(tmp_path / name, tiny_dit(3, blocks=[1])) for name in "ab")
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_the_starting_weights_of_a_resumed_run_do_not_matter(run_dir, tmp_path):
    resumed, whole = make_trainer(run_dir, tiny_dit(3, seed=99)), make_trainer(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert all(same_tensors(everything(resumed)[b], everything(whole)[b]) for b in range(3))


def test_what_only_changes_files_may_differ_when_a_run_is_resumed(run_dir, tmp_path):
    moved = shutil.move(run_dir, tmp_path / "elsewhere")
    resumed = make_trainer(moved, logging_steps=1, save_steps=4, save_total_limit=None, dataloader_num_workers=1)
    resumed.train(resume_from_checkpoint=True)
    make_trainer(tmp_path / "whole").train()
    assert_same_run(moved, tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is(tmp_path):
    make_trainer(tmp_path).train()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert make_trainer(tmp_path).train(resume_from_checkpoint=True)["iterations"] == 9
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_without_a_checkpoint_a_run_starts_from_the_beginning(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "updates.jsonl").write_text('{"iteration": 1, "block": 0, "loss": 5.0}\n{"iter')
    make_trainer(tmp_path / "a").train(resume_from_checkpoint=True)
    make_trainer(tmp_path / "b").train()
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_log_lines_after_the_checkpoint_and_half_lines_are_dropped(run_dir, tmp_path):
    with open(run_dir / "updates.jsonl", "a") as file:
        file.write('{"iteration": 6, "block": 0, "loss": 1.0}\n{"iteration": 7, "blo')
    make_trainer(run_dir).train(resume_from_checkpoint=True)
    make_trainer(tmp_path / "whole").train()
    assert_same_run(run_dir, tmp_path / "whole")


def test_a_checkpoint_is_a_model_that_loads(run_dir):
    trainer = make_trainer(run_dir)
    state = read_state(run_dir / "checkpoint-5")
    checkpoint_module.load_checkpoint(run_dir / "checkpoint-5", state, trainer.model, trainer.trainers)
    loaded = BlockedDiTModel.from_pretrained(run_dir / "checkpoint-5")
    assert same_tensors(loaded.state_dict(), on_cpu(trainer.model.state_dict()))
    assert sum(one.updates for one in trainer.trainers.values()) == 5
    names = {p.name for p in (run_dir / "checkpoint-5").iterdir()}
    assert {"ema-00.safetensors", "optimizer-02.pt", "trainer_state.json", "block-01.safetensors"} <= names


# -- half-written and broken checkpoints -------------------------------------------------------------------------


def test_checkpoints_are_ordered_by_their_iteration(run_dir):
    for iteration in (100, 9, 10):
        shutil.copytree(run_dir / "checkpoint-5", run_dir / f"checkpoint-{iteration}")
    assert [p.name for p in find_checkpoints(run_dir)] == [f"checkpoint-{i}" for i in (5, 9, 10, 100)]


def test_half_written_checkpoints_are_never_taken_up_and_are_cleaned_away(run_dir):
    shutil.copytree(run_dir / "checkpoint-5", run_dir / ".checkpoint-7.writing")
    shutil.copytree(run_dir / "checkpoint-5", run_dir / ".checkpoint-8.removed-123")
    shutil.copytree(run_dir / "checkpoint-5", run_dir / "checkpoint-99")
    (run_dir / "checkpoint-99" / "trainer_state.json").unlink()
    (run_dir / "checkpoint-x").mkdir()
    (run_dir / ".hidden").mkdir()
    assert [p.name for p in find_checkpoints(run_dir)] == ["checkpoint-5"]
    clean_staging(run_dir)
    assert sorted(p.name for p in run_dir.iterdir() if p.is_dir()) == [
        ".hidden",
        "checkpoint-5",
        "checkpoint-99",
        "checkpoint-x",
    ]


def checkpoint_files() -> list[str]:
    per_block = [f"{kind}-{b:02d}.{end}" for b in range(3) for kind, end in KINDS]
    return [*per_block, "shared.safetensors", "config.json", "model.safetensors.index.json", "trainer_state.json"]


KINDS = (("block", "safetensors"), ("ema", "safetensors"), ("optimizer", "pt"))


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("name", checkpoint_files())
def test_a_broken_file_of_a_checkpoint_is_named(run_dir, name, how):
    path = run_dir / "checkpoint-5" / name
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    trainer = make_trainer(run_dir)
    before = everything(trainer)
    block = name.split("-")[1][:2] if name[-3:] != "son" and "-" in name else None
    named = rf"{name} \(block {int(block)}\)" if block else name
    if name == "trainer_state.json" and how == "missing":
        assert find_checkpoints(run_dir) == []  # a directory without it is no checkpoint
    with pytest.raises(ValueError, match=rf"{named}") as caught:
        trainer.train(resume_from_checkpoint=run_dir / "checkpoint-5")
    assert str(run_dir / "checkpoint-5") in str(caught.value)
    assert all(same_tensors(everything(trainer)[key], before[key]) for key in before)  # nothing was loaded


def test_every_flipped_byte_of_the_counters_is_found(run_dir):
    path = run_dir / "checkpoint-5" / "trainer_state.json"
    content = path.read_bytes()
    flipped = 0
    for position in range(0, len(content), 41):
        for mask in (1, 0x80):
            changed = bytearray(content)
            changed[position] ^= mask
            path.write_bytes(changed)
            try:
                state = read_state(path.parent)
            except ValueError as error:
                flipped += 1
                assert "trainer_state.json" in str(error)
            else:  # white space, or a key that JSON reads twice: it must not matter
                path.write_bytes(content)
                assert state == read_state(path.parent)
    assert flipped > 2 * len(content) / 41 * 0.6


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"iteration": 3}', "\xff"])
def test_counters_that_are_no_json_object_are_named(run_dir, text):
    (run_dir / "checkpoint-5" / "trainer_state.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"trainer_state\.json is corrupted"):
        make_trainer(run_dir).train(resume_from_checkpoint=True)


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match=f"{path} is not a checkpoint: it has no trainer_state.json"):
            make_trainer(tmp_path / "run").train(resume_from_checkpoint=path)


def test_optimizer_files_are_never_unpickled_freely(run_dir, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    path = run_dir / "checkpoint-5" / "optimizer-01.pt"
    torch.save(Evil(), path)
    state = read_state_with_new_digest(run_dir / "checkpoint-5", path)
    trainer = make_trainer(run_dir)
    with pytest.raises(Exception, match="cannot be read: it is broken, or holds"):
        checkpoint_module.load_checkpoint(run_dir / "checkpoint-5", state, trainer.model, trainer.trainers)
    assert not (tmp_path / "evil").exists()


def read_state_with_new_digest(checkpoint: Path, changed: Path) -> dict[str, Any]:
    """The counters of a checkpoint in which someone replaced a file and its digest."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    state.pop("sha256")
    state["files"][changed.name] = checkpoint_module.serialization.sha256(changed)
    path.write_text(json.dumps(state | {"sha256": checkpoint_module._digest(state)}))
    return read_state(checkpoint)


# -- another run's checkpoint ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"learning_rate": 2e-3}, "its settings has learning_rate=0.001, this one learning_rate=0.002"),
        ({"max_steps": 4}, "its settings has max_steps=3, this one max_steps=4"),
        ({"seed": 1}, "its settings has seed=0, this one seed=1"),
        ({"per_device_train_batch_size": 8}, "per_device_train_batch_size=4, this one per_device_train_batch_size=8"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=1"),
        ({"block_order": "sequential"}, "block_order='random', this one block_order='sequential'"),
        ({"use_ema": False}, "use_ema=True, this one use_ema=False"),
        ({"ema_inv_gamma": 4.0}, "ema_inv_gamma=8.0"),
        ({"weight_decay": 0.1}, "weight_decay=0.0, this one weight_decay=0.1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=1.0"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type='constant_with_warmup'"),
        ({"warmup_steps": 1}, "warmup_steps=0"),
        ({"horizontal_flip": True}, "horizontal_flip=False"),
        ({"blocks": [0, 1]}, r"blocks=None, this one blocks=\[0, 1\]"),
    ],
    ids=str,
)
def test_other_settings_are_named(run_dir, settings, message):
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=rf"checkpoint-5 belongs to another run: .*{message}"):
        make_trainer(run_dir, **settings).train(resume_from_checkpoint=True)
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "model, message",
    [
        ({"num_blocks": 2}, r"its model has (edges|layers_per_block|num_blocks)="),
        ({"num_layers": 7}, "its model has base_config.num_layers=6,"),
        ({"partition": "uniform"}, "its model has edges="),
        ({"overlap": 0.1}, "its model has overlap=0.05, this one overlap=0.1"),
        ({"noise": {"p_mean": -1.0}}, "its model has (edges|noise)="),
        ({"sigma_data": 0.4}, "its model has sigma_data=0.5, this one sigma_data=0.4"),
        ({"label_dropout": 0.2}, "its model has label_dropout=0.1, this one label_dropout=0.2"),
        ({"layers_per_block": [1, 2, 3]}, "its model has layers_per_block="),
        (
            {"base_config": {"dropout": 0.1}},
            r"has base_config.dropout=0.0, this one base_config.dropout=0.1\.",
        ),
    ],
    ids=str,
)
def test_another_model_is_named(run_dir, model, message):
    with pytest.raises(ValueError, match=rf"checkpoint-5 belongs to another run: .*{message}"):
        make_trainer(run_dir, tiny_dit(**({"num_blocks": 3} | model))).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "data, message",
    [(TinyImages(63), "(num_samples|fingerprint)="), (TinyImages(64, seed=1), "fingerprint=")],
    ids=["size", "content"],
)
def test_other_data_are_named(run_dir, data, message):
    with pytest.raises(ValueError, match=rf"checkpoint-5 belongs to another run: its data set has {message}"):
        make_trainer(run_dir, dataset=data).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("column", ["pixel_values", "class_labels"])
def test_data_that_differ_in_the_middle_are_named(run_dir, column):
    data = TinyImages()
    getattr(data, column)[30] = 0
    with pytest.raises(ValueError, match="checkpoint-5 belongs to another run: its data set has fingerprint="):
        make_trainer(run_dir, dataset=data).train(resume_from_checkpoint=True)


def test_a_job_of_one_block_does_not_take_up_a_run_of_all(run_dir, tmp_path):
    with pytest.raises(ValueError, match=r"a run that trains blocks \[0, 1, 2\]; this one trains \[1\]"):
        make_trainer(run_dir, tiny_dit(3, blocks=[1])).train(resume_from_checkpoint=True)
    make_trainer(tmp_path / "one", tiny_dit(3, blocks=[1])).train()
    with pytest.raises(ValueError, match=r"a run that trains blocks \[1\]; this one trains \[0, 1, 2\]"):
        make_trainer(tmp_path / "one").train(resume_from_checkpoint=True)


# -- checkpoints that cannot be written --------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["safetensors", "optimizer", "rename"])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_what_to_do(tmp_path, monkeypatch, target):
    trainer = make_trainer(tmp_path, save_steps=3)
    written = checkpoint_module.write_checkpoint

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    def full_torch(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    def full_at_second(output_dir: Path, iteration: int, *args: Any) -> Path:
        with monkeypatch.context() as patch:
            if iteration == 6 and target == "safetensors":
                patch.setattr(checkpoint_module.serialization, "save_file", full)
            elif iteration == 6 and target == "optimizer":
                patch.setattr(checkpoint_module.torch, "save", full_torch)
            elif iteration == 6:
                patch.setattr(checkpoint_module, "remove_tree", full)
            return written(output_dir, iteration, *args)

    monkeypatch.setattr("hf_diffusionblocks.training.trainer.write_checkpoint", full_at_second)
    with pytest.raises(OSError, match=r"cannot write .*checkpoint-6: .*Earlier checkpoints are untouched"):
        trainer.train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3", "status.json", "updates.jsonl"]
    monkeypatch.undo()
    make_trainer(tmp_path, save_steps=3).train(resume_from_checkpoint=True)
    make_trainer(tmp_path / "whole", save_steps=3).train()
    assert_same_run(tmp_path, tmp_path / "whole")


def test_an_output_directory_that_is_a_file_is_an_error_before_any_work(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(OSError):
        DiffusionBlocksTrainer(tiny_dit(3), arguments(tmp_path / "run"), TinyImages()).train()
    assert (tmp_path / "run").read_text() == "mine"


def test_a_broken_newest_checkpoint_names_the_newest_whole_one(tmp_path):
    trainer = make_trainer(tmp_path, save_steps=3, save_total_limit=None)
    trainer.train()
    found = find_checkpoints(tmp_path)
    assert [path.name for path in found] == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    for broken in found[:0:-1]:
        (broken / "block-01.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"resume from the newest whole one before it, .*checkpoint-3\."):
        make_trainer(tmp_path, save_steps=3).train(resume_from_checkpoint=True)
    (found[0] / "block-01.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="checkpoint-9 and start anew: no older one is whole"):
        make_trainer(tmp_path, save_steps=3).train(resume_from_checkpoint=True)
