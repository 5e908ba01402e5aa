"""Preconditioning: EDM's unit variances, and a noise-prediction network as a denoiser at every training step."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_diffusionblocks.preconditioning import (
    EDMPreconditioning,
    RectifiedFlowPreconditioning,
    VPEpsilonPreconditioning,
    expand,
)
from tiny import tiny_dit_config

SIGMAS = torch.logspace(math.log10(0.002), math.log10(80), 41, dtype=torch.float64)
SCHEDULES = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}

positive = st.floats(0.01, 10)


# -- EDM ---------------------------------------------------------------------------------------------------------


@given(st.floats(0.002, 80), positive)
def test_the_input_of_the_network_has_unit_variance(sigma, sigma_data):
    c = EDMPreconditioning(sigma_data)(torch.tensor([sigma]))
    variance_of_z = sigma_data**2 + sigma**2
    assert float(c.c_in) ** 2 * variance_of_z == pytest.approx(1, rel=1e-5)


@given(st.floats(0.002, 80), positive)
def test_the_target_of_the_network_has_unit_variance(sigma, sigma_data):
    # (y - c_skip z) / c_out = ((1 - c_skip) y - c_skip sigma eps) / c_out   (EDM, Eq. 8). 1 - c_skip is computed in
    # float32 by the code's user, so it is as exact as c_skip is.
    c_skip, c_out, _, _ = (float(v) for v in EDMPreconditioning(sigma_data)(torch.tensor([sigma])))
    variance = ((1 - c_skip) * sigma_data) ** 2 + (c_skip * sigma) ** 2
    assert variance == pytest.approx(c_out**2, rel=1e-4, abs=(1e-7 * sigma_data) ** 2)


@given(st.floats(0.002, 80), positive)
def test_c_skip_is_the_best_linear_estimate_of_the_data(sigma, sigma_data):
    c_skip = float(EDMPreconditioning(sigma_data)(torch.tensor([sigma])).c_skip)
    assert c_skip == pytest.approx(sigma_data**2 / (sigma_data**2 + sigma**2), rel=1e-5)


@given(st.floats(0.002, 80), positive)
def test_the_weight_is_one_over_c_out_squared(sigma, sigma_data):
    preconditioning = EDMPreconditioning(sigma_data)
    sigma = torch.tensor([sigma])
    assert_close(preconditioning.weight(sigma) * preconditioning(sigma).c_out ** 2, torch.ones(1), rtol=1e-5, atol=0)


def test_coefficients_are_those_of_diffusers():
    scheduler = EDMEulerScheduler(sigma_data=0.7)
    preconditioning = EDMPreconditioning(0.7)
    z, f = torch.randn(41, 2, 3), torch.randn(41, 2, 3)
    c = preconditioning(SIGMAS)
    for i, sigma in enumerate(SIGMAS.tolist()):
        assert_close(c.c_in[i] * z[i], scheduler.precondition_inputs(z[i], sigma))
        assert_close(c.c_noise[i : i + 1], scheduler.precondition_noise(sigma), rtol=1e-5, atol=1e-6)
        assert_close(c.c_skip[i] * z[i] + c.c_out[i] * f[i], scheduler.precondition_outputs(z[i], f[i], sigma))


def test_default_coefficients_at_one_level():
    # sigma = sigma_data = 0.5
    c = EDMPreconditioning()(torch.tensor([0.5]))
    expected = 0.5, 0.5 / math.sqrt(2), math.sqrt(2), math.log(0.5) / 4
    assert [float(v) for v in c] == pytest.approx(expected, rel=1e-6)
    assert float(EDMPreconditioning().weight(torch.tensor([0.5]))) == pytest.approx(8, rel=1e-6)


def test_noise_scale_multiplies_what_the_network_is_told_and_nothing_else():
    plain, scaled = EDMPreconditioning()(SIGMAS), EDMPreconditioning(noise_scale=250.0)(SIGMAS)
    assert_close(scaled.c_noise, 250 * plain.c_noise)
    for name in ("c_skip", "c_out", "c_in"):
        assert torch.equal(getattr(scaled, name), getattr(plain, name))


@pytest.mark.parametrize("kind", ["edm", *SCHEDULES])
def test_coefficients_are_float32_whatever_sigma_is(kind):
    preconditioning = EDMPreconditioning() if kind == "edm" else vp(kind)[0]
    double, single = preconditioning(SIGMAS), preconditioning(SIGMAS.float())
    for a, b in zip(double, single, strict=True):
        assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape == SIGMAS.shape
        assert_close(a, b, rtol=1e-5, atol=1e-3 if kind != "edm" else 1e-6)
    assert preconditioning.weight(SIGMAS).dtype == torch.float64
    assert_close(preconditioning.weight(SIGMAS.float()).double(), preconditioning.weight(SIGMAS), rtol=1e-5, atol=0)


# -- a DDPM's noise prediction -----------------------------------------------------------------------------------


def vp(name: str) -> tuple[VPEpsilonPreconditioning, torch.Tensor]:
    alphas = DDPMScheduler(**SCHEDULES[name]).alphas_cumprod.double()
    return VPEpsilonPreconditioning(tuple(alphas.tolist())), alphas


def epsilon_network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Any noise prediction that depends on both arguments."""
    return torch.sin(3 * x) + 0.3 * torch.cos(expand(t, x) / 50) * x


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_denoiser_of_a_noise_prediction_at_every_training_step(name):
    preconditioning, alphas = vp(name)
    sigma = ((1 - alphas) / alphas).sqrt()
    # x_t = sqrt(abar) y + sqrt(1 - abar) eps, what the network was trained on
    x_t = torch.randn(1000, 2, 3, dtype=torch.float64)
    eps = epsilon_network(x_t, torch.arange(1000.0, dtype=torch.float64))
    expected = (x_t - expand((1 - alphas).sqrt(), x_t) * eps) / expand(alphas.sqrt(), x_t)  # DDPM, Eq. 15

    z = x_t / expand(alphas.sqrt(), x_t)
    c = preconditioning(sigma)
    f = epsilon_network(expand(c.c_in, z) * z, c.c_noise.double())
    got = expand(c.c_skip, z) * z + expand(c.c_out, z) * f
    # relative to the size of z, of which D is a small difference at high noise
    scale = expand(1 + sigma, z)
    assert_close(got / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_training_step_is_found_exactly_from_its_noise_level(name, dtype):
    preconditioning, alphas = vp(name)
    sigma = ((1 - alphas) / alphas).sqrt()
    assert torch.equal(preconditioning.sigmas, sigma)
    t = preconditioning.timestep(sigma.to(dtype))
    assert t.dtype == torch.float32 and t.tolist() == list(range(1000))
    assert [float(preconditioning.timestep(s[None])) for s in sigma[::111].to(dtype)] == list(range(0, 1000, 111))


@pytest.mark.parametrize("name", SCHEDULES)
def test_between_training_steps_the_time_is_interpolated_in_log_sigma(name):
    preconditioning, _ = vp(name)
    log_sigma = preconditioning.sigmas.log()
    for share in (0.25, 0.5):
        between = (log_sigma[:-1] + share * log_sigma.diff()).exp()
        assert_close(preconditioning.timestep(between), torch.arange(999.0) + share, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_grows_with_noise(name):
    preconditioning, _ = vp(name)
    ends = preconditioning.sigmas[[0, -1]].log()
    sigma = torch.linspace(*ends.tolist(), 20011, dtype=torch.float64).exp()
    t = preconditioning.timestep(sigma)
    assert bool((t.diff() >= 0).all()) and t[0] == 0 and t[-1] == 999
    assert len(t.unique()) > 10_000


def test_levels_beyond_the_schedule_get_its_ends():
    preconditioning, _ = vp("linear")
    assert preconditioning.timestep(torch.tensor([1e-6, 1e6])).tolist() == [0, 999]


def test_the_weight_of_a_noise_prediction_is_one_over_c_out_squared():
    preconditioning, _ = vp("linear")
    weight = preconditioning.weight(SIGMAS.float())
    assert_close(weight * preconditioning(SIGMAS).c_out ** 2, torch.ones(41), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_config_covers_exactly_the_noise_levels_of_the_schedule(name):
    config = tiny_dit_config(
        preconditioning="vp_epsilon", noise_schedule=SCHEDULES[name] | {"num_train_timesteps": 1000}
    )
    preconditioning, _ = vp(name)
    assert config.make_preconditioning() == preconditioning
    partition = config.make_partition()
    assert partition.edges[0] == preconditioning.sigmas[-1] and partition.edges[-1] == preconditioning.sigmas[0]
    partition.check_sigma(preconditioning.sigmas)
    partition.check_sigma(preconditioning.sigmas.float())


# -- rectified flow ----------------------------------------------------------------------------------------------


def test_the_true_velocity_gives_the_data_at_every_noise_level():
    y, epsilon = torch.randn(41, 2, 3), torch.randn(41, 2, 3)
    sigma = SIGMAS.float()
    c = RectifiedFlowPreconditioning(1000)(sigma)
    t = expand(sigma / (1 + sigma), y)
    z = y + expand(sigma, y) * epsilon
    x = FlowMatchEulerDiscreteScheduler().scale_noise  # x_t = (1 - t) y + t eps, at the scheduler's own timesteps
    assert_close(expand(c.c_in, z) * z, (1 - t) * y + t * epsilon, rtol=1e-5, atol=1e-5)
    assert_close(expand(c.c_skip, z) * z + expand(c.c_out, z) * (epsilon - y), y, rtol=1e-4, atol=1e-4)
    assert_close(c.c_noise, 1000 * t.flatten(1)[:, 0], rtol=1e-6, atol=0)
    step = FlowMatchEulerDiscreteScheduler().timesteps[250:251]  # t = 0.75, sigma = 3
    theirs = x(y[:1], step, epsilon[:1])
    assert_close(theirs / (1 - step / 1000), y[:1] + 3 * epsilon[:1], rtol=1e-5, atol=1e-5)


def test_a_step_along_the_straight_path_is_a_step_of_the_ode():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    t, t_next = scheduler.sigmas[2:4].tolist()
    x, velocity = torch.randn(2, 3), torch.randn(2, 3)
    scheduler.set_begin_index(2)
    theirs = scheduler.step(velocity, scheduler.timesteps[2], x).prev_sample
    sigma, sigma_next = t / (1 - t), t_next / (1 - t_next)
    z, denoised = x / (1 - t), x - t * velocity
    ours = z + (sigma_next - sigma) * (z - denoised) / sigma  # EDM (arXiv 2206.00364), Alg. 1
    assert_close(ours * (1 - t_next), theirs, rtol=1e-5, atol=1e-5)


def test_the_weight_of_a_velocity_is_one_over_c_out_squared():
    preconditioning = RectifiedFlowPreconditioning()
    weight = preconditioning.weight(SIGMAS.float())
    assert_close(weight * preconditioning(SIGMAS).c_out ** 2, torch.ones(41), rtol=1e-5, atol=0)


def test_flow_models_train_on_a_logit_normal_t_and_a_shift_multiplies_sigma():
    plain = tiny_dit_config(preconditioning="rectified_flow")
    shifted = tiny_dit_config(preconditioning="rectified_flow", noise_schedule={"shift": 3.0})
    t = torch.tensor([0.01, 0.3, 0.5, 0.9], dtype=torch.float64)
    expected = torch.special.ndtr(torch.logit(t))  # SD3 (arXiv 2403.03206), section 3.1, m = 0, s = 1
    assert_close(plain.make_partition().noise.cdf(t / (1 - t)), expected, rtol=0, atol=1e-7)
    assert_close(shifted.make_partition().noise.cdf(3 * t / (1 - t)), expected, rtol=0, atol=1e-7)
    assert plain.make_partition().edges[0] == 999.0 and plain.make_partition().edges[-1] == 1 / 999


@pytest.mark.parametrize("kind", ["edm", "vp_epsilon", "rectified_flow"])
def test_what_the_network_is_told_leads_back_to_the_noise_level(kind):
    preconditioning = {
        "edm": EDMPreconditioning(),
        "vp_epsilon": vp("linear")[0],
        "rectified_flow": RectifiedFlowPreconditioning(),
    }[kind]
    sigma = SIGMAS[SIGMAS > 0.02]
    assert_close(preconditioning.sigma_of(preconditioning(sigma).c_noise), sigma, rtol=2e-4, atol=0)


def test_expanding_puts_one_value_beside_each_sample():
    assert expand(torch.arange(3.0), torch.zeros(3, 2, 4, 5)).shape == (3, 1, 1, 1)
    assert (expand(torch.arange(3.0), torch.ones(3, 2)) * torch.ones(3, 2)).tolist() == [[0, 0], [1, 1], [2, 2]]
