"""Image folders named by a recipe: what it takes for granted, and what a folder may look like."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_diffusionblocks.cli import main
from hf_diffusionblocks.data import ImageDataset
from hf_diffusionblocks.jobs import load_data
from hf_diffusionblocks.recipes import load_recipe

RGB = "model.in_channels=3"


def picture(seed: int, size: tuple[int, int] = (32, 32), grey: bool = False) -> np.ndarray:
    """Random pixels [height, width(, 3)]."""
    shape = size if grey else (*size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(file: Path, pixels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


@pytest.fixture
def folder(tmp_path):
    """Makes an image folder of 3 PNGs per split and class."""

    def make(splits=("train", "test"), classes=("cat", "dog"), **settings) -> Path:
        root = tmp_path / "pictures"
        for split in splits:
            for name in classes:
                for i in range(3):
                    write(root / split / name / f"{i}.png", picture(i, **settings))
        return root

    return make


def load(root: Path, *overrides: str) -> tuple[ImageDataset, ImageDataset]:
    """Both splits, as `diffusionblocks train digits-dit data.name=root model.sample_size=32` loads them."""
    return load_data(load_recipe("digits-dit", [f"data.name={root}", "model.sample_size=32", *overrides]))


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


# Channels and size are the model's


def test_rgb_images_of_the_model_s_size_are_read_exactly(folder):
    train, test = load(folder(), RGB)
    assert train.images.shape == test.images.shape == (6, 3, 32, 32) and train.class_names == ["cat", "dog"]
    for i in range(3):
        assert torch.equal(train.images[i], tensor(picture(i)))
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_model_of_one_channel_gets_coloured_images_in_grey(folder):
    train, _ = load(folder())
    assert train.images.shape == (6, 1, 32, 32)
    luminance = np.array(Image.fromarray(picture(0)).convert("L"))
    assert torch.equal(train.images[0], tensor(luminance))
    assert load(folder(), "data.channels=3")[0].channels == 3  # and then the trainer says that they do not fit


def test_grey_images_are_read_in_grey_or_repeated(folder):
    root = folder(grey=True)
    grey, repeated = load(root)[0], load(root, RGB)[0]
    assert torch.equal(grey.images[1], tensor(picture(1, grey=True)))
    assert repeated.channels == 3 and all(torch.equal(repeated.images[:, c], grey.images[:, 0]) for c in range(3))


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (20, 20)])
def test_images_of_other_sizes_are_cropped_and_resized_with_antialiasing(folder, size):
    train, _ = load(folder(size=size), RGB)
    side = min(size)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    square = picture(0, size)[top : top + side, left : left + side]
    theirs = Image.fromarray(square).resize((32, 32), Image.Resampling.BICUBIC)  # PIL antialiases
    assert (train.images[0].int() - tensor(np.array(theirs)).int()).abs().max() <= 1
    if side == 64:  # the probe: without antialiasing it is another image
        wide = tensor(square)[None].float()
        plain = torch.nn.functional.interpolate(wide, size=(32, 32), mode="bicubic", antialias=False)
        assert (plain[0] - tensor(np.array(theirs))).abs().mean() > 10
    assert load(folder(size=size), RGB, "data.image_size=16")[0].image_size == 16


# Splits


@pytest.mark.parametrize("splits", [("train",), ("",)], ids=["only train", "no folders of splits"])
def test_a_missing_test_split_is_named_with_what_to_do(folder, splits, tmp_path, capsys):
    root = folder(splits=splits)
    given = [f"data.name={root}", "model.sample_size=32", RGB, "--output-dir", str(tmp_path / "run")]
    assert main(["train", "digits-dit", *given]) == 2
    said = capsys.readouterr().err
    for words in ("no split 'test'", "data.test_split=test", "data.test_files=", "data.test_split=train"):
        assert words in said, said
    train, test = load(root, RGB, "data.test_split=train")
    assert train.fingerprint == test.fingerprint


def test_files_may_be_named_for_each_split(folder):
    root = folder(splits=("mine", "held-out"))
    files = ["data.train_files=mine/*/*.png", "data.test_files=held-out/*/*.png"]
    train, test = load(root, RGB, *files)
    assert len(train) == len(test) == 6 and train.class_names == test.class_names
    shutil.rmtree(root / "held-out" / "cat")  # dog would be class 0
    with pytest.raises(ValueError, match="classes of data.test_split=test are dog, those of .* cat, dog: the same lab"):
        load(root, RGB, *files)


def test_a_test_split_without_images_of_a_class_keeps_the_numbers_of_the_classes(folder):
    root = folder()
    shutil.rmtree(root / "test" / "cat")
    assert load(root, RGB)[1].labels.tolist() == [1, 1, 1]


# Classes


@pytest.mark.parametrize("splits", [("train", "test"), ("",)])
def test_a_folder_of_one_class_has_one_class(folder, splits):
    overrides = [RGB] if len(splits) > 1 else [RGB, "data.test_split=train"]
    train, test = load(folder(splits=splits, classes=("cat",)), *overrides)
    assert train.class_names == test.class_names == ["cat"] and train.labels.tolist() == [0, 0, 0]


def test_one_class_can_be_trained_and_sampled(folder, tmp_path):
    small = ["model.num_layers=3", "model.num_attention_heads=2", "model.attention_head_dim=8", "model.patch_size=8"]
    settings = ["model.sample_size=32", RGB, "model.num_embeds_ada_norm=1", "training.max_steps=2", *small]
    command = ["train", "digits-dit", f"data.name={folder(classes=('cat',))}", *settings, "training.warmup_steps=1"]
    run = tmp_path / "run"
    assert main([*command, "training.disable_tqdm=true", "--no-report", "--output-dir", str(run)]) == 0
    assert main(["sample", str(run / "model"), "--steps", "2", "--output-dir", str(tmp_path / "png")]) == 0
    with Image.open(tmp_path / "png" / "00000-class-0.png") as image:
        assert image.size == (32, 32) and image.mode == "RGB"


def test_splits_are_never_taken_for_classes(folder):
    with pytest.raises(ValueError, match="lie in test, train themselves, which are no classes: give each class a fold"):
        load(folder(classes=("",)), RGB)


def test_classes_at_different_depths_are_an_error(folder):
    root = folder()
    write(root / "train" / "dog" / "more" / "9.png", picture(9))
    with pytest.raises(ValueError, match="lie at different depths, in cat, dog, more: give each class a folder"):
        load(root, RGB)


# Other files


def test_other_files_are_left_aside(folder):
    root = folder()
    for name in ("Thumbs.db", "notes.md", "train/.DS_Store", "train/cat/0.json"):
        (root / name).write_text("{}")
    assert len(load(root, RGB)[0]) == 6


@pytest.mark.parametrize("splits", [("train",), ("train", "test")], ids=["one split", "both splits"])
def test_a_folder_with_more_texts_than_images_is_still_one_of_images(folder, splits):
    root = folder()
    for split in splits:
        for i in range(20):
            (root / split / "cat" / f"{i}.txt").write_text("a caption")
    train, test = load(root, RGB)
    assert (len(train), len(test), train.class_names) == (6, 6, ["cat", "dog"])


def test_what_is_no_image_is_named(folder):
    root = folder()
    (root / "train" / "cat" / "9.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="image of row 3 .*cat/9.png. cannot be read"):
        load(root, RGB)
    shutil.rmtree(root)
    root.mkdir()
    with pytest.raises(ValueError, match="pictures .split 'train'. cannot be read by `datasets`: .* any data files"):
        load(root, RGB)
    (root / "words.txt").write_text("no images here")
    with pytest.raises(ValueError, match="no image column among the columns text"):
        load(root, RGB)
