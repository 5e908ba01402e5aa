"""Samplers against exact answers: for Gaussian data the denoiser and the ODE's solution are known in closed form."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hf_diffusionblocks.noise import karras_grid
from hf_diffusionblocks.partition import BlockPartition
from hf_diffusionblocks.sampling import (
    guided,
    make_grid,
    make_solver,
    sample_euler,
    sample_heun,
)
from tiny import Gaussian, as_users_run, gaussian_model

GAUSSIAN = Gaussian(mean=0.2, std=0.4)
PARTITION = BlockPartition.equal_probability(3, 6)
SOLVERS = {"euler": sample_euler, "heun": sample_heun}


class Routed:
    """A denoiser per block, chosen by the partition; remembers its visits."""

    def __init__(self, partition: BlockPartition, denoisers: list):
        self.partition, self.denoisers = partition, denoisers
        self.visits: list[int] = []
        self.levels: list[float] = []

    def __call__(self, z: Tensor, sigma: float) -> Tensor:
        block = self.partition.block_of(sigma)
        self.visits.append(block)
        self.levels.append(sigma)
        return self.denoisers[block](z, sigma)


def start(n: int = 200, sigma: float = 80.0, seed: int = 0) -> Tensor:
    return sigma * torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- solvers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize(("high", "low"), [(80.0, 0.002), (20.0, 0.05)])
def test_the_global_error_falls_with_the_order_of_the_solver(solver, order, high, low):
    z = start(sigma=high)
    exact = GAUSSIAN.solution(z, high, low)
    steps = [32, 64, 128, 256]
    errors = [
        float((SOLVERS[solver](GAUSSIAN.denoise, z, karras_grid(n + 1, low, high)) - exact).abs().max()) for n in steps
    ]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.1)
    assert errors[-1] < {1: 2e-2, 2: 1e-3}[order]


def test_an_euler_step_is_a_weighted_mean_of_the_state_and_the_denoised():
    z, denoised = torch.randn(2, 5, 3, dtype=torch.float64)
    stepped = sample_euler(lambda z, sigma: denoised, z, torch.tensor([4.0, 1.0], dtype=torch.float64))
    assert_close(stepped, 0.25 * z + 0.75 * denoised)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_to_zero_ends_at_the_denoised(solver):
    z = start()
    end = SOLVERS[solver](GAUSSIAN.denoise, z, torch.tensor([80.0, 0.0], dtype=torch.float64))
    assert_close(end, GAUSSIAN.denoise(z, 80.0))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["karras", "equal_probability"])
def test_samples_have_the_mean_and_standard_deviation_of_the_data(solver, kind):
    z = start(4000)
    end = SOLVERS[solver](GAUSSIAN.denoise, z, make_grid(PARTITION, 200, kind))
    # the start lacks the data's mean, of which 0.4 / 80 is therefore missing
    assert float(end.mean()) == pytest.approx(0.2, abs=0.015)
    assert float(end.std()) == pytest.approx(0.4, abs=0.015)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 7), ("heun", 13)])
def test_evaluations_of_a_solver(solver, evaluations):
    calls = []

    def denoise(z: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return GAUSSIAN.denoise(z, sigma)

    grid = make_grid(PARTITION, 7)
    SOLVERS[solver](denoise, start(), grid)
    levels = grid[:-1].tolist()
    expected = levels if solver == "euler" else [s for s in levels for _ in range(2)][:-1]
    if solver == "heun":  # each step at its level and at the next, the last one to zero alone
        expected = [levels[0], *(s for s in levels[1:] for _ in range(2))]
    assert len(calls) == evaluations and calls == expected


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_callback_sees_each_step(solver):
    seen = []
    z = start()
    grid = make_grid(PARTITION, 5)
    SOLVERS[solver](GAUSSIAN.denoise, z, grid, callback=lambda *args: seen.append(args))
    assert [(step, sigma) for step, sigma, _, _ in seen] == list(enumerate(grid[:-1].tolist()))
    assert torch.equal(seen[0][2], z)
    for _, sigma, state, denoised in seen:
        assert torch.equal(denoised, GAUSSIAN.denoise(state, sigma))


def test_solvers_have_names():
    assert make_solver("euler") is sample_euler and make_solver("heun") is sample_heun
    with pytest.raises(ValueError, match="unknown solver 'huen': did you mean 'heun'"):
        make_solver("huen")


# -- grids -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["karras", "equal_probability"])
@pytest.mark.parametrize("num_steps", [1, 2, 50])
def test_a_grid_has_one_level_per_step_and_ends_at_zero(kind, num_steps):
    grid = make_grid(PARTITION, num_steps, kind)
    assert grid.shape == (num_steps + 1,) and grid.dtype == torch.float64
    assert grid[0] == pytest.approx(80, rel=1e-9) and grid[-1] == 0
    assert bool((grid.diff() < 0).all())
    if num_steps > 1:
        assert grid[-2] == pytest.approx(0.002, rel=1e-9)
    PARTITION.check_sigma(grid[:-1])


def test_grids_differ():
    assert_close(make_grid(PARTITION, 3, "equal_probability")[1].item(), 0.301200103, rtol=0, atol=1e-6)
    # (80^(1/7) + 0.002^(1/7))^7 / 2^7   (EDM, Eq. 5)
    assert_close(make_grid(PARTITION, 3, "karras")[1].item(), ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7)


def test_unknown_grids_and_step_counts_are_refused():
    with pytest.raises(ValueError, match="unknown grid 'karas': did you mean 'karras'"):
        make_grid(PARTITION, 5, "karas")
    for num_steps in (0, -3, 2.5):
        with as_users_run(), pytest.raises(ValueError, match="num_inference_steps"):
            make_grid(PARTITION, num_steps)


# -- blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["karras", "equal_probability"])
def test_blocks_that_all_hold_the_exact_denoiser_equal_the_unblocked_one(num_blocks, solver, kind):
    partition = BlockPartition.equal_probability(num_blocks, 12)
    routed = Routed(partition, [GAUSSIAN.denoise] * num_blocks)
    z, grid = start(), make_grid(partition, 4 * num_blocks + 1, kind)
    assert torch.equal(SOLVERS[solver](routed, z, grid), SOLVERS[solver](GAUSSIAN.denoise, z, grid))
    assert routed.visits == sorted(routed.visits), "blocks are visited in the order of their layers"
    assert set(routed.visits) == set(range(num_blocks))
    for block, sigma in zip(routed.visits, routed.levels, strict=True):
        low, high = partition.range(block)
        assert low * (1 - 1e-6) <= sigma <= high * (1 + 1e-6)


def test_one_step_per_block_visits_each_block_once_in_order():
    routed = Routed(PARTITION, [GAUSSIAN.denoise] * 3)
    middle = [(low * high) ** 0.5 for low, high in map(PARTITION.range, range(3))]
    sample_euler(routed, start(), torch.tensor([*middle, 0.0], dtype=torch.float64))
    assert routed.visits == [0, 1, 2]


def test_early_blocks_act_at_high_noise():
    # Block 0 knows nothing, the others are exact: what it does is forgotten. The other way round, it stays.
    def ignorant(z: Tensor, sigma: float) -> Tensor:
        return torch.zeros_like(z)

    z, grid = start(4000), make_grid(PARTITION, 200)
    exact = GAUSSIAN.denoise
    first_is_ignorant = sample_euler(Routed(PARTITION, [ignorant, exact, exact]), z, grid)
    last_is_ignorant = sample_euler(Routed(PARTITION, [exact, exact, ignorant]), z, grid)
    assert float(first_is_ignorant.mean()) > 0.03
    assert float(last_is_ignorant.abs().max()) < 1e-6


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_blocked_model_samples_as_the_unblocked_one(solver):
    z = start(4 * 32).float().reshape(4, 1, 8, 8)
    labels = torch.arange(4)
    results = []
    for num_blocks in (1, 3):
        model = gaussian_model(num_blocks, GAUSSIAN).eval()
        with torch.no_grad():
            denoise = guided(model.denoise, labels, 10, 1.0)
            results.append(SOLVERS[solver](denoise, z, make_grid(PARTITION, 20)))
    assert torch.equal(*results)


# -- guidance ----------------------------------------------------------------------------------------------------

NULL = 10


class Labelled:
    """A denoiser whose answer depends on the label; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, z: Tensor, sigma: float, class_labels: Tensor) -> Tensor:
        self.asked.append(class_labels.tolist())
        return z * 0.5 + torch.sin(class_labels.to(z.dtype) + sigma)[:, None] * (1 + z)


