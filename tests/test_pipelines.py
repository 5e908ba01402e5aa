"""The pipeline: the same latents as diffusers' DiTPipeline, its files, its outputs and its errors."""

import copy
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor
from transformers import AutoModel

from hf_diffusionblocks import BlockedDiTModel, BlockedDiTPipeline
from hf_diffusionblocks.serialization import same_tensors
from tiny import NUM_CLASSES, perturbed, tiny_dit


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> BlockedDiTPipeline:
    return quiet(BlockedDiTPipeline(tiny_dit(3).eval()))


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=2,
    ).eval()


@pytest.fixture(scope="module")
def vae64(vae) -> AutoencoderKL:
    return copy.deepcopy(vae).double()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- diffusers' own pipeline -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 4], ids=["plain", "learned variance"])
def base(request) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        sample_size=8,
        in_channels=2,
        out_channels=request.param,
        patch_size=2,
        num_embeds_ada_norm=1000,  # DiTPipeline's null class is always 1000
    )
    # float64: an untrained network's latents grow to 400; the noise (z - D) / sigma at sigma = 0.01 would lose digits
    return perturbed(dit).double().eval()


class Recorder:
    """Records what a scheduler is given and what it gives, for the first `batch` samples."""

    def __init__(self, scheduler: Any, batch: int):
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []
        original, signature = scheduler.step, inspect.signature(scheduler.step)

        def step(model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
            result = original(model_output, timestep, sample, **kwargs)
            self.steps.append(tuple(t[:batch].clone() for t in (model_output, sample, result.prev_sample)))
            return result

        step.__signature__ = signature
        scheduler.step = step


LABELS = [3, 7, 1000]


def both(base, vae, scheduler_class, steps: int, guidance_scale: float, generator: bool = True) -> tuple[list, list]:
    """The steps of DiTPipeline and of the blocked pipeline made from it."""
    recorders = []
    for blocked in (False, True):
        scheduler = scheduler_class()
        recorders.append(Recorder(scheduler, len(LABELS)))
        pipe = DiTPipeline(base, vae, scheduler)
        if blocked:
            model = BlockedDiTModel.from_base(pipe, num_blocks=1, preconditioning="vp_epsilon")
            pipe = BlockedDiTPipeline(model, scheduler=scheduler, vae=vae)
        torch.manual_seed(0)
        quiet(pipe)(
            LABELS,
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            generator=seeded() if generator else None,
            output_type="np",
        )
    return recorders[0].steps, recorders[1].steps


def assert_steps_close(ours: list, theirs: list, tolerance: float = 1e-5) -> None:
    assert len(ours) == len(theirs)
    for mine, reference in zip(ours, theirs, strict=True):
        for a, b in zip(mine, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_one_block_gives_the_latents_of_diffusers_pipeline_step_by_step(base, vae64, steps, guidance_scale):
    theirs, ours = both(base, vae64, lambda: DDIMScheduler(clip_sample=False), steps, guidance_scale)
    assert len(ours) == steps
    assert_steps_close(ours, theirs)
    if guidance_scale > 1:  # the comparison would notice guidance
        plain = both(base, vae64, lambda: DDIMScheduler(clip_sample=False), steps, 1.0)[0]
        assert (plain[-1][0] - ours[-1][0]).abs().max() > 0.01


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda: DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
        lambda: DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        lambda: DDIMScheduler(clip_sample=True, beta_schedule="scaled_linear"),
        lambda: DDIMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2"),
        lambda: DDPMScheduler(clip_sample=False),
    ],
    ids=["trailing", "offset", "clipped", "cosine", "ddpm"],
)
def test_other_variance_preserving_schedulers_agree_too(base, vae64, scheduler):
    # Noise of stochastic schedulers comes from the global stream: DiTPipeline hands them no generator.
    theirs, ours = both(base, vae64, scheduler, 9, 1.0, generator=False)
    assert_steps_close(ours, theirs)


