"""What people expect of a command: JSON for scripts, quiet and dry runs, completion, their own data by path."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hf_diffusionblocks
from hf_diffusionblocks.cli import build_parser, main
from hf_diffusionblocks.data import ImageDataset
from hf_diffusionblocks.recipes import load_recipe
from hf_diffusionblocks.recipes.own_data import recipe_for
from hf_diffusionblocks.units import human_bytes

TINY_TEXT = ["model.hidden_size=16", "model.intermediate_size=32", "data.block_length=16", "data.max_test_samples=8"]
FEW = ["training.max_steps=2", "training.warmup_steps=0", "training.per_device_train_batch_size=2"]


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "my: novel.txt"  # a name that YAML would read as a mapping
    path.write_text("the cat sat on the mat and the dog lay by the door. " * 200)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "emu"):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for i in range(8):
            image = Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8))
            image.save(tmp_path / "animals" / name / f"{i}.png")
    return tmp_path / "animals"


def test_text_of_ones_own_names_its_run_and_begins_its_samples(tmp_path):
    text = tmp_path / "Le Père Goriot.txt"
    text.write_text("Madame Vauquer, née de Conflans", encoding="utf-8")
    name, settings = recipe_for(str(text))
    assert name == "austen-llama" and "training.output_dir=runs/Le-P-re-Goriot" in settings
    recipe = load_recipe(name, settings)
    assert recipe.sampling.prompts == ["Madame Vauquer, née "]


def test_images_are_held_out_by_class():
    labels = torch.tensor([0] * 20 + [1] * 10 + [2] * 5 + [3] * 4)
    data = ImageDataset(torch.arange(39, dtype=torch.uint8).reshape(39, 1, 1, 1), labels)
    train, test = data.hold_out(0.1)
    assert test.labels.tolist() == [0, 0, 1, 2] and len(train) == 35 and train.num_classes == test.num_classes == 4
    assert sorted([*train.images.flatten().tolist(), *test.images.flatten().tolist()]) == list(range(39))
    with pytest.raises(ValueError, match="test_fraction=0.1 of 4 images"):
        ImageDataset(torch.zeros(4, 1, 1, 1), [0, 1, 2, 3]).hold_out(0.1)


def test_text_of_ones_own_is_trained_by_its_path(text_file, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["train", "--data", str(text_file), *TINY_TEXT, *FEW, "--output-dir", out, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)  # and nothing else
    assert result["output_dir"] == out and Path(result["model"], "config.json").is_file()
    assert result["figures"]["bits_per_character"] > 0
    report = Path(result["report"]).read_text()
    assert "bits per character" in report and "Sampled text" in report and "://" not in report.split("<main")[0]
    assert main(["evaluate", result["model"], "--json", "evaluation.rows=4"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_character"] > 0
    assert main(["sample", result["model"], "--prompt", "the ", "--max-new-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0].startswith("the ")


def test_an_image_folder_is_trained_by_its_path(folder, tmp_path, capsys):
    small = [
        "model.num_layers=3",
        "model.attention_head_dim=4",
        "evaluation.num_samples=6",
        "evaluation.classifier_epochs=1",
    ]
    small += ["sampling.num_inference_steps=3", "evaluation.held_out_samples=6"]
    assert main(["train", "--data", str(folder), *small, *FEW, "--output-dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "images: 18, in 3 classes; held out: 6" in said  # a quarter of the eight of each class
    assert "recipe folder-dit" in said and f"next: diffusionblocks sample {tmp_path / 'run' / 'model'}" in said
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["base_config"]["num_embeds_ada_norm"] == 3 and config["id2label"]["2"] == "emu"


def test_a_split_that_is_there_is_what_is_scored(folder):
    name, settings = recipe_for(str(folder))
    assert name == "folder-dit" and "data.test_fraction=0.25" in settings
    for kind in ("cat", "dog", "emu"):  # too few to hold any out
        for i in range(4, 8):
            (folder / kind / f"{i}.png").unlink()
    assert "data.test_split=train" in recipe_for(str(folder))[1]
    (folder / "train").mkdir()
    for kind in ("cat", "dog", "emu"):
        (folder / kind).rename(folder / "train" / kind)
    (folder / "test" / "cat").mkdir(parents=True)
    (folder / "train" / "cat" / "0.png").rename(folder / "test" / "cat" / "0.png")
    run = "training.output_dir=runs/animals"
    assert recipe_for(str(folder))[1] == [f'data.name="{folder}"', run, "model.num_embeds_ada_norm=3"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: None, "there is no such file or directory"),
        (lambda p: p.mkdir(), "holds 0 files"),
        (lambda p: (p.mkdir(), (p / "a.bin").write_bytes(b"x")), "holds 1 files, none of which"),
    ],
)
def test_data_that_is_none_ends_with_one_line(make, message, tmp_path, capsys):
    make(tmp_path / "data")
    assert main(["train", "--data", str(tmp_path / "data")]) == 2
    assert message in capsys.readouterr().err
    table = tmp_path / "rows.parquet"
    table.write_bytes(b"PAR1")
    assert main(["train", "--data", str(table)]) == 2
    assert "may hold images or text" in capsys.readouterr().err


def test_without_a_recipe_the_error_says_what_to_name(capsys):
    assert main(["plan"]) == 2
    assert "name a recipe, such as digits-dit" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(text_file, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "austen-llama", "--data", str(text_file), *TINY_TEXT, "--output-dir", str(out), "--dry-run"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert f"dry run: would train in {out}" in shown and not out.exists()
    lines = shown.splitlines()
    assert len(lines) <= 24 and all(len(line) <= 80 for line in lines if str(tmp_path) not in line)  # a screen
    words = re.search(r"beside it: diffusionblocks (plan .*)", shown).group(1)
    assert shlex.split(words) == ["plan", "austen-llama", "--data", str(text_file), *TINY_TEXT]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    whole = result["plan"]
    assert result["output_dir"] == str(out)
    assert whole["alternatives"] and whole["compute"] and whole["advice"]
    for row in whole["rows"]:  # the figures of the summary are those of the table
        if row["method"] in ("end to end", "blocked, all blocks in one process, checkpointing"):
            assert f"{human_bytes(row['total'])} ({row['ratio']:.2f})" in shown


@pytest.mark.parametrize(
    "words, message",
    [
        ("digits-vit --block 7", "block 7"),
        ("digits-vit --block -1", "block -1"),
        ("digits-vit --block 1", "have not been trained"),
        ("digits-vit --block 1 --lower nowhere/at/all", "there is no directory nowhere/at/all"),
        ("digits-dit --block 0 training.lower_outputs=disk", "is for a cascade"),
        ("digits-dit --method end_to_end --block 1", "block 1"),
        ("digits-dit --lower x", "the blocks of family 'dit' stand alone"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses_and_in_its_words(words, message, tmp_path, capsys):
    command = ["train", *words.split(), "--output-dir", str(tmp_path / "run")]
    errors = []
    for dry in ([], ["--dry-run"]):
        assert main([*command, *dry]) == 2
        errors.append(capsys.readouterr().err)
    assert errors[0] == errors[1] and message in errors[0] and not (tmp_path / "run").exists()


def test_quiet_prints_nothing_wherever_it_stands(capsys):
    for words in (["-q", "recipes"], ["recipes", "--quiet"]):
        assert main(words) == 0
        assert capsys.readouterr().out == ""
    assert main(["-q", "plan", "no-such-recipe"]) == 2
    assert "no-such-recipe" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_shells_can_complete_it(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "diffusionblocks" in script and "residency" in script


def test_versions_are_told_without_importing_what_they_are_of():
    code = "import runpy, sys\nsys.argv = ['diffusionblocks', '--version']\n"
    code += "try: runpy.run_module('hf_diffusionblocks', run_name='__main__')\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, below, loaded = done.stdout.splitlines()
    assert ours == f"hf-diffusionblocks {hf_diffusionblocks.__version__}" and done.stderr == ""
    for name in ("torch", "transformers", "diffusers"):
        assert f"{name} {metadata.version(name)}" in below and name not in loaded.split()
    assert f"Python {platform.python_version()}" in below


def test_every_command_has_examples_and_json():
    commands = next(a for a in build_parser()._actions if a.dest == "command").choices
    for name, parser in commands.items():
        assert "examples:" in parser.format_help(), name
        assert "--json" in parser.format_help() or name in ("completion", "demo", "watch"), name


def test_a_closed_pipe_is_no_error():
    code = "import sys; from hf_diffusionblocks.cli import main; sys.exit(main(['recipes', '--path', 'list']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0 and done.stderr == ""
