"""The cards in model_cards/ are what the library writes of a recipe's run, and the Hub's library reads them."""

import math
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_diffusionblocks.recipes import load_recipe

CARDS = sorted((Path(__file__).parents[1] / "model_cards").glob("*.md"))
# The figure that ranks models of a family, and between which values it lies for one that has learned something.
HEADLINES = {
    "digits-dit": ("class_agreement", 0.9, 1.0),
    "digits-vit": ("accuracy", 0.9, 1.0),
    "pydoc-llama": ("bits_per_character", 1.0, 2.5),
    "fashion-mnist-dit": ("class_agreement", 0.5, 1.0),
    "fashion-mnist-vit": ("accuracy", 0.85, 0.92),
    "pydoc-md4": ("bound_bits_per_character", 1.0, 4.0),
    "pydoc-recurrent": ("bits_per_character", 1.0, 3.0),
}


def card_id(path: Path) -> str:
    return path.stem


def test_the_cards_are_of_the_recipes_that_were_run():
    assert sorted(HEADLINES) == [path.stem for path in CARDS]


@pytest.mark.parametrize("path", CARDS, ids=card_id)
def test_a_card_parses_and_has_what_the_library_writes(path):
    card = ModelCard.load(path)
    assert card.data.to_dict()["library_name"] and card.data.tags and card.data.license is None
    text = path.read_text(encoding="utf-8")
    for heading in ("## Blocks", "## Intended use and limits", "## How to load", "## Training", "## Made with"):
        assert heading in text
    assert "from_pretrained" in text and "/tmp/" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("all ")]
    assert int(row.split()[1].replace(",", "")) > 0


@pytest.mark.parametrize("path", CARDS, ids=card_id)
def test_a_card_says_how_it_was_made_and_nothing_that_is_of_no_use(path):
    text = path.read_text(encoding="utf-8")
    made = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text.split("## Made with")[1].split("## ")[0], re.MULTILINE))
    assert made["command"] == f"`diffusionblocks train {path.stem}`" and made["hardware"] and made["training time"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", made["date"])
    for package in ("hf-diffusionblocks", "torch", "transformers", "diffusers"):
        assert re.search(rf"\b{package} \d", made["versions"]), package
    shown = text.split("## Figures")[1]
    assert "seconds" not in shown and "updates per block" not in shown and "None" not in shown


@pytest.mark.parametrize("path", CARDS, ids=card_id)
def test_a_card_is_of_its_recipes_setting(path):
    recipe, text = load_recipe(path.stem), path.read_text(encoding="utf-8")
    assert f"| data | {recipe.data.name} |" in text and f"| method | {recipe.method} |" in text
    for name, value in recipe.training.items():
        if name != "output_dir":
            value = f"{value:.4g}" if isinstance(value, float) else value
            assert f"| {name.replace('_', ' ')} | {value} |" in text, name
    rows = re.findall(r"^\d +(\d+)(?:-(\d+))? ", text.split("## Blocks")[1], flags=re.MULTILINE)
    layers = [list(range(int(first), int(last or first) + 1)) for first, last in rows]
    assert len(layers) == recipe.blocks["num_blocks"]
    count = recipe.model.get("num_layers") or recipe.model["num_hidden_layers"]
    assert sum(layers, []) == list(range(count))  # every layer is some block's, none is lost


@pytest.mark.parametrize("path", CARDS, ids=card_id)
def test_a_cards_figures_are_results_on_the_hub(path):
    results = {r.metric_type: r.metric_value for r in ModelCard.load(path).data.eval_results}
    assert all(math.isfinite(value) for value in results.values())
    name, low, high = HEADLINES[path.stem]
    assert low <= results[name] <= high
    assert not [name for name in results if name.endswith("seconds")]  # no figure of the model


def test_another_setting_would_be_found():
    text = CARDS[0].read_text(encoding="utf-8")
    assert "| max steps | 1800 |" in text and "| max steps | 1801 |" not in text
