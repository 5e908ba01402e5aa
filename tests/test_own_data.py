"""Data of one's own that are small, odd or broken: what is made of them, and what is said before a training begins."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_diffusionblocks.cli import main
from hf_diffusionblocks.data import load_image_dataset
from hf_diffusionblocks.data.text_bytes import check_utf8, read_text
from hf_diffusionblocks.jobs import RUNS, dry_checks
from hf_diffusionblocks.jobs.text_pieces import load_data, make_tokenizer
from hf_diffusionblocks.recipes import load_recipe
from hf_diffusionblocks.recipes.own_data import recipe_for

SMALL_DIT = ["model.num_layers=3", "model.attention_head_dim=4", "sampling.num_inference_steps=3"]
FEW = ["training.max_steps=1", "training.warmup_steps=0", "training.per_device_train_batch_size=2"]


def write_images(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (12, 10, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_images_of_one_class_are_scored_without_a_classifier(tmp_path, capsys):
    data, run = write_images(tmp_path / "flat", 12), tmp_path / "run"
    assert main(["train", "--data", str(data), *SMALL_DIT, *FEW, "--output-dir", str(run)]) == 0
    said = capsys.readouterr().out
    assert "all images are of one class: they are scored without a classifier" in said.split("trained 3 updates")[0]
    assert (
        "in 1 class; held out" in said and (run / "report.html").is_file() and (run / "model" / "README.md").is_file()
    )
    figures = json.loads((run / "figures" / "figures.json").read_text())
    assert figures["held_out_loss"] > 0 and not [name for name in figures if "frechet" in name or "agree" in name]
    assert main(["evaluate", str(run / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["held_out_loss"] == pytest.approx(figures["held_out_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *(("Hwæt! ".encode(name), f"iconv -f {name} -t utf-8") for name in ("utf-16", "utf-32")),
        (b"\xfe\xff" + "Hwæt! ".encode("utf-16-be"), "iconv -f utf-16 -t utf-8"),
        ("Hwæt! ".encode("utf-16-le"), "is no text: the byte at position 1 is 0"),
        (bytes(40), "is no text: the byte at position 0 is 0"),
        (b"caf\xe9 au lait", "byte 0xe9 at position 3 .*iconv -f latin1"),
    ],
)
def test_what_is_no_text_in_utf8_is_told_apart_and_begins_no_sample(content, words, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    for read in (read_text, check_utf8):
        with pytest.raises(ValueError, match=words):
            read(path)
    assert not [setting for setting in recipe_for(str(path))[1] if "prompts" in setting]


def test_a_byte_0_is_found_far_into_a_large_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * ((1 << 20) + 5) + b"\0")
    for read in (read_text, check_utf8):
        with pytest.raises(ValueError, match=f"position {(1 << 20) + 5} is 0"):
            read(path)


TEXT = "the cat sat on the mat and the dog lay by the door. " * 20  # 1,040 characters


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (
            TEXT,
            [],
            r"the held-out part of \S+ \(split 'test'\) has 52 tokens, the whole text 1040 \(data.test_fraction=0.05",
        ),
        (
            TEXT,
            [],
            r"row of data.block_length=128. Give more text, a data.block_length of at most 52 or a larger data.test_f",
        ),
        (
            TEXT,
            ["data.test_fraction=0.95"],
            r"training part .* has 52 tokens.* of at most 52 or a smaller data.test_fraction",
        ),
        (
            "one line",
            [],
            r"training part .* \(split 'train'\) has 8 tokens, .*Give more text or a data.block_length of at",
        ),
        ("", [], "is empty"),
    ],
)
def test_text_of_less_than_a_row_says_which_part_and_what_to_set(text, overrides, words, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(text)
    recipe = load_recipe("austen-llama", [f"data.name={path}", "data.block_length=128", *overrides])
    with pytest.raises(ValueError, match=words):
        load_data(recipe, make_tokenizer(recipe))


def test_images_that_cannot_be_read_are_named_counted_and_to_be_removed(tmp_path):
    data = write_images(tmp_path / "data" / "cat", 6)
    (data / "1.png").write_bytes((data / "1.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"1.png\) cannot be read: .* Remove or replace it.$"):
        load_image_dataset(str(data.parent), image_size=8)
    for name in ("3.png", "5.png"):
        (data / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"Remove or replace it. Of the 4 images after it 2 cannot be read either.$"):
        load_image_dataset(str(data.parent), image_size=8)


def looked_at(place: Path, *settings: str, report: bool = True) -> list[str]:
    """What a dry run does with data, without its plan."""
    name, chosen = recipe_for(str(place))
    recipe = load_recipe(name, [*chosen, *settings])
    with torch.device("meta"):
        model = None if recipe.kind.has_text else recipe.kind.model_class(recipe.config())
    return dry_checks.check_data(RUNS[recipe.kind.job](recipe, report=report), model)


def test_a_dry_run_says_what_small_data_are(tmp_path, capsys):
    said = looked_at(write_images(tmp_path / "flat", 12), *SMALL_DIT)
    assert "images: 9, in 1 class; held out: 3" in said and "all images are of one class" in said[1]
    few = write_images(tmp_path / "few", 3)
    assert main(["train", "--data", str(few), *SMALL_DIT, "--dry-run", "--no-report"]) == 0
    shown = capsys.readouterr().out
    assert "warning: so few images leave none to hold out: scores are of the training images." in shown
    assert "images: 3, in 1 class; held out: none" in shown and "dry run: would train in runs/few" in shown


@pytest.mark.parametrize(("text", "words"), [(TEXT, "the held-out part"), ("one line", "the training part")])
def test_a_dry_run_refuses_text_that_the_run_refuses(text, words, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        looked_at(tmp_path / "a.txt")


def test_a_dry_run_refuses_images_that_the_run_refuses(tmp_path, monkeypatch):
    data = tmp_path / "data"
    for name in ("cat", "dog", "emu"):
        write_images(data / name, 1)
    with pytest.raises(ValueError, match="3 held-out images are too few to score"):
        looked_at(data, *SMALL_DIT)
    assert looked_at(data, *SMALL_DIT, report=False)
    with pytest.raises(ValueError, match="model.num_embeds_ada_norm"):
        looked_at(data, *SMALL_DIT, "model.num_embeds_ada_norm=2", report=False)
    (data / "emu" / "0.png").write_bytes(b"no image")
    for limit in (dry_checks.SMALL_IMAGES, 100):  # loaded; or too large for that, and the first of each class is opened
        monkeypatch.setattr(dry_checks, "SMALL_IMAGES", limit)
        with pytest.raises(ValueError, match=r"emu/0.png\)? cannot be read: .* Remove or replace it"):
            looked_at(data, *SMALL_DIT)


def test_images_of_one_class_are_held_out_if_there_are_five(tmp_path):
    assert "data.test_fraction=0.25" in recipe_for(str(write_images(tmp_path / "five", 5)))[1]
    assert "data.test_split=train" in recipe_for(str(write_images(tmp_path / "three", 3)))[1]
