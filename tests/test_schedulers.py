"""diffusers' schedulers on an exact denoiser: each one leads to the data, or is refused before the network runs."""

import inspect
import warnings

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hf_diffusionblocks.noise import LogNormalNoise
from hf_diffusionblocks.partition import BlockPartition
from hf_diffusionblocks.sampling import make_grid, sample_euler, sample_with_scheduler
from test_sampling import GAUSSIAN, PARTITION, Routed

# Wide enough for the noise levels of every scheduler's default schedule.
WIDE = BlockPartition.equal_probability(3, 6, LogNormalNoise(sigma_min=1e-3, sigma_max=2000.0))
ACCEPTED = {
    "EDMEulerScheduler": {},
    "EDMDPMSolverMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
}
STOCHASTIC = {"EulerAncestralDiscreteScheduler", "DDPMScheduler"}
REFUSED = [
    "FlowMatchEulerDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "IPNDMScheduler",
]


def make_scheduler(name: str, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(diffusers, name)(**ACCEPTED.get(name, {}) | settings)


def standard_normal(n: int = 4000, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(seed))


def assert_follows_the_data(samples: Tensor) -> None:
    # 250 steps leave a first-order method 0.014 short of the standard deviation
    assert float(samples.mean()) == pytest.approx(0.2, abs=0.02)
    assert float(samples.std()) == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("name", ACCEPTED)
def test_schedulers_drive_the_exact_denoiser_to_the_data(name):
    seen = []
    samples = sample_with_scheduler(
        GAUSSIAN.denoise,
        make_scheduler(name),
        WIDE,
        standard_normal(),
        250,
        generator=torch.Generator().manual_seed(1),
        callback=lambda step, sigma, z, denoised: seen.append((step, sigma, z, denoised)),
    )
    assert_follows_the_data(samples)
    assert [step for step, *_ in seen] == list(range(len(seen)))
    _, sigma, z, denoised = seen[0]
    assert float(z.std()) == pytest.approx(sigma, rel=0.05)
    assert_close(denoised, GAUSSIAN.denoise(z, sigma))
    if name not in STOCHASTIC:  # sample by sample what the ODE says
        exact = GAUSSIAN.solution(z, sigma, 0.0)
        assert float((samples - exact).abs().max()) < 0.03


@pytest.mark.parametrize("name", ACCEPTED)
def test_schedulers_visit_the_blocks_in_order(name):
    routed = Routed(WIDE, [GAUSSIAN.denoise] * 3)
    sample_with_scheduler(routed, make_scheduler(name), WIDE, standard_normal(2), 30)
    assert routed.visits == sorted(routed.visits) and set(routed.visits) == {0, 1, 2}


@pytest.mark.parametrize("num_steps", [1, 7, 40])
def test_the_edm_euler_scheduler_equals_the_euler_solver(num_steps):
    scheduler = make_scheduler("EDMEulerScheduler")
    noise = standard_normal(64)
    got = sample_with_scheduler(GAUSSIAN.denoise, scheduler, PARTITION, noise, num_steps)
    grid = scheduler.sigmas.double()
    assert_close(got, sample_euler(GAUSSIAN.denoise, noise * grid[0], grid).float(), rtol=1e-4, atol=2e-5)
    if num_steps > 1:  # and its grid is ours
        assert_close(grid, make_grid(PARTITION, num_steps), rtol=1e-5, atol=0)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("num_steps", [1, 10, 50])
def test_ddim_equals_the_euler_solver_on_its_noise_levels(spacing, num_steps):
    scheduler = make_scheduler("DDIMScheduler", timestep_spacing=spacing)
    noise = standard_normal(64)
    got = sample_with_scheduler(GAUSSIAN.denoise, scheduler, WIDE, noise, num_steps)
    alphas = scheduler.alphas_cumprod[scheduler.timesteps].double()
    grid = torch.cat([((1 - alphas) / alphas).sqrt(), torch.zeros(1, dtype=torch.float64)])
    # DDIM starts from N(0, I) = sqrt(alpha_bar) z
    z = noise.double() * (1 + grid[0] ** 2).sqrt()
    assert_close(got, sample_euler(GAUSSIAN.denoise, z, grid).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        ("EDMEulerScheduler", "v_prediction"),
        ("EDMDPMSolverMultistepScheduler", "v_prediction"),
        ("EulerDiscreteScheduler", "v_prediction"),
        ("EulerDiscreteScheduler", "original_sample"),
        ("EulerAncestralDiscreteScheduler", "v_prediction"),
        ("HeunDiscreteScheduler", "v_prediction"),
        ("DDIMScheduler", "sample"),
        ("DDIMScheduler", "v_prediction"),
        ("DDPMScheduler", "sample"),
        ("DDPMScheduler", "v_prediction"),
        ("DPMSolverMultistepScheduler", "sample"),
        ("DPMSolverMultistepScheduler", "v_prediction"),
        ("UniPCMultistepScheduler", "v_prediction"),
    ],
)
def test_the_prediction_type_makes_no_difference(name, prediction):
    plain, other = (
        sample_with_scheduler(
            GAUSSIAN.denoise,
            make_scheduler(name, prediction_type=kind),
            WIDE,
            standard_normal(64),
            20,
            generator=torch.Generator().manual_seed(3),
        )
        for kind in ("epsilon", prediction)
    )
    assert_close(other, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_stochastic_schedulers_draw_from_the_generator(name):
    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample_with_scheduler(
            GAUSSIAN.denoise, make_scheduler(name), WIDE, standard_normal(4), 10, generator=generator
        )

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_scheduler_can_be_used_again(name):
    scheduler = make_scheduler(name)
    first, _, again = (
        sample_with_scheduler(
            GAUSSIAN.denoise, scheduler, WIDE, standard_normal(8), n, generator=torch.Generator().manual_seed(0)
        )
        for n in (12, 5, 12)
    )
    assert torch.equal(first, again)


def test_progress_wraps_the_steps():
    lengths = []

    def progress(timesteps):
        lengths.append(len(timesteps))
        return timesteps

    scheduler = make_scheduler("EDMEulerScheduler")
    sample_with_scheduler(GAUSSIAN.denoise, scheduler, PARTITION, standard_normal(2), 9, progress=progress)
    assert lengths == [9]


def never(z: Tensor, sigma: float) -> Tensor:
    raise AssertionError("the network was evaluated")


@pytest.mark.parametrize("name", REFUSED)
def test_schedulers_of_another_kind_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} cannot drive a blocked denoiser: use .*EDMEulerScheduler"):
        sample_with_scheduler(never, make_scheduler(name), PARTITION, standard_normal(2), 10)


