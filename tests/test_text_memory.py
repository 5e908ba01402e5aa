"""What a step of a language model's block holds, over end to end: the promised ratios, and prediction against count."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "text_memory.py"


@pytest.fixture(scope="module")
def rows() -> dict:
    """Rows of the benchmark by (arm, checkpointing), at half its width and a quarter of its tokens."""
    import sys

    spec = importlib.util.spec_from_file_location("text_memory_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    found = module.rows(width=192, vocab_size=64, tokens=64, batch_size=2)
    return {(row.name, row.checkpointing): row for row in found}


def test_prediction_and_count_agree_within_five_percent(rows):
    assert len(rows) == 8
    assert {key: row.off for key, row in rows.items() if row.off > 0.05} == {}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_block_of_three_holds_a_third_of_weights_gradients_and_moments(rows, checkpointing):
    whole, block = rows["end to end", False], rows["clean", checkpointing]
    assert 1 / 3 < block.state / whole.state <= 0.36
    assert block.auxiliary == 0 and block.shared == 64 * 192 * 4
    # An auxiliary layer costs itself, four times; which block holds the most, one that trains the embeddings or not,
    # one with an auxiliary layer or with one more of its own, may differ.
    extra, layer = (
        rows["clean, one auxiliary layer", checkpointing],
        rows["clean, one auxiliary layer", False].auxiliary,
    )
    assert layer > 0
    assert extra.state - block.state == pytest.approx(4 * layer, abs=4 * block.shared)


@pytest.mark.parametrize(
    ("arm", "checkpointing", "goal"),
    [("clean", False, 0.36), ("two streams", False, 0.7), ("clean", True, 0.36), ("two streams", True, 0.36)],
)
def test_activations_over_end_to_end(rows, arm, checkpointing, goal):
    whole, block = rows["end to end", False], rows[arm, checkpointing]
    assert 0 < block.measured.activations / whole.measured.activations <= goal


def test_the_noisy_streams_own_parts_are_small(rows):
    whole, block = rows["end to end", False], rows["two streams", False]
    assert block.state / whole.state <= 0.385  # at width 192: its input projection and modulation in it
