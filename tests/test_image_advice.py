"""What a plan says of DiT and ViT models: whether blocks pay, by what was measured and no more."""

import json
import statistics
from pathlib import Path

import pytest

from hf_diffusionblocks.baselines.end_to_end import resolve_method
from hf_diffusionblocks.jobs.image_advice import MEASURED, image_advice, patches_per_image
from hf_diffusionblocks.recipes import load_recipe

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
NARROW = ["model.num_attention_heads=2"]
NARROW_VIT = ["model.hidden_size=32", "model.intermediate_size=64"]
LAYER = {"dit": 28_544, "image_classification": 8_544}  # parameters of a layer of width 32, without embeddings and head


def advised(name: str, *overrides: str) -> tuple[str, dict]:
    recipe = resolve_method(load_recipe(name, list(overrides)))
    lines, values = image_advice(recipe, recipe.config())
    assert lines[-1] == values["advice"]
    return values["advice"], values["compute"]


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def paired(found: list[dict], ours: str, theirs: str, figure: str) -> float:
    mine, other = ({r["seed"]: r[figure] for r in found if r["arm"] == arm} for arm in (ours, theirs))
    return statistics.mean(mine[seed] - other[seed] for seed in mine.keys() & other.keys())


def test_the_limits_for_dit_are_those_of_the_kept_results():
    """16 patches an image, 64 images an update, 2 layers in the small network."""
    found, lead = rows("quality-capacity"), {}
    for updates in (500, 2000, 5000):
        arms = (f"blocked, B=3, {updates} updates per block", f"end to end, L/3, {3 * updates} updates")
        lead[3 * updates * 64 * 16 / (2 * LAYER["dit"])] = paired(found, *arms, "held_out_loss")
    measured = MEASURED["dit"]
    assert round(min(lead)) == measured.small_wins and lead[min(lead)] > 0.02
    assert round(max(lead)) == measured.blocks_win and lead[max(lead)] < -0.01


def test_the_limit_for_vit_is_that_of_the_kept_results():
    small, ours = "end to end, L/3, equal compute", "blocked, default"
    found = rows("classification-fashion-short")
    assert paired(found, ours, small, "accuracy") < -0.05
    updates = next(r["updates_per_block"] for r in found if r["arm"] == small)
    assert round(updates * 64 * 16 / (4 * LAYER["image_classification"])) == MEASURED["image_classification"].small_wins
    small, ours = "ViT, backpropagation, L/B, equal compute", "ViT, blocks, the library's default"
    found = [r for r in rows("classification-rivals") if r["study"] == "fashion-vit"]
    wide, patches = 33_472, next(r["updates"] for r in found if r["arm"] == small) * 64 * 16
    assert paired(found, ours, small, "accuracy") < -0.02
    assert patches / (4 * wide) < MEASURED["image_classification"].small_wins


def test_parameters_and_patches_are_those_that_the_limits_were_made_with():
    config = load_recipe("fashion-mnist-dit", NARROW).config()
    assert patches_per_image(config) == patches_per_image(load_recipe("fashion-mnist-vit").config()) == 16
    for name, narrow, family, rest in (
        ("fashion-mnist-dit", NARROW, "dit", 3.0),
        ("fashion-mnist-vit", NARROW_VIT, "image_classification", 3.4),
    ):
        _, values = advised(name, *narrow, "training.max_steps=500")
        updates, layers = values["small_model_updates_per_update_of_every_block"], values["small_model_layers"]
        assert updates == pytest.approx(rest, abs=0.1)
        read = 500 * updates * 64 * 16
        assert values["small_model_patches_per_parameter"] == pytest.approx(read / (layers * LAYER[family]))


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("fashion-mnist-dit", [*NARROW, "training.max_steps=400"], "most likely better than the blocks here too"),
        ("fashion-mnist-dit", [*NARROW, "training.max_steps=2000"], "they met between: train both for a while"),
        ("fashion-mnist-dit", [*NARROW, "training.max_steps=6000"], "more layers, trained as blocks, are most likely"),
        ("imagenet256-dit-l2", ["model.num_layers=6"], "set training.max_steps to see"),
        (
            "fashion-mnist-vit",
            [*NARROW_VIT, "training.max_steps=300"],
            "up to 51 the small network was ahead: it is most",
        ),
        ("fashion-mnist-vit", ["training.max_steps=30000"], "and longer ones were not made: train both"),
        ("digits-dit", ["method=end_to_end"], "There is one block: this is end-to-end training."),
    ],
)
def test_advice_follows_the_length_of_the_run(name, settings, said):
    assert said in advised(name, *settings)[0]