def test_guidance_of_scale_1_is_the_conditional_model_for_one_evaluation():
    z, labels, model = start(3), torch.tensor([4, 0, 9]), Labelled()
    assert torch.equal(guided(model, labels, NULL, 1.0)(z, 2.0), Labelled()(z, 2.0, labels))
    assert model.asked == [[4, 0, 9]]


def test_guidance_of_scale_0_is_the_unconditional_model_for_one_evaluation():
    z, labels, model = start(3), torch.tensor([4, 0, 9]), Labelled()
    assert torch.equal(guided(model, labels, NULL, 0.0)(z, 2.0), Labelled()(z, 2.0, torch.full((3,), NULL)))
    assert model.asked == [[NULL] * 3]


@pytest.mark.parametrize("scale", [-1.0, 0.3, 0.999999, 2.0, 7.5])
def test_guidance_is_linear_in_the_scale(scale):
    z, labels, model = start(3), torch.tensor([4, 0, 9]), Labelled()
    labelled, unlabelled = Labelled()(z, 2.0, labels), Labelled()(z, 2.0, torch.full((3,), NULL))
    got = guided(model, labels, NULL, scale)(z, 2.0)
    assert_close(got, (1 - scale) * unlabelled + scale * labelled)
    assert model.asked == [[4, 0, 9, NULL, NULL, NULL]], "one batch of both"
