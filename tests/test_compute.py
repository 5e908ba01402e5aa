"""FLOPs of training: against torch's count of a real step, and against layer passes; and what follows from them."""

import functools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_diffusionblocks.baselines.end_to_end import baseline_recipe, compute_factor
from hf_diffusionblocks.compute import TrainingCompute, training_flops
from hf_diffusionblocks.jobs.advice import BLOCKS_WIN_ABOVE, SMALL_MODEL_WINS_BELOW, advice, small_model
from hf_diffusionblocks.objectives import NextTokenPrediction
from hf_diffusionblocks.recipes import load_recipe
from tiny import tiny_dit
from tiny_text import VOCAB_SIZE, WIDTH, new_lm, tokens

ROWS, LENGTH = 2, 12


EQUAL = (2, 2, 2)  # layers per block


@functools.cache
def cost_of(num_blocks: int = 3, layers: tuple[int, ...] | None = None, **settings) -> TrainingCompute:
    """Counting takes a second or two: each model once."""
    settings |= {"layers_per_block": list(layers)} if layers else {}
    return training_flops(new_lm(num_blocks=num_blocks, **settings).config, batch_size=ROWS, tokens=LENGTH)


WHOLE = {"num_blocks": 1, "context": "independent", "auxiliary_layers": 0}


def counted(model, block: int) -> int:
    """FLOPs of a real update of a block."""
    batch = {"input_ids": tokens(ROWS, LENGTH)}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        NextTokenPrediction()(model, block, batch, torch.Generator().manual_seed(0)).loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "settings",
    [{}, {"auxiliary_layers": 0}, {"context": "independent", "auxiliary_layers": 0}, {"preset": "paper"}],
)
def test_the_count_on_fake_tensors_is_that_of_a_real_step(settings):
    model = new_lm(num_blocks=3, **settings)
    # The last position of a row has no label, and the fake step scores it: forward, and backward to both factors.
    unscored = 3 * 2 * ROWS * WIDTH * VOCAB_SIZE
    for block, row in enumerate(cost_of(**settings).blocks):
        assert row.flops - unscored == counted(model, block)


def test_layer_passes_of_a_cascade_are_those_of_the_derivation():
    def ratio(**settings) -> float:
        return sum(block.layer_passes for block in cost_of(**settings).blocks) / (3 * 6)

    assert ratio(layers=EQUAL, auxiliary_layers=0) == pytest.approx(1 + 1 / 3)
    assert ratio(layers=EQUAL) == pytest.approx(1 + 2 / 3)
    assert ratio(num_blocks=2, layers=(3, 3), auxiliary_layers=0) == pytest.approx(1 + 1 / 6)


def test_lower_outputs_on_disk_leave_the_lower_layers_out_but_for_one_pass():
    config, again = new_lm(num_blocks=3, layers_per_block=list(EQUAL)).config, cost_of(layers=EQUAL)
    disk = {"batch_size": ROWS, "tokens": LENGTH, "lower_outputs": "disk"}
    half = training_flops(config, passes=2, **disk)
    lower = [2 * (a.flops - b.flops) for a, b in zip(again.blocks, half.blocks, strict=True)]
    assert lower[0] == 0
    assert lower[2] == 2 * lower[1] > 0  # four layers below, and two
    with pytest.raises(ValueError, match="passes=None"):
        training_flops(config, **disk)


def test_checkpointing_runs_the_layers_forward_once_more():
    config = new_lm(**WHOLE).config
    again = training_flops(config, batch_size=ROWS, tokens=LENGTH, gradient_checkpointing=True).flops
    plain, head = cost_of(**WHOLE).flops, 3 * 2 * ROWS * LENGTH * WIDTH * VOCAB_SIZE
    down = 6 * 2 * ROWS * LENGTH * WIDTH * 24  # the last product of a layer is not needed again: torch stops before it
    assert again - plain == pytest.approx((plain - head) / 3 - down)


def test_blocks_of_images_cost_what_the_whole_costs_but_for_their_embeddings_and_heads():
    cost = training_flops(tiny_dit(num_blocks=2).config, batch_size=4)
    assert 1 <= cost.ratio < 1.2
    assert cost.total(10) == 10 * cost.flops


@pytest.mark.parametrize(
    ("settings", "words"), [({"batch_size": 0}, "batch_size=0"), ({"lower_outputs": "dsk"}, "disk")]
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        training_flops(new_lm().config, **settings)


# -- equal compute ---------------------------------------------------------------------------------------------------


def test_baselines_of_a_cascade_get_the_compute_of_auxiliary_layers_and_lower_blocks_too():
    recipe = load_recipe(
        "pydoc-llama", ["training.max_steps=300", "training.warmup_steps=30", "blocks.layers_per_block=[2,2,2]"]
    )
    whole = baseline_recipe(recipe, "end_to_end", "compute", vocab_size=100)
    shallow = baseline_recipe(recipe, "shallow", "compute", vocab_size=100)
    cost = training_flops(recipe.config(100), tokens=128)
    for baseline in (whole, shallow):
        mine = training_flops(baseline.config(100), tokens=128)
        assert mine.total(baseline.training["max_steps"]) == pytest.approx(cost.total(300), rel=0.002)
        assert baseline.config().num_blocks == 1 and baseline.config().readout == "clean"
    assert 1.6 < whole.training["max_steps"] / 300 < 1.75  # 30 / 18, and heads
    assert whole.training["warmup_steps"] == round(30 * compute_factor(recipe, whole, 100))
    assert "order" not in whole.training
    same = baseline_recipe(recipe, "shallow", "updates", vocab_size=100)
    assert (same.config().num_layers, same.training["max_steps"]) == (2, 300)


def test_a_shallow_baseline_may_have_a_layer_more():
    recipe = load_recipe("pydoc-llama", ["method=shallow", "layers=3"])
    assert baseline_recipe(recipe, "shallow").config().num_layers == 3


# -- advice ----------------------------------------------------------------------------------------------------------


def advised(tokens_read: float | None, **settings) -> str:
    config = new_lm(num_blocks=3, **settings).config
    return advice(config, cost_of(), small_model(1000, cost_of(), cost_of(**WHOLE), 3, tokens_read))


def test_advice_follows_how_far_the_small_model_is_from_saturated():
    few, many = SMALL_MODEL_WINS_BELOW / 10 * 3000, BLOCKS_WIN_ABOVE * 10 * 3000
    assert "train it instead" in advised(few)
    assert "trained as blocks, are most likely better" in advised(many)
    assert "do not tell" in advised((SMALL_MODEL_WINS_BELOW * BLOCKS_WIN_ABOVE) ** 0.5 * 3000)
    assert "set training.max_steps" in advised(None)
    assert "cannot be made smaller" in advised(few, pretrained=True)