@pytest.mark.parametrize("scheduler_class", [EulerDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler])
@torch.no_grad()
def test_sigma_based_schedulers_take_the_steps_of_diffusers_own_loop(base, scheduler_class):
    # DiTPipeline hands these schedulers the scaled sample, so the reference is the loop that their documentation shows.
    reference = scheduler_class()
    expected = Recorder(reference, len(LABELS))
    reference.set_timesteps(9)
    labels = torch.tensor(LABELS)
    sample = torch.randn(len(LABELS), 2, 8, 8, generator=seeded(), dtype=torch.float64) * reference.init_noise_sigma
    for t in reference.timesteps:
        scaled = reference.scale_model_input(sample, t)
        output = base(scaled, timestep=t.expand(len(LABELS)), class_labels=labels).sample[:, :2]
        sample = reference.step(output, t, sample).prev_sample
    scheduler = scheduler_class()
    ours = Recorder(scheduler, len(LABELS))
    schedule = {name: scheduler.config[name] for name in ("num_train_timesteps", "beta_start", "beta_end")}
    model = BlockedDiTModel.from_base(base, num_blocks=1, preconditioning="vp_epsilon", noise_schedule=schedule)
    pipe = quiet(BlockedDiTPipeline(model, scheduler=scheduler))
    pipe(LABELS, guidance_scale=1.0, num_inference_steps=9, generator=seeded(), output_type="latent")
    # Their steps lie between training steps; sigma -> t is interpolated in log sigma here, in sigma there.
    assert_steps_close(ours.steps, expected.steps, tolerance=1e-4)


def test_decoded_images_agree(base, vae64):
    scheduler = DDIMScheduler(clip_sample=False)
    theirs = quiet(DiTPipeline(base, vae64, scheduler))
    model = BlockedDiTModel.from_base(theirs, num_blocks=1, preconditioning="vp_epsilon")
    ours = quiet(BlockedDiTPipeline(model, scheduler=scheduler, vae=vae64))
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0}
    for output_type in ("np", "pil"):
        expected = theirs(LABELS, generator=seeded(), output_type=output_type, **settings).images
        images = ours(LABELS, generator=seeded(), output_type=output_type, **settings).images
        difference = np.abs(np.stack(images).astype(float) - np.stack(expected).astype(float)).max()
        assert difference <= (1e-3 if output_type == "np" else 1)


# -- built-in solvers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver, per_step", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("grid", ["karras", "equal_probability"])
def test_steps_go_down_through_the_blocks_in_order(pipe, solver, per_step, grid):
    seen, evaluations = [], []
    run_block = pipe.model.run_block
    pipe.model.run_block = lambda block, *a, **k: (evaluations.append(block), run_block(block, *a, **k))[1]
    out = pipe(
        [1, 2],
        num_inference_steps=12,
        guidance_scale=1.0,
        solver=solver,
        grid=grid,
        output_type="latent",
        callback_on_step_end=lambda pipe, step, sigma, kwargs: seen.append(
            (step, sigma, kwargs["noisy"].shape, kwargs["denoised"].shape)
        ),
        callback_on_step_end_tensor_inputs=["noisy", "denoised"],
    ).images
    assert [s[0] for s in seen] == list(range(12))
    sigmas = [s[1] for s in seen]
    assert sigmas == sorted(sigmas, reverse=True)
    assert (sigmas[0], sigmas[-1]) == (pytest.approx(80.0), pytest.approx(0.002))
    assert {s[2:] for s in seen} == {((2, 1, 8, 8), (2, 1, 8, 8))}
    assert len(evaluations) == per_step * 12 - (per_step - 1)  # the step to 0 is an Euler step
    assert evaluations == sorted(evaluations) and set(evaluations) == {0, 1, 2}
    assert torch.isfinite(out).all() and out.shape == (2, 1, 8, 8)


def test_an_edm_scheduler_gives_what_the_built_in_euler_gives(pipe):
    settings = {"num_inference_steps": 10, "output_type": "latent"}
    expected = pipe([1, 2], generator=seeded(), **settings).images
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    driven = quiet(BlockedDiTPipeline(pipe.model, scheduler=scheduler))([1, 2], generator=seeded(), **settings).images
    torch.testing.assert_close(driven, expected, rtol=1e-3, atol=1e-3)


