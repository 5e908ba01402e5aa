"""The commands on image classifiers, at a size of seconds."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from hf_diffusionblocks import BlockedForImageClassification
from hf_diffusionblocks.baselines.end_to_end import baseline_recipe
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.compute import training_flops
from hf_diffusionblocks.families.loading import blocked_config_of
from hf_diffusionblocks.recipes import load_recipe
from tiny_vit import base_vit

SMALL = [
    "model.hidden_size=16",
    "model.intermediate_size=24",
    "model.num_hidden_layers=3",
    "model.num_attention_heads=2",
    "model.patch_size=4",
    "training.max_steps=6",
    "training.warmup_steps=1",
    "training.save_steps=9",
    "training.disable_tqdm=true",
    "training.cpu=true",
]


def train(folder: Path, *options: str) -> int:
    return main(["train", "digits-vit", *SMALL, *options, "--output-dir", str(folder)])


PAPER = ["blocks.preset=paper", "evaluation.steps=[2]", "evaluation.draws=[1, 3]"]


@pytest.mark.parametrize("settings", [[], PAPER], ids=["default", "paper"])
def test_train_and_evaluate(settings, tmp_path, capsys):
    assert train(tmp_path / "run", *settings) == 0
    figures = json.loads((tmp_path / "run" / "figures" / "figures.json").read_text())
    assert {p.name for p in (tmp_path / "run" / "figures").glob("*.png")} >= {"losses.png", "memory.png"}
    assert 0 <= figures["accuracy"] <= 1 and 0 <= figures["calibration_error"] <= 1
    assert len(figures["local_nats_per_block"]) == 3 and figures["num_predictions"] == 360
    assert list(figures.get("accuracy_by_steps", {})) == (["2"] if settings else [])
    assert list(figures.get("calibration_error_by_draws", {})) == (["1", "3"] if settings else [])
    if settings:  # the single draw is how it predicts unless told otherwise
        assert figures["calibration_error_by_draws"]["1"] == figures["calibration_error"]
        assert figures["negative_log_likelihood_by_draws"]["3"] != figures["negative_log_likelihood"]
    capsys.readouterr()
    model = str(tmp_path / "run" / "model")
    assert main(["evaluate", model, "evaluation.steps=[]", "--output", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert "accuracy_by_steps" not in again and "accuracy by steps" not in capsys.readouterr().out
    assert again["accuracy"] == figures["accuracy"]
    assert again["negative_log_likelihood"] == pytest.approx(figures["negative_log_likelihood"], rel=1e-5)
    card = (Path(model) / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "cross-entropy of the label" in card
    Image.new("L", (8, 8), 100).save(tmp_path / "gray.png")
    answers = pipeline("image-classification", model=model, device="cpu")(str(tmp_path / "gray.png"))
    assert len(answers) == 5 and {answer["label"] for answer in answers} <= set("0123456789")
    assert main(["sample", model]) == 2
    assert "is a classifier, which draws no samples" in capsys.readouterr().err


def test_a_resumed_run_counts_what_it_made_and_keeps_known_figures(tmp_path, capsys):
    run = tmp_path / "run"
    card = run / "model" / "README.md"
    assert train(run, "evaluation.held_out_samples=8") == 0
    assert "trained 18 updates in" in capsys.readouterr().out
    measured = card.read_text()
    assert "| accuracy |" in measured
    assert train(run, "evaluation.held_out_samples=8", "--no-report") == 0
    said = capsys.readouterr().out
    assert "all 18 updates had been made before, in" in said
    assert card.read_text() == measured
    shutil.rmtree(run / "checkpoint-18")  # as if killed before its end
    assert train(run, "evaluation.held_out_samples=8", "--no-report") == 0
    assert ", the last 9 since the run was resumed" in capsys.readouterr().out


def test_jobs_of_one_block_each_make_the_model_of_one_process(tmp_path):
    assert train(tmp_path / "whole", "--no-report") == 0
    for block in range(3):
        lower = ["--lower", str(tmp_path / f"job{block - 1}" / "model")] if block else []
        assert train(tmp_path / f"job{block}", "--no-report", "--block", str(block), *lower) == 0
    whole = BlockedForImageClassification.from_pretrained(tmp_path / "whole" / "model").state_dict()
    last = BlockedForImageClassification.from_pretrained(tmp_path / "job2" / "model").state_dict()
    assert whole.keys() == last.keys() and all(torch.equal(value, last[name]) for name, value in whole.items())


def test_a_block_without_those_below_it_is_refused_in_the_words_of_the_command_line(tmp_path, capsys):
    assert train(tmp_path / "run", "--no-report", "--block", "1") == 2
    error = capsys.readouterr().err
    assert "have not been trained" in error and "--lower" in error


def test_jobs_of_independent_blocks_are_merged(tmp_path):
    paper = ["blocks.preset=paper", "--no-report"]
    assert train(tmp_path / "whole", *paper) == 0
    for block in range(3):
        assert train(tmp_path / f"job{block}", *paper, "--block", str(block)) == 0
    parts = [str(tmp_path / f"job{block}" / "model") for block in range(3)]
    assert main(["merge", *parts, "--output-dir", str(tmp_path / "merged")]) == 0
    whole = BlockedForImageClassification.from_pretrained(tmp_path / "whole" / "model").state_dict()
    merged = BlockedForImageClassification.from_pretrained(tmp_path / "merged").state_dict()
    assert whole.keys() == merged.keys() and all(torch.equal(value, merged[name]) for name, value in whole.items())


def test_plan_counts_memory_and_compute(capsys):
    assert main(["plan", "digits-vit", *SMALL, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["settings"]["model"] == "blocked_image_classification"
    assert plan["compute"]["compute_ratio"] > 1


def test_a_base_is_converted_and_planned_by_name(tmp_path, capsys):
    base = base_vit()
    base.save_pretrained(tmp_path / "base")
    blocked = str(tmp_path / "blocked")
    assert main(["convert", str(tmp_path / "base"), "--num-blocks", "2", "--output-dir", blocked]) == 0
    assert "no image processor could be loaded" in capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained(blocked)
    assert type(model) is BlockedForImageClassification and model.config.num_blocks == 2
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(model(x).logits, base(x).logits)
    assert blocked_config_of(str(tmp_path / "base"), 2).to_dict()["base_config"] == model.config.base_config
    assert main(["convert", blocked, "--output-dir", str(tmp_path / "twice")]) == 2
    assert "has been cut into blocks already" in capsys.readouterr().err


def test_baselines_of_equal_updates_and_of_equal_compute():
    recipe = load_recipe("digits-vit")
    whole = baseline_recipe(recipe, "end_to_end")
    assert whole.config().num_blocks == 1 and whole.config().num_layers == 6
    assert (whole.config().auxiliary_layers, whole.training["max_steps"]) == (0, recipe.training["max_steps"])
    small = baseline_recipe(recipe, "shallow", "compute")
    assert small.config().num_layers == 2
    ratio = training_flops(recipe.config()).flops / training_flops(small.config()).flops
    assert ratio > 3 and small.training["max_steps"] == round(ratio * recipe.training["max_steps"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model.num_labels=9"], ["10 classes", "model.num_labels=10"]),
        (["--match", "compute"], ["match=compute is for a baseline", "shallow"]),
        (["model.num_labls=9"], ["num_labls", "num_labels"]),
        (["model.image_size=16"], ["[batch, 1, 16, 16]"]),
        (["model.num_channels=3"], ["[batch, 3, 8, 8]"]),
        (["model.model_type=resnet"], ["resnet", "vit", "dinov2"]),
        (["blocks.readout=noisy"], ["noisy"]),
        (["sampling.num_draws=0"], ["sampling.num_draws=0"]),
        (["evaluation.steps=[0]"], ["evaluation.steps=[0]"]),
        (["evaluation.draws=[0]"], ["evaluation.draws=[0]"]),
        (["training.hidden_weight=1"], ["hidden_weight=1", "LabelPrediction"]),
    ],
)
def test_settings_that_do_not_fit_are_named(options, words, tmp_path, capsys):
    assert train(tmp_path / "run", "--no-report", *options) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
