"""Data of one's own that are small, odd or broken: what is made of them, and what is said before a training begins."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_diffusionblocks.cli import main
from hf_diffusionblocks.data.text_bytes import check_utf8, read_text
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
