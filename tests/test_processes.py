"""Several processes: blocks of their own, groups per block, shards within a group; kills, signals, the launcher."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import processes
from hf_diffusionblocks import BlockedDiTModel, DiffusionBlocksTrainingArguments
from hf_diffusionblocks.recipes import recipe_path
from hf_diffusionblocks.training.parallel import share_out, shares
from runs import updates
from tiny import tiny_dit_config
from tiny_text import new_lm

ROOT = Path(__file__).resolve().parent.parent


def weights(model: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in sorted(model.glob("*.safetensors")) for key, value in load_file(path).items()}


def assert_equal(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and first
    assert all(torch.equal(first[key], second[key]) for key in first)


def assert_near(a: Path, b: Path) -> None:
    """Sums in another order: a few units in the last place, after a few updates."""
    torch.testing.assert_close(weights(a), weights(b), rtol=2e-4, atol=2e-6)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """All that two processes do when nothing goes wrong, and what they do when one of them is stopped."""
    folder = tmp_path_factory.mktemp("two")
    sharded = ("fsdp-dit", "fsdp-lm", "fsdp-streams")
    whole = ("dit", "lm", "data", "residency", "accumulating", "released", "unclipped")
    processes.launch(folder, 2, *whole, *sharded, "stopped", "resumed", "bad")
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory, two) -> Path:
    folder = tmp_path_factory.mktemp("three")
    shutil.copytree(two / "dit", folder / "dit")
    processes.launch(folder, 3, "two-blocks", "other-number")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The same runs in one process; ``-2`` and ``-4`` accumulate as many forward passes per update."""
    folder = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have: more threads sum in another order
    for name, kind, settings in (
        ("dit", "dit", {}),
        ("dit-2", "dit", {"gradient_accumulation_steps": 2}),
        ("dit-4", "dit", {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}),
        ("lm-2", "lm", {"gradient_accumulation_steps": 2}),
        ("streams-2", "streams", {"gradient_accumulation_steps": 2}),
        ("two", "dit", {"num_blocks": 2}),
        ("two-2", "dit", {"num_blocks": 2, "gradient_accumulation_steps": 2}),
    ):
        processes.train(folder / name, kind, **settings)
    torch.set_num_threads(threads)
    return folder


# -- who trains what ----------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 40))
def test_every_block_and_every_process_has_its_place(num_blocks, num_processes):
    found = share_out(range(num_blocks), num_processes)
    assert sorted(b for share in found for b in share.blocks) == list(range(num_blocks))
    assert sorted(r for share in found for r in share.ranks) == list(range(num_processes))
    for sizes in ([len(s.blocks) for s in found], [len(s.ranks) for s in found]):
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    assert all(len(s.blocks) == 1 or len(s.ranks) == 1 for s in found)


def test_a_cascade_is_trained_by_all_processes_together():
    config, args = new_lm().config, DiffusionBlocksTrainingArguments()
    assert [(s.blocks, s.ranks) for s in shares(config, args, 4)] == [((0, 1, 2), (0, 1, 2, 3))]
    args.parallelism = "blocks"
    with pytest.raises(ValueError, match=r"parallelism='blocks' is for independent blocks.*parallelism='data'"):
        shares(config, args, 4)


def test_independent_blocks_can_be_trained_by_all_processes_together():
    args = DiffusionBlocksTrainingArguments(parallelism="data", blocks=[2, 1])
    assert [(s.blocks, s.ranks) for s in shares(tiny_dit_config(), args, 2)] == [((1, 2), (0, 1))]
    with pytest.raises(ValueError, match="parallelism 'rows'"):
        DiffusionBlocksTrainingArguments(parallelism="rows")


# -- what comes out -----------------------------------------------------------------------------------------------


def test_processes_with_blocks_of_their_own_make_the_model_of_one_process(two, alone):
    assert_equal(two / "dit" / "model", alone / "dit" / "model")
    BlockedDiTModel.from_pretrained(two / "dit" / "model")
    assert sorted(p.name for p in (two / "dit").glob("blocks-*")) == ["blocks-00-02", "blocks-01"]
    assert not (two / "dit" / "blocks-01" / "model" / "block-00.safetensors").exists()


def test_a_group_of_processes_is_one_process_that_accumulates(two, alone):
    assert_near(two / "data" / "model", alone / "dit-2" / "model")
    assert_near(two / "lm" / "model", alone / "lm-2" / "model")
    assert_near(two / "accumulating" / "model", alone / "dit-4" / "model")
    mine, theirs = updates(two / "data"), updates(alone / "dit-2")
    assert len(mine) == len(theirs) == 3 * processes.STEPS  # one process of a group writes
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(*(torch.tensor([u[name] for u in rows]) for rows in (mine, theirs)))


def test_more_processes_than_blocks(three, alone):
    """Block 0 has two of the three, block 1 the third."""
    merged = weights(three / "two-blocks" / "model")
    one, accumulated = weights(alone / "two" / "model"), weights(alone / "two-2" / "model")
    for key in merged:
        if key.startswith("blocks.1."):
            assert torch.equal(merged[key], one[key]), key
        else:
            torch.testing.assert_close(merged[key], accumulated[key], rtol=2e-4, atol=2e-6)


def test_residency_changes_nothing_in_a_group(two):
    assert_equal(two / "residency" / "model", two / "data" / "model")


def test_gradients_are_averaged_before_they_are_released(two):
    assert_equal(two / "released" / "model", two / "unclipped" / "model")


