"""The command line on real input: plan, train, resume, sample, evaluate, convert, encode, and its error messages."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from PIL import Image

from hf_diffusionblocks import BlockedDiTPipeline
from hf_diffusionblocks.cli import main
from tiny import tiny_vae

SMALL = [
    "model.num_layers=3",
    "model.num_attention_heads=2",
    "model.attention_head_dim=8",
    "training.max_steps=6",
    "training.save_steps=9",
    "training.warmup_steps=2",
    "training.disable_tqdm=true",
    "sampling.num_inference_steps=3",
    "evaluation.num_samples=40",
    "evaluation.num_draws=1",
    "evaluation.classifier_epochs=1",
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", "digits-dit", *SMALL, "--output-dir", str(folder)]) == 0
    return folder


def test_train_ends_with_pictures_figures_and_a_model_that_loads(run_dir):
    for name in ("samples", "denoising", "partition", "memory", "losses"):
        with Image.open(run_dir / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 50
    figures = json.loads((run_dir / "figures" / "figures.json").read_text())
    assert {"held_out_loss", "class_agreement", "frechet_distance_digits-cnn", "classifier_accuracy"} <= set(figures)
    pipe = BlockedDiTPipeline.from_pretrained(run_dir / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe([0, 1, 2, 3], num_inference_steps=2).images[0].size == (8, 8)
    assert pipe.model.config.id2label[7] == "7"


def test_train_prints_the_lines_that_load_the_model_and_they_run(run_dir, capsys):
    assert main(["train", "digits-dit", *SMALL, "--output-dir", str(run_dir)]) == 0
    text = capsys.readouterr().out
    lines = text.split("load it:\n")[1].splitlines()[:3]
    namespace: dict = {}
    exec("\n".join(line.strip() for line in lines), namespace)  # what a reader would paste
    assert len(namespace["images"]) == 4


def test_a_finished_run_is_not_trained_again(run_dir, capsys):
    before = (run_dir / "updates.jsonl").read_text()
    card = (run_dir / "model" / "README.md").read_text()
    assert main(["train", "digits-dit", *SMALL, "--output-dir", str(run_dir), "--no-report"]) == 0
    said = capsys.readouterr().out
    assert "going on with" in said and "all 18 updates had been made before, in " in said
    assert (run_dir / "updates.jsonl").read_text() == before
    # Its model is the one that was scored: the card keeps the figures.
    again = (run_dir / "model" / "README.md").read_text()
    assert sorted(again.splitlines()) == sorted(card.splitlines()) and "| class agreement |" in again


def test_a_resumed_run_counts_its_own_updates_and_all_the_time(tmp_path, capsys):
    command = ["train", "digits-dit", *SMALL, "training.save_steps=5", "training.save_total_limit=9", "--no-report"]
    command += ["--output-dir", str(tmp_path)]
    assert main(command) == 0
    for late in (15, 18):
        shutil.rmtree(tmp_path / f"checkpoint-{late}")  # as if it had been killed at update 12
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["training_seconds"] > 0
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "figures.json").write_text('{"stale": 1.0}')
    capsys.readouterr()
    assert main(command) == 0
    said = re.search(
        r"trained 18 updates in ([0-9.]+) s, the last 8 since the run was resumed", capsys.readouterr().out
    )
    assert float(said[1]) >= round(state["training_seconds"], 1)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| training time |" in card and "stale" not in card


def test_other_settings_do_not_continue_a_run(run_dir, capsys):
    code = main(["train", "digits-dit", *SMALL, "training.learning_rate=1e-5", "--output-dir", str(run_dir)])
    assert code == 2
    error = capsys.readouterr().err
    assert "learning_rate" in error and "--overwrite" in error and "Traceback" not in error


def test_a_job_per_block_saves_that_block_only(tmp_path):
    assert main(["train", "digits-dit", *SMALL, "--block", "1", "--output-dir", str(tmp_path / "b1")]) == 0
    files = {p.name for p in (tmp_path / "b1" / "model").glob("block-*.safetensors")}
    assert files == {"block-01.safetensors"}


def test_one_block_trained_alone_equals_that_block_trained_with_the_others(run_dir, tmp_path):
    assert main(["train", "digits-dit", *SMALL, "--block", "2", "--output-dir", str(tmp_path / "b2")]) == 0
    name = "model/block-02.safetensors"
    assert (tmp_path / "b2" / name).read_bytes() == (run_dir / name).read_bytes()


@pytest.mark.parametrize("method", [["--method", "end_to_end"], ["--method", "shallow", "--match", "compute"]])
def test_the_same_command_trains_the_baselines(method, tmp_path):
    folder = tmp_path / "baseline"
    assert main(["train", "digits-dit", *SMALL, *method, "--no-report", "--output-dir", str(folder)]) == 0
    updates = len((folder / "updates.jsonl").read_text().splitlines())
    assert updates == (6 if "end_to_end" in method else 18)
    assert [p.name for p in (folder / "model").glob("block-*")] == ["block-00.safetensors"]


def test_sample_writes_one_png_per_label(run_dir, tmp_path):
    code = main(
        ["sample", str(run_dir / "model"), "--classes", "3", "7", "--per-class", "2", "--steps", "2"]
        + ["--output-dir", str(tmp_path)]
    )
    assert code == 0
    assert sorted(p.name for p in tmp_path.glob("0*.png")) == [
        "00000-class-3.png",
        "00001-class-3.png",
        "00002-class-7.png",
        "00003-class-7.png",
    ]


def test_evaluate_uses_the_recipe_beside_the_model(run_dir, tmp_path, capsys):
    assert main(["evaluate", str(run_dir / "model"), "--output", str(tmp_path / "f.json")]) == 0
    assert "class agreement" in capsys.readouterr().out
    first = json.loads((run_dir / "figures" / "figures.json").read_text())
    again = json.loads((tmp_path / "f.json").read_text())
    assert again["held_out_loss"] == pytest.approx(first["held_out_loss"], rel=1e-6)
    assert again["class_agreement"] == first["class_agreement"]


def test_plan_prints_every_method_and_json(capsys):
    assert main(["plan", "digits-dit"]) == 0
    text = capsys.readouterr().out
    assert "end to end" in text and "blocked" in text and "checkpointing" in text
    assert "Do blocks pay here? In the memory of one block, a network of 2 layers" in text
    assert main(["plan", "digits-dit", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["rows"] and "Train it instead" in plan["advice"] and plan["compute"]["small_model_layers"] == 2


def test_convert_a_saved_dit(tmp_path, capsys):
    torch.manual_seed(0)
    base = DiTTransformer2DModel(
        num_layers=4, num_attention_heads=2, attention_head_dim=8, sample_size=8, in_channels=1, num_embeds_ada_norm=10
    )
    base.save_pretrained(tmp_path / "dit")
    command = ["convert", str(tmp_path / "dit"), "--num-blocks", "2", "--output-dir", str(tmp_path / "out")]
    assert main(command) == 0
    pipe = BlockedDiTPipeline.from_pretrained(tmp_path / "out")
    assert pipe.model.config.layers_per_block == [2, 2]
    assert main(command) == 2
    assert "not empty" in capsys.readouterr().err


def test_encode_then_train_on_latents(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    latent = ["model.in_channels=4", "model.sample_size=8", f"sampling.vae={tmp_path / 'vae'}", "data.max_samples=24"]
    for split in ("train", "test"):
        command = ["encode", "digits-dit", *SMALL, *latent, "--split", split]
        assert main([*command, "--output-dir", str(tmp_path / "latents" / split)]) == 0
    data = [f"data.name={tmp_path / 'latents'}", "model.in_channels=4", "model.sample_size=8"]
    command = ["train", "digits-dit", *SMALL, *data, "--no-report", "--output-dir", str(tmp_path / "run")]
    assert main(command) == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "digit-dit"], ["digit-dit", "digits-dit"]),
        (["train", "digits-dit", "training.max_stesp=1"], ["max_stesp", "max_steps"]),
        (["train", "digits-dit", "blocks.num_blocks=9"], ["num_blocks=9", "6"]),
        (["train", "digits-dit", "--block", "5"], ["block 5", "0 to 2"]),
        (["train", "digits-dit", "data.name=no-such-set"], ["no-such-set"]),
        (["train", "digits-dit", "model.sample_size=16"], ["8", "16"]),
        (["train", "digits-dit", "model.num_embeds_ada_norm=5"], ["class_labels", "num_embeds_ada_norm=10"]),
        (["train", "digits-dit", "model.num_embeds_ada_norm=9"], ["10 classes", "num_embeds_ada_norm=10"]),
        (["train", "digits-dit", "data.name=digts"], ["digts", "did you mean 'digits'"]),
        (["sample", "nonono"], ["no directory nonono"]),
        (["evaluate", "runs/a/model", "--recipe", "digits-dit"], ["no directory runs/a/model"]),
        (["sample", "/no/such/model"], ["/no/such/model"]),
        (["evaluate", "/no/such/model"], ["no directory /no/such/model"]),
        (["convert", "/no/such/dit", "--output-dir", "x"], ["/no/such/dit"]),
    ],
)
def test_bad_input_ends_in_one_clear_line(command, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err.strip()
    assert all(word in error for word in words), error
    assert "Traceback" not in error


def test_help_teaches_at_every_level(capsys):
    commands = "plan train sample evaluate convert encode merge push recipes".split()
    for command in ([], *([name] for name in commands)):
        with pytest.raises(SystemExit) as exit_:
            main([*command, "--help"])
        assert exit_.value.code == 0
        text = capsys.readouterr().out
        assert "diffusionblocks" in text and (not command or f"examples:\n  diffusionblocks {command[0]}" in text)
        assert command or all(f"\n    {name} " in text for name in commands)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("merge", ["DIR", "--output-dir", "--wait SECONDS", "a job's run or the model that it saved"]),
        ("push", ["repo_id", "--block", "--revision", "--private", "--create-pr", "--dry-run", "HF_TOKEN"]),
    ],
)
def test_help_of_merge_and_push_names_what_they_take(command, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(word in text for word in words), text
