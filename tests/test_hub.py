"""The model card parses, and says what the config and the figures say."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard

from hf_diffusionblocks.cli import main
from hf_diffusionblocks.hub import model_card, write_model_card
from hf_diffusionblocks.hub.card_texts import intended_use, with_article
from hf_diffusionblocks.recipes import load_recipe
from hf_diffusionblocks.recipes.families import FAMILIES
from hf_diffusionblocks.repository.block_table import name_repository
from hf_diffusionblocks.training import run_record
from hf_diffusionblocks.training.run_record import hardware, read_record, record_run
from tiny import tiny_dit
from tiny_text import blocked_lm


def test_card_round_trips_with_metadata_and_figures(tmp_path):
    model = tiny_dit(num_blocks=3)
    card = model_card(
        model,
        title="tiny",
        usage="from hf_diffusionblocks import BlockedDiTModel",
        training={"learning_rate": 1e-3, "max_steps": 5},
        figures={"held_out_loss": 0.25, "updates_per_block": {0: 5}},
        dataset="uoft-cs/cifar10",
    )
    path = write_model_card(tmp_path, card)
    loaded = ModelCard.load(path)
    assert loaded.data.to_dict()["library_name"] == "hf-diffusionblocks"
    assert loaded.data.datasets == ["uoft-cs/cifar10"]
    assert loaded.data.eval_results[0].metric_value == 0.25
    assert [r.metric_type for r in loaded.data.eval_results] == ["held_out_loss"]
    text = path.read_text()
    for edge in model.partition.edges:
        assert f"{edge:.6g}" in text
    assert "held out loss | 0.25" in text and "learning rate | 0.001" in text
    assert not list(tmp_path.glob(".*"))


def test_card_without_figures_says_so(tmp_path):
    card = model_card(tiny_dit(num_blocks=1), title="tiny", usage="pass")
    assert "None were measured." in str(card)
    assert card.data.eval_results is None


def test_card_of_a_language_model_says_how_its_blocks_were_trained():
    text = str(model_card(blocked_lm(), title="tiny", usage="pass", pipeline_tag="text-generation"))
    assert "next token" in text and "auxiliary layer" in text and "Readout: clean. Context: cascade." in text
    assert "score matching" not in text
    independent = model_card(blocked_lm(preset="paper"), title="tiny", usage="pass", base_model="user/base")
    assert "user/base cut into 3 blocks" in str(independent) and "its own range of noise levels" in str(independent)
    assert independent.data.base_model == "user/base"


MADE = {
    "command": "`diffusionblocks train digits-dit`",
    "hardware": "AMD EPYC, 2 cores, 1 thread",
    "date": "2026-11-27",
}


def test_a_card_says_how_it_was_made_and_leaves_out_what_says_nothing_of_the_model():
    figures = {"class_agreement": 0.5, "sampling_seconds": 2.5, "training_seconds": 125.0, "updates_per_block": {0: 5}}
    figures |= {
        "held_out_loss": 0.25,
        "held_out_loss_standard_error": 0.01,
        "kernel_distance_x_std": 0.1,
        "error": None,
    }
    model = tiny_dit(num_blocks=3)
    card = model_card(model, title="tiny", usage="pass", figures=figures, made=MADE, license="apache-2.0")
    text = str(card)
    made = text.split("## Made with")[1].split("## Figures")[0]
    for row in (*(f"| {name} | {value} |" for name, value in MADE.items()), "| training time | 2 min 5 s |"):
        assert row in made
    assert "| license | apache-2.0 |" in made and card.data.license == "apache-2.0"
    shown = text.split("## Figures")[1]
    assert "class agreement | 0.5" in shown and "held out loss standard error | 0.01" in shown
    assert not any(word in shown for word in ("seconds", "updates per block", "None"))
    assert [r.metric_type for r in card.data.eval_results] == ["class_agreement", "held_out_loss"]
    plain = model_card(model, title="tiny", usage="pass")
    assert plain.data.license is None and "license" not in str(plain) and "Not recorded." in str(plain)


@pytest.mark.parametrize("kind", [kind.model_class for kind in FAMILIES.values()], ids=list(FAMILIES))
def test_every_family_has_two_sentences_on_use_and_limits(kind):
    assert (
        intended_use(SimpleNamespace(config=SimpleNamespace(model_type=kind.config_class.model_type))).count(". ") == 1
    )


@pytest.mark.filterwarnings("ignore:the covariance of 20 samples")
def test_the_card_of_a_run_is_made_anew_from_its_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["training.max_steps=1", "evaluation.num_samples=20", "evaluation.classifier_epochs=1", "model.num_layers=3"]
    few += ["evaluation.num_draws=1", "model.attention_head_dim=4", "sampling.num_inference_steps=2"]
    assert main(["train", "digits-dit", *few, "license=mit", "--output-dir", "run", "--method", "end_to_end"]) == 0
    written = Path("run/model/README.md").read_text()
    assert f"| command | `diffusionblocks train digits-dit {' '.join(few)} license=mit method=end_to_end` |" in written
    assert f"| hardware | {hardware(torch.device('cpu'))} |" in written and "| license | mit |" in written
    Path("run/model/README.md").unlink()
    assert main(["card", "run", "--json"]) == 0
    assert Path("run/model/README.md").read_text() == written
    recipe = json.loads(Path("run/recipe.json").read_text())
    Path("run/recipe.json").write_text(json.dumps(recipe | {"license": None}))
    assert main(["card", "run", "--output", "a.md"]) == 0
    assert Path("a.md").read_text() == written.replace("license: mit\n", "").replace("| license | mit |\n", "")
    capsys.readouterr()
    for words, said in (
        (["card", "nowhere"], "nowhere holds no finished run"),
        (["card", "run", "--output", "a"], ".md"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"license=3 must be the Hub's identifier of a licence"):
        load_recipe("digits-dit", ["license=3"])


def test_a_run_that_went_on_elsewhere_names_both_machines(tmp_path, monkeypatch):
    job = tmp_path / "blocks-01"
    job.mkdir()
    monkeypatch.setattr(run_record, "_processor", lambda: "one")
    record_run(tmp_path, torch.device("cpu"), "diffusionblocks train x")
    record_run(tmp_path, torch.device("cpu"), None, resumed=True)
    monkeypatch.setattr(run_record, "_processor", lambda: "two")
    record_run(tmp_path, torch.device("cpu"), None, resumed=True)
    record_run(job, torch.device("cpu"), "diffusionblocks train x --block 1")
    made = read_record(tmp_path)
    assert made["command"] == "`diffusionblocks train x`, `diffusionblocks train x --block 1`"
    assert [words.split(",")[0] for words in made["hardware"].split("; ")] == ["one", "two"]
    assert f"torch {torch.__version__}" in made["versions"]
    record_run(tmp_path, torch.device("cpu"), "anew")  # nothing of the run before it
    assert read_record(tmp_path)["command"].startswith("`anew`") and "one" not in read_record(tmp_path)["hardware"]
    (tmp_path / "run.json").write_text("[")
    assert read_record(tmp_path)["command"] == "`diffusionblocks train x --block 1`"


def test_the_card_of_own_data_names_the_run_and_no_path_of_this_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = Path("d") / "novel.txt"
    text.parent.mkdir()
    text.write_text("It is a truth universally acknowledged. " * 150)
    few = ["training.max_steps=1", "model.hidden_size=16", "model.intermediate_size=16", "model.num_attention_heads=2"]
    few += ["model.num_key_value_heads=2", "data.block_length=16", "training.cpu=true", "model.num_hidden_layers=3"]
    assert main(["train", "--data", str(text), *few]) == 0
    written = Path("runs/novel/model/README.md").read_text()
    card = ModelCard(written)
    assert "# novel\n" in written and card.data.model_name == "novel" and card.data.datasets is None
    assert {(r.dataset_type, r.dataset_name) for r in card.data.eval_results} == {("unknown", "novel")}
    assert "d/novel.txt" not in card.data.to_yaml() and "| data | novel.txt |" in written
    assert "pipeline('text-generation', 'user/novel')" in written and "runs/" not in written
    named = name_repository(written, "jane/austen")
    assert "pipeline('text-generation', 'jane/austen')" in named and "user/novel" not in named
    text.rename("moved.txt")  # the data are gone: the card made anew says the same
    assert main(["card", "runs/novel"]) == 0
    assert Path("runs/novel/model/README.md").read_text() == written


@pytest.mark.parametrize("name", ["uoft-cs/cifar10", "digits"])
def test_names_on_the_hub_stay(name):
    card = model_card(tiny_dit(3), title="t", usage="pass", dataset=name, figures={"held_out_loss": 0.25})
    assert card.data.eval_results[0].dataset_type == name and f"| data | {name} |" in str(card)


def test_the_texts_of_a_card_are_in_words():
    text = str(model_card(blocked_lm(), title="tiny", usage="pass"))
    assert "A Llama-style language model cut into" in text or "A pretrained Llama model" in text
    assert "one auxiliary layer stands" in text and "layer(s)" not in text
    assert "noise levels" not in text and "sigma" not in text and "preconditioning" not in text
    assert "Edges (noise levels" in str(model_card(blocked_lm(preset="paper"), title="tiny", usage="pass"))
    assert with_article("ViT classifier") == "A ViT classifier" and with_article("Olmo") == "An Olmo"