@pytest.mark.parametrize(
    ("name", "settings", "level"),
    [
        ("EDMEulerScheduler", {"sigma_max": 160.0}, 160),
        ("EDMEulerScheduler", {"sigma_min": 0.0005}, 0.001643),  # the first level that is too low
        ("EDMDPMSolverMultistepScheduler", {"sigma_max": 81.0}, 81),
        ("EulerDiscreteScheduler", {}, 157.4),
        ("EulerAncestralDiscreteScheduler", {}, 157.4),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}, 157.4),
        ("DDPMScheduler", {}, 130.1),
    ],
)
def test_a_scheduler_that_leaves_the_noise_range_is_refused_before_the_network_runs(name, settings, level):
    with pytest.raises(ValueError, match=r"outside the noise range \[0.002, 80.0\]") as refused:
        sample_with_scheduler(never, make_scheduler(name, **settings), PARTITION, standard_normal(2), 50)
    named = float(str(refused.value).split()[0].removeprefix("sigma="))
    assert named == pytest.approx(level, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("EDMEulerScheduler", {}),
        ("EDMDPMSolverMultistepScheduler", {}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("LMSDiscreteScheduler", None),
        ("EulerAncestralDiscreteScheduler", None),
        ("DPMSolverMultistepScheduler", None),
    ],
)
def test_the_refusal_says_how_to_mend_it_and_the_advice_works(name, advice):
    outside = {"sigma_max": 200.0} if name.startswith("EDM") else {}
    with pytest.raises(ValueError, match="outside the noise range") as refused:
        sample_with_scheduler(never, make_scheduler(name, **outside), PARTITION, standard_normal(2), 20)
    message, bounds = str(refused.value), {"sigma_min": 0.002, "sigma_max": 80.0}
    assert "sigma_min=0.002, sigma_max=80" in message
    if advice is None:
        assert "vp_epsilon" in message
        name, advice = "EulerDiscreteScheduler", {"use_karras_sigmas": True}
    assert f"{name}({'use_karras_sigmas=True, ' if advice else ''}sigma_min=0.002, sigma_max=80)" in message
    mended = make_scheduler(name, **advice, **bounds)
    samples = sample_with_scheduler(GAUSSIAN.denoise, mended, PARTITION, standard_normal(), 60)
    assert float(samples.std()) == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_multistep_scheduler_on_a_flow_is_refused(name):
    scheduler = make_scheduler(name, use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="use_flow_sigmas"):
        sample_with_scheduler(never, scheduler, WIDE, standard_normal(2), 10)


# -- every scheduler of diffusers: right, or refused -------------------------------------------------------------


def constructible_schedulers() -> list[str]:
    names = []
    for name in dir(diffusers):
        if name.endswith("Scheduler") and name not in (*ACCEPTED, *REFUSED):
            parameters = list(inspect.signature(getattr(diffusers, name).__init__).parameters.values())[1:]
            dummy = getattr(getattr(diffusers, name), "_backends", None)  # a dependency is not installed
            if not dummy and all(
                p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
            ):
                names.append(name)
    return names


@pytest.mark.parametrize("name", constructible_schedulers())
def test_any_other_scheduler_drives_the_exact_denoiser_to_the_data_or_is_refused(name):
    settings = inspect.signature(getattr(diffusers, name).__init__).parameters
    try:
        scheduler = make_scheduler(name, **{"clip_sample": False} if "clip_sample" in settings else {})
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    levels, implied = [], []
    inner = scheduler.scale_model_input if hasattr(scheduler, "scale_model_input") else None

    def scale_model_input(sample: Tensor, *args):
        scaled = inner(sample, *args)
        implied.append(float(sample.norm() / scaled.norm()))
        return scaled

    scheduler.scale_model_input = scale_model_input
    try:
        samples = sample_with_scheduler(
            GAUSSIAN.denoise,
            scheduler,
            WIDE,
            standard_normal(),
            250,
            generator=torch.Generator().manual_seed(1),
            callback=lambda step, sigma, z, denoised: levels.append(sigma),
        )
    except ValueError as refused:
        assert f"{name} cannot drive a blocked denoiser" in str(refused)
        assert not levels, "refused only after the network ran"
        return
    assert_follows_the_data(samples)
    if any(scale != 1 for scale in implied):  # a sigma-based one tells which level its state has
        np.testing.assert_allclose((1 + np.array(levels) ** 2) ** 0.5, implied, rtol=1e-4)
