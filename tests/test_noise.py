"""The noise distribution against scipy's truncated normal, its inverses, and the inference grids."""

import math

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats
from torch.testing import assert_close

from hf_diffusionblocks.noise import LogNormalNoise, equal_probability_grid, karras_grid
from tiny import as_users_run


@st.composite
def noises(draw: st.DrawFn) -> LogNormalNoise:
    """Distributions with their range between -5 and 5 standard deviations and at least half a deviation wide."""
    p_mean = draw(st.floats(-4, 4))
    p_std = draw(st.floats(0.1, 3))
    low = draw(st.floats(-5, 4))
    high = draw(st.floats(low + 0.5, 5))
    return LogNormalNoise(p_mean, p_std, math.exp(p_mean + p_std * low), math.exp(p_mean + p_std * high))


# Here the logarithms of math and of torch differ in the last place.
ROUNDED = LogNormalNoise(0.5, 0.1, 1.6649431715849548, 1.8221188003905089)


def reference(noise: LogNormalNoise, low: float | None = None, high: float | None = None) -> stats.rv_continuous:
    """scipy's distribution of ln sigma, renormalised to [low, high]."""
    low, high = low or noise.sigma_min, high or noise.sigma_max
    a, b = ((math.log(s) - noise.p_mean) / noise.p_std for s in (low, high))
    return stats.truncnorm(a, b, loc=noise.p_mean, scale=noise.p_std)


# -- the distribution --------------------------------------------------------------------------------------------


