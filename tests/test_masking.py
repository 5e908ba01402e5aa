"""The mask rate: schedules against their closed forms, blocks' ranges, and the expectation of training's draws."""

import itertools
import math

import pytest
import torch

from hf_diffusionblocks.masking import (
    CosineSchedule,
    LinearSchedule,
    MaskNoise,
    draw_masks,
    make_schedule,
    stratified_rates,
)
from hf_diffusionblocks.partition import BlockPartition

SCHEDULES = [LinearSchedule(), CosineSchedule()]
INSIDE = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alpha_falls_from_one_to_zero_and_time_inverts_it(schedule):
    torch.testing.assert_close(
        schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64)), torch.tensor([1.0, 0.0], dtype=torch.float64)
    )
    alpha = schedule.alpha(INSIDE)
    assert bool((alpha.diff() < 0).all())
    torch.testing.assert_close(schedule.time(alpha), INSIDE)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_derivative_is_that_of_alpha_and_the_weight_its_ratio(schedule):
    t = INSIDE.clone().requires_grad_()
    schedule.alpha(t).sum().backward()
    torch.testing.assert_close(schedule.derivative(INSIDE), t.grad)
    torch.testing.assert_close(schedule.weight(INSIDE), -t.grad / (1 - schedule.alpha(INSIDE)))


def test_weights_are_those_of_the_papers_table():
    torch.testing.assert_close(LinearSchedule().weight(INSIDE), 1 / INSIDE)
    wanted = math.pi / 2 * torch.tan(math.pi / 2 * (1 - INSIDE))
    torch.testing.assert_close(CosineSchedule().weight(INSIDE), wanted)
    assert isinstance(make_schedule("cosine"), CosineSchedule)
    with pytest.raises(ValueError, match=r"schedule.*linaer.*'linear'"):
        make_schedule("linaer")


def test_block_0_owns_the_rows_with_most_tokens_hidden():
    partition = BlockPartition.equal_probability(3, 6, MaskNoise(), overlap=0.1)
    assert partition.edges == pytest.approx((1, 2 / 3, 1 / 3, 0))
    assert partition.block_of(torch.tensor([1.0, 0.7, 2 / 3, 0.5, 1 / 3, 0.1, 0.0])).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert partition.range(1, training=True) == pytest.approx((1 / 3 - 1 / 30, 2 / 3 + 1 / 30))
    assert partition.range(0, training=True) == pytest.approx((2 / 3 - 1 / 30, 1.0))
    assert [row["mass"] for row in partition.describe()] == pytest.approx([1 / 3] * 3)
    drawn = partition.sample(2, 1000, seeded())
    assert drawn.min() >= 0 and drawn.max() <= 1 / 3 + 1 / 30 and abs(float(drawn.mean()) - 11 / 60) < 0.01
    with pytest.raises(ValueError, match=r"sigma=1\.5 is outside"):
        partition.block_of(1.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1 / 3, 2 / 3), (0.6, 1.0)])
def test_weighted_means_over_draws_are_means_over_the_range(schedule, low, high):
    rates, weights = stratified_rates(schedule, low, high, 2000, seeded())
    assert rates.min() >= low and rates.max() <= high
    for power in (0, 1, 2):
        wanted = (high ** (power + 1) - low ** (power + 1)) / (power + 1) / (high - low)
        assert float((weights * rates**power).mean()) == pytest.approx(wanted, rel=2e-3)


def test_the_rates_of_a_batch_are_spread_evenly():
    rates, weights = stratified_rates(LinearSchedule(), 0.25, 0.75, 8, seeded(1))
    torch.testing.assert_close(rates.sort().values.diff(), torch.full((7,), 0.5 / 8, dtype=torch.float64))
    torch.testing.assert_close(weights, torch.ones(8, dtype=torch.float64))


def cost(hidden: torch.Tensor) -> torch.Tensor:
    """A cost of each hidden token that depends on all that is hidden, summed over them."""
    place = torch.arange(1, hidden.shape[-1] + 1, dtype=torch.float64)
    return (hidden * place.sin().abs() * (1 + hidden.sum(-1, keepdim=True).double().sqrt())).sum(-1)


@pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
def test_hiding_one_token_for_sure_leaves_the_expectation_as_it_is(rate):
    subsets = torch.tensor(list(itertools.product([False, True], repeat=4)))
    count = subsets.sum(-1)
    exact = float((rate**count * (1 - rate) ** (4 - count) * cost(subsets)).sum() / rate)
    rows = 20_000
    for sure in (True, False):
        rates = torch.full((rows,), rate, dtype=torch.float64)
        hidden, factors = draw_masks(rates, torch.ones(rows, 4, dtype=torch.bool), seeded(), at_least_one=sure)
        values = factors * cost(hidden)
        error = float(values.std()) / rows**0.5
        assert abs(float(values.mean()) - exact) < 4 * error + 1e-9, sure
        if sure:
            few = float(values.std())
    assert rate == 1 or few < 0.5 * float(values.std())  # and takes most of the variance away


def test_only_maskable_tokens_are_hidden_and_a_row_without_any_counts_nothing():
    maskable = torch.tensor([[True, False, True, True], [False] * 4])
    for _ in range(20):
        hidden, factors = draw_masks(torch.tensor([0.9, 0.9]), maskable, seeded())
        assert not bool((hidden & ~maskable).any()) and bool(hidden[0].any())
        assert factors.tolist() == [3 / int(hidden[0].sum()), 0.0]
