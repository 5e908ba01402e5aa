"""A merged model goes on where its jobs ended: it keeps their recipe and has a card."""

import json
import shutil
from pathlib import Path

import pytest

from hf_diffusionblocks.cli import main
from hf_diffusionblocks.repository.pushing import RemoteModel, compose, read_local
from test_classification_commands import SMALL

FAST = [*SMALL, "training.max_steps=1", "evaluation.held_out_samples=8"]


def train(folder: Path, *options: str) -> None:
    assert main(["train", "digits-vit", *FAST, *options, "--output-dir", str(folder)]) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "vit"
    train(folder, "license=mit")
    return folder


def test_a_finished_run_merged_keeps_its_card_and_can_be_evaluated(run, tmp_path, capsys):
    model, merged = str(run / "model"), tmp_path / "m"
    assert main(["merge", model, model, "--output-dir", str(merged)]) == 0
    assert (merged / "README.md").read_text() == (run / "model" / "README.md").read_text()
    recipe = json.loads((run / "recipe.json").read_text())
    kept = json.loads((merged / "recipe.json").read_text())
    assert "output_dir" in recipe["training"]
    recipe["training"] = {k: v for k, v in recipe["training"].items() if k not in ("output_dir", "disable_tqdm")}
    assert kept == recipe
    assert main(["evaluate", str(merged)]) == 0
    assert "| accuracy |" in (merged / "README.md").read_text()
    sent = compose(read_local(merged), RemoteModel(), "me/vit")
    assert "recipe.json" not in sent  # it may name paths of this disk
    assert b"pipeline('image-classification', 'me/vit')" in sent["README.md"]
    assert main(["merge", str(merged), "--output-dir", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "recipe.json").read_text()) == kept
    assert (tmp_path / "again" / "README.md").read_text() == (merged / "README.md").read_text()


def test_merged_jobs_get_a_card_that_names_them_all_and_differing_recipes_are_said(tmp_path, capsys):
    for block in range(3):
        train(tmp_path / f"job-{block}", "blocks.preset=paper", "--no-report", "--block", str(block))
    parts = [str(tmp_path / f"job-{block}") for block in range(3)]
    assert main(["merge", *parts, "--output-dir", str(tmp_path / "merged")]) == 0
    assert "differ" not in capsys.readouterr().out
    card = (tmp_path / "merged" / "README.md").read_text()
    assert all(f"--block {block}`" in card for block in range(3)) and "None were measured." in card
    assert [line.split()[0] for line in card.splitlines() if line[:2] in ("0 ", "1 ", "2 ")] == ["0", "1", "2"]
    path = tmp_path / "job-1" / "recipe.json"
    path.write_text(path.read_text().replace('"max_steps": 1', '"max_steps": 2'))
    assert main(["merge", *parts, "--output-dir", str(tmp_path / "other")]) == 0
    assert "recipes of" in (said := capsys.readouterr().out) and "training['max_steps'] is 1 and 2" in said
    for part in parts:
        (Path(part) / "recipe.json").unlink()
    assert main(["merge", *parts, "--output-dir", str(tmp_path / "bare")]) == 0
    assert "no recipe lies beside the parts" in capsys.readouterr().out
    assert not (tmp_path / "bare" / "README.md").exists()


def test_a_broken_recipe_does_not_cost_the_merged_model(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "recipe.json").write_text("[]")
    assert main(["merge", str(tmp_path / "run"), "--output-dir", str(tmp_path / "m")]) == 0
    assert "the merged model gets no recipe" in capsys.readouterr().out
    assert (tmp_path / "m" / "config.json").is_file() and not (tmp_path / "m" / "recipe.json").exists()