def test_guidance_mixes_labelled_and_unlabelled_estimates(pipe):
    first = {}
    for scale in (0.0, 1.0, 2.0):
        pipe(
            [4],
            num_inference_steps=1,
            guidance_scale=scale,
            generator=seeded(),
            callback_on_step_end=lambda p, i, t, kwargs, scale=scale: first.update({scale: kwargs["denoised"]}),
            callback_on_step_end_tensor_inputs=["denoised"],
        )
    assert (first[1.0] - first[0.0]).abs().max() > 1e-3
    torch.testing.assert_close(first[2.0], first[0.0] + 2 * (first[1.0] - first[0.0]), rtol=1e-4, atol=1e-5)
    pipe([NUM_CLASSES], num_inference_steps=1, guidance_scale=1.0, generator=seeded(), output_type="latent")


@pytest.mark.parametrize("scheduler", [None, EDMEulerScheduler(sigma_data=0.5)], ids=["euler", "edm scheduler"])
def test_the_callback_of_diffusers_sees_each_step_and_may_change_the_state(pipe, scheduler):
    driven, seen = quiet(BlockedDiTPipeline(pipe.model, scheduler)), []

    def record(given, step, timestep, callback_kwargs):
        assert given is driven and list(callback_kwargs) == ["latents"]
        seen.append((step, float(timestep), callback_kwargs["latents"]))
        return callback_kwargs

    settings = {"num_inference_steps": 4, "output_type": "latent"}
    out = driven([1, 2], generator=seeded(), callback_on_step_end=record, **settings).images
    assert [s[0] for s in seen] == [0, 1, 2, 3] and torch.equal(seen[-1][2], out)
    assert [s[1] for s in seen] == sorted((s[1] for s in seen), reverse=True)
    assert torch.equal(driven([1, 2], generator=seeded(), **settings).images, out)

    def erase(given, step, timestep, callback_kwargs):
        return {"latents": torch.zeros_like(callback_kwargs["latents"])} if step == 3 else {}

    assert not driven([1, 2], generator=seeded(), callback_on_step_end=erase, **settings).images.any()


@pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_multistep_schedulers_give_the_steps_of_diffusers_pipeline(base, vae64, scheduler_class, guidance_scale):
    theirs, ours = both(base, vae64, scheduler_class, 6, guidance_scale)
    assert len(ours) == 6
    assert_steps_close(ours, theirs, tolerance=1e-4)


# -- reproducibility ---------------------------------------------------------------------------------------------