@pytest.mark.parametrize(("name", "same"), [("fsdp-dit", "dit-2"), ("fsdp-lm", "lm-2"), ("fsdp-streams", "streams-2")])
def test_shards_give_the_same_model_and_hold_a_part_of_it(two, alone, name, same):
    assert_near(two / name / "model", alone / same / "model")
    notes = [json.loads((two / name / f"shards-{rank}.json").read_text()) for rank in range(2)]
    assert all(note["here"] == note["whole"] / 2 for note in notes)
    assert all(note["moments_here"] < note["moments"] for note in notes)


def test_a_sharded_checkpoint_holds_whole_tensors(two, alone):
    for name, same in (("fsdp-dit", "dit-2"), ("fsdp-lm", "lm-2")):
        folders = [next(iter(sorted(f.glob("checkpoint-*")))) for f in (two / name, alone / same)]
        assert folders[0].name == folders[1].name
        a, b = (torch.load(folder / "optimizer-00.pt", weights_only=True) for folder in folders)
        shapes = [sorted(tuple(v.shape) for s in o["state"].values() for v in s.values()) for o in (a, b)]
        assert shapes[0] == shapes[1]
        for file in ("ema-00.safetensors", "block-00.safetensors"):
            mine, theirs = (load_file(folder / file) for folder in folders)
            torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-6)


# -- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_signal_to_one_process_stops_all_after_the_same_update_and_they_go_on(two):
    said = [(two / "stopped" / f"stopped-{rank}.txt").read_text() for rank in range(2)]
    assert "another process after 5 updates" in said[0] and "SIGTERM after 5 updates" in said[1]
    assert_equal(two / "stopped" / "model", two / "data" / "model")


def test_a_bad_row_of_one_process_ends_all(two):
    said = sorted((two / "bad" / f"bad-{rank}.txt").read_text() for rank in range(2))
    assert re.search(r"non-finite pixel_values: rows 7 of", said[0]) and "another process" in said[1]


def test_a_killed_process_leaves_the_others_alone_and_the_same_command_goes_on(tmp_path, alone):
    first, second = processes.start(tmp_path, 2, "killed")
    outputs = [p.communicate(timeout=200)[0] for p in (first, second)]
    assert second.returncode == -9 and first.returncode == 0, outputs
    folder = tmp_path / "killed"
    assert (folder / "blocks-00-02" / "model").is_dir() and not (folder / "model").exists()
    merge = [
        sys.executable,
        "-m",
        "hf_diffusionblocks",
        "merge",
        str(folder / "blocks-00-02"),
        str(folder / "blocks-01"),
    ]
    refused = subprocess.run([*merge, "--output-dir", str(tmp_path / "m")], capture_output=True, text=True)
    assert refused.returncode == 2 and "blocks-01 holds no saved model" in refused.stderr
    assert (folder / "blocks-01" / "checkpoint-3").is_dir()
    processes.launch(tmp_path, 2, "killed")
    assert_equal(folder / "model", alone / "dit" / "model")


def test_another_number_of_processes_cannot_go_on(three):
    for rank in (0, 2):
        said = (three / f"other-number-{rank}.txt").read_text()
        assert "an earlier run had another number of processes" in said


# -- the launchers ------------------------------------------------------------------------------------------------

SHORT = [
    "training.max_steps=3",
    "sampling.num_inference_steps=3",
    "evaluation.num_samples=20",
    "evaluation.classifier_epochs=1",
    "evaluation.num_draws=1",
]


def shell(*command: str, **variables: str) -> str:
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"} | variables
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.slow  # a minute or two; the tests below launch groups by torchrun's variables, as Accelerate does
def test_accelerate_launches_a_process_per_block_by_the_config_that_comes_with_the_package(tmp_path):
    config, output = recipe_path("accelerate/blocks.yaml"), tmp_path / "run"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    said = shell(*launcher, "-m", "hf_diffusionblocks", "train", "digits-dit", *SHORT, "--output-dir", str(output))
    assert sorted(p.name for p in output.glob("blocks-*")) == ["blocks-00", "blocks-01", "blocks-02"]
    assert BlockedDiTModel.from_pretrained(output / "model").resident_blocks == (0, 1, 2)
    figures = json.loads((output / "figures" / "figures.json").read_text())
    assert figures["updates_per_block"] == {"0": 3, "1": 3, "2": 3} and figures["num_samples"] == 20
    assert said.count("all blocks are trained; merged in") == said.count(f"report: {output / 'report.html'}") == 1
    assert said.count("not merged yet") + said.count("another process merged") == 2
    assert {row["block"] for row in updates(output)} == {0, 1, 2}


def test_every_config_of_accelerate_is_one():
    for name in (n for n in recipe_path("list").split() if n.startswith("accelerate/")):
        config = load_config_from_file(recipe_path(name))
        assert config.num_processes >= 2 and config.main_training_function == "main"
        assert (config.distributed_type.value, config.fsdp_config.get("fsdp_version")) in (
            ("MULTI_GPU", None),
            ("FSDP", 2),
        )


@pytest.mark.slow
def test_the_script_of_jobs_trains_and_merges_and_goes_on(tmp_path):
    script = ["sh", recipe_path("scripts/jobs.sh"), "digits-dit", "2", str(tmp_path / "run")]
    settings = ["blocks.num_blocks=2", "training.max_steps=3", "--no-report"]
    said = shell(*script, *settings, PYTHON=sys.executable)
    assert "merged in" in said
    whole = weights(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "block-1" / "model")
    shell(*script, *settings, PYTHON=sys.executable)
    again = weights(tmp_path / "run" / "model")
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_the_scripts_are_shell():
    for name in (n for n in recipe_path("list").split() if n.startswith("scripts/")):
        shell("bash", "-n", recipe_path(name))
    with pytest.raises(ValueError, match=r"unknown file 'accelerate/block.yaml'.*accelerate/blocks.yaml"):
        recipe_path("accelerate/block.yaml")