@given(noises(), st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_cdf_is_the_truncated_normal_of_log_sigma(noise, shares):
    log_sigma = np.log(noise.sigma_min) + np.array(shares) * np.log(noise.sigma_max / noise.sigma_min)
    got = noise.cdf(torch.from_numpy(np.exp(log_sigma)))
    np.testing.assert_allclose(got, reference(noise).cdf(log_sigma), rtol=0, atol=1e-9)


@given(noises(), st.lists(st.floats(0, 1), min_size=1, max_size=8))
@example(ROUNDED, [0.0, 1.0])
@example(ROUNDED, [0.0])
def test_icdf_inverts_cdf(noise, shares):
    sigma = noise.sigma_min * (noise.sigma_max / noise.sigma_min) ** torch.tensor(shares, dtype=torch.float64)
    sigma = sigma.clamp(noise.sigma_min, noise.sigma_max)
    assert_close(noise.icdf(noise.cdf(sigma)), sigma, rtol=1e-7, atol=0)


@given(noises(), st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_cdf_inverts_icdf(noise, q):
    q = torch.tensor(q, dtype=torch.float64)
    assert_close(noise.cdf(noise.icdf(q)), q, rtol=0, atol=1e-9)


@given(noises())
@example(ROUNDED)
def test_the_ends_of_the_range_have_cdf_0_and_1_and_both_ways_lead_back(noise):
    ends = torch.tensor([noise.sigma_min, noise.sigma_max], dtype=torch.float64)
    cdf = noise.cdf(ends)
    assert_close(cdf, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-12)
    assert 0 <= cdf[0] and cdf[1] <= 1, "a share outside [0, 1] is refused by icdf"
    assert_close(noise.icdf(torch.tensor([0.0, 1.0])), ends, rtol=1e-7, atol=0)
    # and as single numbers, which take another path through the arithmetic
    assert 0 <= noise.cdf(noise.sigma_min) and noise.cdf(noise.sigma_max) <= 1


def test_median_of_the_default_distribution():
    assert float(LogNormalNoise().icdf(0.5)) == pytest.approx(0.301200103, abs=1e-9)


def test_levels_beyond_the_range_have_the_share_of_its_ends():
    noise = LogNormalNoise()
    assert float(noise.cdf(1e-9)) == float(noise.cdf(0.002))
    assert float(noise.cdf(1e9)) == float(noise.cdf(80.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shares_are_computed_in_float64(dtype):
    noise = LogNormalNoise()
    sigma = torch.tensor([[0.01, 0.3], [5.0, 60.0]], dtype=dtype)
    cdf = noise.cdf(sigma)
    assert cdf.dtype == torch.float64 and cdf.shape == (2, 2)
    # the last one lies 1.5e-5 below 1: float32 arithmetic would leave two digits of what is above it
    assert_close(noise.icdf(cdf), sigma.double(), rtol=1e-8, atol=0)


def test_shares_do_not_depend_on_the_default_device():
    expected = LogNormalNoise().icdf(0.25)
    with torch.device("meta"):
        assert float(LogNormalNoise().icdf(0.25)) == float(expected)
        assert LogNormalNoise().sample(3).device.type == "cpu"


# -- samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(None, None), (0.002, 0.18), (0.17, 0.53), (0.5, 80.0), (20.0, 80.0)])
def test_samples_follow_the_renormalised_distribution(low, high):
    noise = LogNormalNoise()
    sigma = noise.sample(4000, low, high, generator=torch.Generator().manual_seed(1))
    assert sigma.dtype == torch.float64
    assert sigma.min() >= (low or 0.002) and sigma.max() <= (high or 80.0)
    assert stats.kstest(sigma.log().numpy(), reference(noise, low, high).cdf).pvalue > 0.01


def test_samples_depend_on_the_generator_alone():
    noise = LogNormalNoise()
    first = noise.sample((2, 3), generator=torch.Generator().manual_seed(5))
    torch.rand(7)
    before = torch.get_rng_state()
    again = noise.sample((2, 3), generator=torch.Generator().manual_seed(5))
    assert first.shape == (2, 3) and torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, noise.sample((2, 3), generator=torch.Generator().manual_seed(6)))


def test_a_range_of_one_level_gives_that_level():
    assert LogNormalNoise().sample(4, 0.5, 0.5).tolist() == [0.5] * 4


# -- grids -------------------------------------------------------------------------------------------------------


def test_three_points_of_equal_probability():
    grid = equal_probability_grid(3, LogNormalNoise())
    assert_close(grid, torch.tensor([80, 0.301200103, 0.002], dtype=torch.float64), rtol=0, atol=1e-6)


@given(noises(), st.integers(2, 60))
def test_neighbours_of_the_equal_probability_grid_enclose_equal_shares(noise, num_steps):
    grid = equal_probability_grid(num_steps, noise)
    assert bool((grid.diff() < 0).all())
    shares = -np.diff(reference(noise).cdf(grid.log().numpy()))
    np.testing.assert_allclose(shares, 1 / (num_steps - 1), rtol=0, atol=1e-8)


@pytest.mark.parametrize("num_steps", [2, 5, 18, 50])
def test_karras_grid_is_the_one_of_diffusers(num_steps):
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(num_steps)
    assert_close(karras_grid(num_steps, 0.002, 80.0).float(), scheduler.sigmas[:-1], rtol=1e-5, atol=0)


@given(st.integers(2, 200), st.floats(1e-4, 1), st.floats(2, 1e3), st.floats(0.5, 10))
def test_karras_grid_descends_from_one_end_to_the_other(num_steps, low, high, rho):
    grid = karras_grid(num_steps, low, high, rho)
    assert grid.shape == (num_steps,) and grid.dtype == torch.float64
    assert grid[0] == high and grid[-1] == low
    assert bool((grid.diff() < 0).all())


def test_rho_of_one_spaces_the_levels_evenly():
    assert_close(karras_grid(5, 1.0, 9.0, rho=1.0), torch.tensor([9.0, 7, 5, 3, 1], dtype=torch.float64))


def test_one_level_is_the_highest():
    assert karras_grid(1, 0.002, 80.0).tolist() == [80.0]
    assert equal_probability_grid(1, LogNormalNoise()).tolist() == [80.0]


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, -1, 2.5, "5", None])
def test_grids_refuse_what_is_not_a_number_of_steps(num_steps):
    with as_users_run():
        with pytest.raises(ValueError, match=f"num_inference_steps={num_steps!r}"):
            karras_grid(num_steps, 0.002, 80.0)
        with pytest.raises(ValueError, match=f"num_inference_steps={num_steps!r}"):
            equal_probability_grid(num_steps, LogNormalNoise())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"p_mean": math.nan}, "p_mean=nan"),
        ({"p_mean": "0"}, "p_mean='0'"),
        ({"p_std": 0.0}, "p_std=0.0"),
        ({"p_std": -1.2}, "p_std=-1.2"),
        ({"p_std": True}, "p_std=True"),
        ({"p_std": math.inf}, "p_std=inf"),
        ({"sigma_min": 0.0}, "sigma_min=0.0"),
        ({"sigma_min": -0.1}, "sigma_min=-0.1"),
        ({"sigma_max": math.inf}, "sigma_max=inf"),
        ({"sigma_max": 0.002}, "sigma_max=0.002"),
        ({"sigma_min": 90.0}, "sigma_min=90.0"),
        ({"p_mean": -1000.0}, "no probability mass"),
    ],
)
def test_distribution_refuses(settings, words):
    with as_users_run(), pytest.raises(ValueError, match=words):
        LogNormalNoise(**settings)


@pytest.mark.parametrize("q", [-1e-9, 1.001, math.nan])
def test_icdf_refuses_what_is_not_a_share(q):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        LogNormalNoise().icdf(q)


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.4), (0.001, 1.0), (1.0, 81.0), (math.nan, 1.0)])
def test_sample_refuses_a_range_outside_its_own(low, high):
    with pytest.raises(ValueError, match=r"must be a range inside \[0.002, 80.0\]"):
        LogNormalNoise().sample(3, low, high)