def test_a_generator_decides_the_samples(pipe):
    def run(seed: int) -> Tensor:
        return pipe([1, 2, 3], num_inference_steps=4, generator=seeded(seed), output_type="latent").images

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_a_generator_per_sample_makes_each_sample_independent_of_the_batch(pipe):
    settings = {"num_inference_steps": 4, "output_type": "latent"}
    together = pipe([1, 2, 3], generator=[seeded(i) for i in range(3)], **settings).images
    alone = [pipe([label], generator=seeded(i), **settings).images for i, label in enumerate((1, 2, 3))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_a_list_of_generators_needs_one_per_sample(pipe):
    with pytest.raises(ValueError, match="2 generators"):
        pipe([1, 2, 3], generator=[seeded(0), seeded(1)], num_inference_steps=1)


def test_given_latents_are_the_start(pipe):
    settings = {"num_inference_steps": 4, "output_type": "latent"}
    latents = torch.randn(2, 1, 8, 8, generator=seeded(5))
    kept = latents.clone()
    first = pipe([1, 2], latents=latents, generator=seeded(0), **settings).images
    assert torch.equal(first, pipe([1, 2], generator=seeded(5), **settings).images)
    assert torch.equal(latents, kept)


def test_a_half_precision_model_starts_from_given_latents_and_comes_close(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    half = quiet(BlockedDiTPipeline.from_pretrained(tmp_path / "pipe", dtype=torch.bfloat16))
    assert half.model.dtype == torch.bfloat16
    settings = {"num_inference_steps": 4, "output_type": "latent", "latents": torch.randn(2, 1, 8, 8)}
    torch.testing.assert_close(half([1, 2], **settings).images, pipe([1, 2], **settings).images, rtol=0.05, atol=0.1)


# -- outputs -----------------------------------------------------------------------------------------------------


def test_the_output_types_hold_the_same_images(pipe):
    def run(output_type: str) -> Any:
        return pipe([1, 2], num_inference_steps=3, generator=seeded(), output_type=output_type).images

    latent, pt, array, pil = (run(t) for t in ("latent", "pt", "np", "pil"))
    assert torch.equal(pt, (latent / 2 + 0.5).clamp(0, 1)) and pt.shape == (2, 1, 8, 8)
    assert array.shape == (2, 8, 8, 1) and np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert [i.size for i in pil] == [(8, 8)] * 2 and pil[0].mode == "L"
    assert np.array_equal(np.array(pil[1]), (array[1, ..., 0] * 255).round().astype("uint8"))
    assert isinstance(pipe([1], num_inference_steps=1, return_dict=False), tuple)


@pytest.mark.parametrize("labels, count", [(3, 1), ([3], 1), (torch.tensor([3, 4]), 2), (range(3), 3), ((1, 2), 2)])
def test_labels_come_in_many_forms(pipe, labels, count):
    assert len(pipe(labels, num_inference_steps=1).images) == count


def test_latents_are_decoded_by_the_vae(vae):
    pipe = quiet(BlockedDiTPipeline(tiny_dit(2, 2, base_config={"in_channels": 2}), vae=vae))
    latent = pipe([1], num_inference_steps=2, generator=seeded(), output_type="latent").images
    image = pipe([1], num_inference_steps=2, generator=seeded(), output_type="pt").images
    assert image.shape == (1, 3, 16, 16)
    with torch.no_grad():
        expected = vae.decode(latent / vae.config.scaling_factor).sample
    torch.testing.assert_close(image, (expected / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode_and_gets_no_gradients(pipe, training):
    pipe.model.train(training)
    assert not pipe([1], num_inference_steps=1, output_type="pt").images.requires_grad
    assert pipe.model.training == training
    with pytest.raises(ValueError):
        pipe([99], num_inference_steps=1)
    assert pipe.model.training == training


def test_it_is_a_diffusion_pipeline(pipe):
    assert set(pipe.components) == {"model", "scheduler", "vae"}
    assert pipe.to(torch.float64).model.dtype == torch.float64
    assert pipe.device == torch.device("cpu")


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels, settings, message",
    [
        ([11], {}, "class_labels run from 10 to 11|class_labels run from 11 to 11"),
        ([-1, 3], {}, "class_labels run from -1"),
        ([0.5], {}, "give whole numbers"),
        ([], {}, "class_labels is empty"),
        ([1], {"solver": "eulr"}, "unknown solver 'eulr': did you mean 'euler'"),
        ([1], {"grid": "karas"}, "unknown grid 'karas': did you mean 'karras'"),
        ([1], {"output_type": "jpeg"}, "output_type='jpeg' must be 'pil', 'np', 'pt' or 'latent'"),
        ([1], {"num_inference_steps": 0}, "num_inference_steps=0 must be a whole number of at least 1"),
        ([1], {"guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number"),
        ([1], {"latents": torch.full((1, 1, 8, 8), float("nan"))}, "latents holds values that are not finite"),
        (
            [1],
            {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["latent"]},
            "unknown callback_on_step_end_tensor_inputs 'latent': did you mean 'latents'",
        ),
        ([1], {"num_inference_steps": -3}, "num_inference_steps=-3 must be"),
        ([1], {"latents": torch.zeros(1, 1, 8, 9)}, r"latents has shape \[1, 1, 8, 9\]; give .* \[1, 1, 8, 8\]"),
        ([1, 2], {"latents": torch.zeros(1, 1, 8, 8)}, r"latents has shape \[1, 1, 8, 8\]; give .* \[2, 1, 8, 8\]"),
    ],
)
def test_calls_that_are_refused(pipe, labels, settings, message):
    with pytest.raises(ValueError, match=message):
        pipe(labels, **({"num_inference_steps": 2} | settings))


def test_sampling_needs_every_block():
    pipe = quiet(BlockedDiTPipeline(tiny_dit(3, blocks=[1])))
    with pytest.raises(ValueError, match=r"sampling needs every block; not loaded: \[0, 2\]"):
        pipe([1], num_inference_steps=2)


def test_a_scheduler_beyond_the_models_noise_range_is_refused_before_any_work(pipe):
    pipe.model.run_block = lambda *a, **k: pytest.fail("the network ran")
    driven = quiet(BlockedDiTPipeline(pipe.model, scheduler=EulerDiscreteScheduler()))
    with pytest.raises(ValueError, match=r"sigma=157\.4.* is outside the noise range \[0.002, 80.0\]"):
        driven([1], num_inference_steps=5)


# -- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [None, EDMEulerScheduler(sigma_data=0.5)], ids=["none", "edm"])
@pytest.mark.parametrize("with_vae", [False, True])
def test_save_and_load_give_the_same_samples(vae, tmp_path, scheduler, with_vae):
    channels = {"in_channels": 2} if with_vae else {}
    pipe = quiet(BlockedDiTPipeline(tiny_dit(2, 2, base_config=channels), scheduler, vae if with_vae else None))
    pipe.save_pretrained(tmp_path / "pipe")
    folders = {p.name for p in (tmp_path / "pipe").iterdir() if p.is_dir()}
    assert folders == set(["scheduler"] * (scheduler is not None) + ["vae"] * with_vae)
    loaded = quiet(BlockedDiTPipeline.from_pretrained(tmp_path / "pipe"))
    assert type(loaded.scheduler) is type(scheduler) and (loaded.vae is not None) == with_vae
    assert same_tensors(loaded.model.state_dict(), pipe.model.state_dict())
    settings = {"num_inference_steps": 3, "output_type": "pt"}
    images = [p([1], generator=seeded(), **settings).images for p in (pipe, loaded)]
    assert torch.equal(*images)
    assert same_tensors(AutoModel.from_pretrained(tmp_path / "pipe").state_dict(), pipe.model.state_dict())


def test_a_bare_models_directory_is_a_pipeline_without_scheduler(tmp_path):
    tiny_dit(2, 2).save_pretrained(tmp_path / "model")
    pipe = quiet(BlockedDiTPipeline.from_pretrained(tmp_path / "model"))
    assert pipe.scheduler is None and pipe.vae is None
    assert len(pipe([1, 2], num_inference_steps=2).images) == 2


def test_components_may_be_given_instead_of_the_saved_ones(tmp_path):
    pipe = BlockedDiTPipeline(tiny_dit(2, 2), EDMEulerScheduler())
    pipe.save_pretrained(tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / "scheduler")
    assert BlockedDiTPipeline.from_pretrained(tmp_path / "pipe", scheduler=None).scheduler is None
    given = tiny_dit(2, 2, seed=9)
    loaded = BlockedDiTPipeline.from_pretrained(tmp_path / "pipe", model=given, scheduler=None)
    assert loaded.model is given


@pytest.mark.parametrize(
    "entry",
    [
        ["os", "system"],
        ["diffusers", "DiTTransformer2DModel"],
        ["diffusers", "load_image"],
        ["diffusers", "NoSuchScheduler"],
        ["evil", "EDMEulerScheduler"],
    ],
)
def test_a_model_index_cannot_name_anything_but_a_scheduler(tmp_path, entry):
    BlockedDiTPipeline(tiny_dit(1, 1), EDMEulerScheduler()).save_pretrained(tmp_path / "pipe")
    path = tmp_path / "pipe" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scheduler": entry}))
    with pytest.raises(ValueError, match=rf"model_index.json names {entry[0]}.{entry[1]} as scheduler"):
        BlockedDiTPipeline.from_pretrained(tmp_path / "pipe")


def test_broken_files_are_named(tmp_path):
    BlockedDiTPipeline(tiny_dit(1, 1)).save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe" / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="model_index.json is not valid JSON"):
        BlockedDiTPipeline.from_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe" / "block-00.safetensors").unlink()
    with pytest.raises(ValueError, match=r"block-00.safetensors \(block 0\) is missing"):
        BlockedDiTPipeline.from_pretrained(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a directory"):
        BlockedDiTPipeline.from_pretrained(tmp_path / "nothing")


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # diffusers' own call
def test_a_pipeline_of_the_hub_loads_from_the_cache(tmp_path):
    pipe = quiet(BlockedDiTPipeline(tiny_dit(2, 2), EDMEulerScheduler(sigma_data=0.5)))
    repo = tmp_path / "cache" / "models--someone--tiny"
    snapshot: Path = repo / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    pipe.save_pretrained(snapshot)
    loaded = quiet(BlockedDiTPipeline.from_pretrained("someone/tiny", cache_dir=tmp_path / "cache"))
    settings = {"num_inference_steps": 3, "output_type": "pt"}
    images = [p([1], generator=seeded(), **settings).images for p in (pipe, loaded)]
    assert torch.equal(*images)
