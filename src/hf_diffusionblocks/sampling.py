r"""Sampling: from noise through the blocks to a sample.

The probability-flow ODE ``dz/dsigma = (z - D(z, sigma)) / sigma`` is solved from ``sigma_max`` down (EDM,
arXiv 2206.00364, Alg. 2 without churn). The Euler step is

.. math:: z' = z + (\sigma' - \sigma)\,(z - D) / \sigma = (\sigma' / \sigma)\, z + (1 - \sigma' / \sigma)\, D

(the paper's Eq. 3-4 as rendered have the opposite sign, under which noise would grow). Every network evaluation takes
the block that owns its noise level, so a step costs one block.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .noise import equal_probability_grid, karras_grid
from .partition import BlockPartition
from .suggest import unknown_name

GRIDS = ("karras", "equal_probability")
SOLVERS = ("euler", "heun")


Denoise = Callable[[Tensor, float], Tensor]
"""``denoise(z, sigma) -> D``: z [batch, ...], sigma a number, D of the shape of z."""

Callback = Callable[[int, float, Tensor, Tensor], None]
"""``callback(step, sigma, z, denoised)`` after each evaluation that begins a step."""

StepEnd = Callable[[int, Any, dict[str, Tensor]], Tensor]
"""``on_step_end(step, timestep, tensors) -> state`` after each step: ``tensors`` has the new state as ``latents``, and
the ``noisy`` z and the ``denoised`` D that the step began with. What it returns is gone on with."""


def make_grid(partition: BlockPartition, num_inference_steps: int, kind: str = "karras") -> Float[Tensor, "points"]:
    """Noise levels of a sampler: ``num_inference_steps`` levels and a final zero.

    Args:
        partition: gives the noise range and distribution.
        num_inference_steps: N >= 1, number of steps; each starts with one evaluation.
        kind: ``karras`` (EDM, Eq. 5, rho = 7) or ``equal_probability`` (arXiv 2506.14202, section 3.3).

    Returns:
        float64 tensor [N + 1], descending from ``sigma_max`` over ``sigma_min`` to 0.

    Raises:
        ValueError: for an unknown kind or fewer than 1 step.
    """
    noise = partition.noise
    if kind == "karras":
        grid = karras_grid(num_inference_steps, noise.sigma_min, noise.sigma_max)
    elif kind == "equal_probability":
        grid = equal_probability_grid(num_inference_steps, noise)  # type: ignore[arg-type]  # of sigma, not of mask rates
    else:
        raise ValueError(unknown_name("grid", kind, GRIDS))
    return torch.cat([grid, grid.new_zeros(1)])


def sample_euler(
    denoise: Denoise,
    z: Tensor,
    sigmas: Float[Tensor, "points"],
    callback: Callback | None = None,
    on_step_end: StepEnd | None = None,
) -> Tensor:
    """Euler's method (EDM, arXiv 2206.00364, Alg. 1 without the correction), first order.

    Args:
        denoise: the denoiser.
        z: start, ``sigmas[0]`` times standard normal noise, [batch, ...].
        sigmas: descending noise levels [points]; the last may be 0.
        callback: called after each evaluation.
        on_step_end: called after each step; the noise level is its timestep.

    Returns:
        The state at the last noise level, the shape of ``z``.
    """
    levels = sigmas.tolist()
    for step, (sigma, sigma_next) in enumerate(zip(levels, levels[1:], strict=False)):
        denoised = denoise(z, sigma)
        if callback is not None:
            callback(step, sigma, z, denoised)
        # z' = z + (sigma' - sigma) (z - D) / sigma   (EDM, Alg. 2, lines 7-8)
        noisy, z = z, z + (sigma_next - sigma) * (z - denoised) / sigma
        if on_step_end is not None:
            z = on_step_end(step, sigma, {"latents": z, "noisy": noisy, "denoised": denoised})
    return z


def sample_heun(
    denoise: Denoise,
    z: Tensor,
    sigmas: Float[Tensor, "points"],
    callback: Callback | None = None,
    on_step_end: StepEnd | None = None,
) -> Tensor:
    """Heun's method (EDM, arXiv 2206.00364, Alg. 2 without churn), second order, two evaluations a step.

    Arguments and result as in ``sample_euler``. A step to 0 is an Euler step.
    """
    levels = sigmas.tolist()
    for step, (sigma, sigma_next) in enumerate(zip(levels, levels[1:], strict=False)):
        denoised = denoise(z, sigma)
        if callback is not None:
            callback(step, sigma, z, denoised)
        slope = (z - denoised) / sigma
        proposal = z + (sigma_next - sigma) * slope
        if sigma_next > 0:
            # trapezoidal correction   (EDM, Alg. 2, line 11)
            slope_next = (proposal - denoise(proposal, sigma_next)) / sigma_next
            proposal = z + (sigma_next - sigma) * (slope + slope_next) / 2
        noisy, z = z, proposal
        if on_step_end is not None:
            z = on_step_end(step, sigma, {"latents": z, "noisy": noisy, "denoised": denoised})
    return z


def make_solver(name: str) -> Callable[..., Tensor]:
    """The solver of a name, ``euler`` or ``heun``.

    Raises:
        ValueError: for another name.
    """
    solvers = {"euler": sample_euler, "heun": sample_heun}
    if name not in solvers:
        raise ValueError(unknown_name("solver", name, SOLVERS))
    return solvers[name]


def guided(denoise: Callable[..., Tensor], class_labels: Tensor, null_class: int, scale: float) -> Denoise:
    """Classifier-free guidance (arXiv 2207.12598): ``D = D_null + scale (D_label - D_null)``.

    Args:
        denoise: ``denoise(z, sigma, class_labels=...)``.
        class_labels: [batch].
        null_class: label that stands for no class.
        scale: guidance scale; 1 is the conditional model alone and costs one evaluation, 0 the unconditional one.
    """
    if scale == 1:
        return lambda z, sigma: denoise(z, sigma, class_labels=class_labels)
    null = torch.full_like(class_labels, null_class)
    if scale == 0:
        return lambda z, sigma: denoise(z, sigma, class_labels=null)
    both = torch.cat([class_labels, null])

    def guided_denoise(z: Tensor, sigma: float) -> Tensor:
        labelled, unlabelled = denoise(torch.cat([z, z]), sigma, class_labels=both).chunk(2)
        return unlabelled + scale * (labelled - unlabelled)

    return guided_denoise


def sample_with_scheduler(
    denoise: Denoise,
    scheduler: Any,
    partition: BlockPartition,
    noise: Tensor,
    num_inference_steps: int,
    callback: Callback | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    progress: Callable[[Any], Any] = iter,
    on_step_end: StepEnd | None = None,
) -> Tensor:
    """Sample with a diffusers scheduler; the scheduler steps, the partition routes.

    Four kinds are known. *EDM-style* (``EDMEulerScheduler``, ``EDMDPMSolverMultistepScheduler``): state
    ``y + sigma eps``, the network's raw output goes in. *Sigma-based* (``EulerDiscreteScheduler``,
    ``HeunDiscreteScheduler``, ``EulerAncestralDiscreteScheduler``, ...): the same state. *Variance preserving*
    (``DDIMScheduler``, ``DDPMScheduler``): state ``sqrt(alpha_bar) (y + sigma eps)``. *Multistep*
    (``DPMSolverMultistepScheduler``, ``UniPCMultistepScheduler``): the same state, with sigmas of their own.

    Args:
        denoise: the denoiser D(z, sigma).
        scheduler: the scheduler; its noise levels must lie in the partition's range.
        partition: its range is checked before anything is computed.
        noise: standard normal noise [batch, ...].
        num_inference_steps: steps.
        callback: called after each evaluation.
        generator: for stochastic schedulers.
        progress: wraps the iterable of timesteps in a progress bar.
        on_step_end: called after each step, with the scheduler's timestep and state.

    Returns:
        The sample, the shape of ``noise``.

    Raises:
        ValueError: for a scheduler of another kind or noise levels beyond the model's range.
    """
    kind = _scheduler_kind(scheduler)
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    timesteps = scheduler.timesteps
    if kind == "variance_preserving":
        alphas = scheduler.alphas_cumprod.double()
        levels = [float(((1 - alphas[int(t)]) / alphas[int(t)]).sqrt()) for t in timesteps]
    else:
        # Heun-like schedulers evaluate some noise levels twice and list sigmas accordingly, one per timestep.
        levels = [float(s) for s in scheduler.sigmas[: len(timesteps)]]
    for level in levels:
        try:
            partition.check_sigma(level)
        except ValueError as error:
            raise ValueError(f"{error} {_how_to_fit(scheduler, partition)}") from error
    preserving = kind in ("variance_preserving", "multistep")
    state = noise * (1.0 if preserving else levels[0])  # z ~ sigma_max N(0, I)
    extra = _step_arguments(scheduler, generator)
    for step, t in enumerate(progress(timesteps)):
        sigma = levels[step]
        scale = (1 + sigma**2) ** 0.5 if preserving else 1.0
        scheduler.scale_model_input(state, t)  # lets schedulers with a step counter find their place
        z = state * scale
        denoised = denoise(z, sigma).to(state.dtype)
        if callback is not None:
            callback(step, sigma, z, denoised)
        output = _model_output(scheduler, kind, z, denoised, sigma)
        state = scheduler.step(output, t, state, **extra).prev_sample
        if on_step_end is not None:
            state = on_step_end(step, t, {"latents": state, "noisy": z, "denoised": denoised})
    return state


# Schedulers that were tried on an exact denoiser, and what their state is. Others look alike but step otherwise.
_SCHEDULER_KINDS = {
    "EDMEulerScheduler": "edm",
    "EDMDPMSolverMultistepScheduler": "edm",
    "EulerDiscreteScheduler": "sigma",
    "EulerAncestralDiscreteScheduler": "sigma",
    "HeunDiscreteScheduler": "sigma",
    "LMSDiscreteScheduler": "sigma",
    "DDIMScheduler": "variance_preserving",
    "DDPMScheduler": "variance_preserving",
    "DPMSolverMultistepScheduler": "multistep",
    "UniPCMultistepScheduler": "multistep",
}
# Those that take their noise levels from sigma_min and sigma_max, the second with Karras' levels only.
_TAKES_RANGE = {"EDMEulerScheduler": "", "EDMDPMSolverMultistepScheduler": "", "EulerDiscreteScheduler": "karras"}


def _how_to_fit(scheduler: Any, partition: BlockPartition) -> str:
    """How a scheduler is brought into the model's noise range."""
    name = type(scheduler).__name__
    bounds = f"sigma_min={partition.noise.sigma_min:g}, sigma_max={partition.noise.sigma_max:g}"
    if name in _TAKES_RANGE:
        karras = "use_karras_sigmas=True, " if _TAKES_RANGE[name] else ""
        return f"Make the scheduler with {name}({karras}{bounds})."
    return (
        f"{name} takes its noise levels from its betas, for networks of preconditioning='vp_epsilon': use "
        f"EDMEulerScheduler({bounds}) or EulerDiscreteScheduler(use_karras_sigmas=True, {bounds}), or the built-in "
        "solvers (scheduler=None)."
    )


