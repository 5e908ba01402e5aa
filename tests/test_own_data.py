"""Data of one's own that are small, odd or broken: what is made of them, and what is said before a training begins."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_diffusionblocks.cli import main

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