def _scheduler_kind(scheduler: Any) -> str:
    for cls in type(scheduler).__mro__:
        if cls.__name__ in _SCHEDULER_KINDS:
            kind = _SCHEDULER_KINDS[cls.__name__]
            flow = scheduler.config.get("use_flow_sigmas") or scheduler.config.prediction_type == "flow_prediction"
            if kind == "multistep" and flow:
                raise ValueError(
                    f"{cls.__name__} with use_flow_sigmas or prediction_type='flow_prediction' steps along a straight "
                    "path, not the one of y + sigma eps: leave both out."
                )
            return kind
    raise ValueError(
        f"{type(scheduler).__name__} cannot drive a blocked denoiser: use an EDM-style scheduler (EDMEulerScheduler, "
        "EDMDPMSolverMultistepScheduler), a sigma-based one (EulerDiscreteScheduler, HeunDiscreteScheduler, …), "
        "DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler, or the built-in solvers "
        "(scheduler=None)."
    )


def _model_output(scheduler: Any, kind: str, z: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    prediction = scheduler.config.prediction_type
    if kind == "edm":
        # invert the scheduler's own preconditioning, D = c_skip z + c_out F
        sigma_data = scheduler.config.sigma_data
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
        c_out = -c_out if prediction == "v_prediction" else c_out
        return (denoised - c_skip * z) / c_out
    epsilon = (z - denoised) / sigma
    if prediction == "epsilon":
        return epsilon
    if prediction in ("sample", "original_sample"):
        return denoised
    if prediction == "v_prediction":  # v = alpha eps - sqrt(1 - alpha^2) y,  alpha = 1 / sqrt(1 + sigma^2)
        return (epsilon - sigma * denoised) / (1 + sigma**2) ** 0.5
    raise ValueError(unknown_name("prediction_type", prediction, ("epsilon", "sample", "v_prediction")))


def _step_arguments(scheduler: Any, generator: Any) -> dict[str, Any]:
    import inspect

    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
