"""Models of prompts (PixArt, SD3, Flux): cutting, denoising, diffusers' own pipelines, training and files."""

import copy
import json
from typing import Any

import pytest
import torch
from diffusers import (
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    PixArtAlphaPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from hf_diffusionblocks import (
    BlockedDiTPipeline,
    DiffusionBlocksTrainer,
    DiffusionBlocksTrainingArguments,
    plan_memory,
)
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.compute import training_flops
from hf_diffusionblocks.families.dit import BlockedDiTModel
from hf_diffusionblocks.families.loading import blocked_config_of
from hf_diffusionblocks.families.transformer_classes import TRANSFORMER_CLASSES, pack, unpack
from hf_diffusionblocks.memory_counting import KINDS, measure_memory
from hf_diffusionblocks.objectives import DenoisingScoreMatching, held_out_loss
from hf_diffusionblocks.serialization import same_tensors
from tiny import as_users_run, tiny_dit, tiny_vae
from tiny_prompts import (
    BATCH,
    CLASSES,
    CONFIGS,
    FLUX,
    LENGTH,
    PIXART,
    SD3,
    TinyPrompts,
    base_of,
    prompts,
    tiny_prompted,
)

NAMES = [PIXART, SD3, FLUX]
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def noise() -> Tensor:
    return torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def raw(network: ModelMixin, x: Tensor, timestep: Tensor, given: dict[str, Any]) -> Tensor:
    """A base's own call, as its pipeline makes it, on images of one channel."""
    if not isinstance(network, FluxTransformer2DModel):
        arguments = given if isinstance(network, SD3Transformer2DModel) else given | {"added_cond_kwargs": {}}
        return network(x, timestep=timestep, **arguments).sample[:, :1]
    ids = FluxPipeline._prepare_latent_image_ids(BATCH, 4, 4, x.device, x.dtype)
    rows = FluxPipeline._pack_latents(x, BATCH, 1, 8, 8)
    output = network(rows, timestep=timestep / 1000, img_ids=ids, txt_ids=torch.zeros(LENGTH, 3), **given).sample
    return FluxPipeline._unpack_latents(output, 8, 8, 1)


# -- denoising ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_block_with_rectified_flow_is_the_bases_velocity(name):
    base, given = base_of(name), prompts(name)
    model = BlockedDiTModel.from_base(base, num_blocks=1, preconditioning="rectified_flow")
    for t in (0.002, 0.25, 0.5, 0.998):
        x = noise()  # the base's own state x_t = (1 - t) y + t eps; z = x_t / (1 - t)
        velocity = raw(base, x, torch.full((BATCH,), 1000 * t), given)
        denoised = model.denoise(x / (1 - t), t / (1 - t), **given)
        torch.testing.assert_close(denoised, x - t * velocity, rtol=1e-4, atol=2e-5)
        beside = raw(base, x, torch.full((BATCH,), 1000 * t - 1), given)
        assert (beside - velocity).abs().max() > 1e-3  # a wrong timestep would be seen


@torch.no_grad()
def test_pixart_with_vp_epsilon_is_the_bases_noise_prediction():
    base, given = base_of(PIXART), prompts(PIXART)
    model = BlockedDiTModel.from_base(base, num_blocks=1, preconditioning="vp_epsilon", noise_schedule=BETAS)
    alphas = DPMSolverMultistepScheduler(**BETAS).alphas_cumprod.double()
    for step in (0, 17, 999):
        sigma = ((1 - alphas[step]) / alphas[step]).sqrt().float()
        epsilon = raw(base, noise(), torch.full((BATCH,), step), given)
        z = noise() * (1 + sigma**2).sqrt()
        torch.testing.assert_close((z - model.denoise(z, sigma, **given)) / sigma, epsilon, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers_per_block", [[2, 2, 2], [1, 4, 1], [5, 1]])
@torch.no_grad()
def test_a_block_is_the_base_with_its_layers_alone(name, layers_per_block):
    base, given = base_of(name), prompts(name)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    model = BlockedDiTModel.from_base(base, layers_per_block=layers_per_block, preconditioning="edm")
    lists = [attribute for _, attribute in TRANSFORMER_CLASSES[name].layer_lists]
    t = torch.tensor([0.1, 0.3, -1.0, 0.2])
    for block in range(len(layers_per_block)):
        cut, offset = copy.deepcopy(base), 0
        for attribute in lists:  # the stem and the head of the base around the block's layers
            whole = getattr(base, attribute)
            numbers = [i for i in range(len(whole)) if offset + i in model.partition.layers(block)]
            setattr(cut, attribute, torch.nn.ModuleList(getattr(cut, attribute)[i] for i in numbers))
            offset += len(whole)
        ours = model.run_block(block, noise(), t, **given)
        torch.testing.assert_close(ours, raw(cut, noise(), t, given), rtol=1e-5, atol=1e-5)
        back = model.to_base(block=block)
        torch.testing.assert_close(raw(back, noise(), t, given), ours, rtol=0, atol=0)
    for _, parameter in model.block_parameters(0):  # copies: the base and the other blocks are left alone
        parameter.add_(1)
    assert same_tensors(base.state_dict(), before)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_prompt_counts_for_its_own_sample(name):
    model, given = tiny_prompted(name), prompts(name)
    z = noise()[:1].expand(BATCH, 1, 8, 8)
    for sigma in (80.0, 0.3, 0.01):
        before = model.denoise(z, sigma, **given)
        for column, value in given.items():
            changed = value.clone()
            changed[2] = changed[2] * 0 if column == "encoder_attention_mask" else changed[2] + 1
            moved = (model.denoise(z, sigma, **(given | {column: changed})) - before).abs().amax((1, 2, 3))
            assert moved[2] > 1e-5 * sigma and not moved[[0, 1, 3]].any(), column


@torch.no_grad()
def test_pixart_of_many_sizes_is_told_the_images_size():
    settings = {"num_attention_heads": 3, "cross_attention_dim": 24, "use_additional_conditions": True}
    base = base_of(PIXART, **settings)
    model = BlockedDiTModel.from_base(base, num_blocks=1, preconditioning="rectified_flow")
    given, sizes = prompts(PIXART), {"resolution": torch.rand(BATCH, 2) * 64, "aspect_ratio": torch.rand(BATCH, 1)}
    t = torch.full((BATCH,), 500.0)
    velocity = base(noise(), timestep=t, added_cond_kwargs=sizes, **given).sample[:, :1]
    denoised = model.denoise(2 * noise(), 1.0, **given, **sizes)
    torch.testing.assert_close(denoised, noise() - 0.5 * velocity, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="resolution is missing"):
        model.denoise(noise(), 1.0, **given)


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_that_may_be_sharded_hold_most_of_a_block_once(name):
    model = tiny_prompted(name)
    for block in range(3):
        parts = [p for module in model.layer_modules(block) for p in module.parameters()]
        assert len({id(p) for p in parts}) == len(parts)
        lists = [getattr(model.block(block), a) for _, a in TRANSFORMER_CLASSES[name].layer_lists]
        in_layers = sum(p.numel() for layers in lists for p in layers.parameters())
        assert 0.9 * in_layers < sum(p.numel() for p in parts) <= in_layers


def test_packing_is_that_of_flux():
    x = torch.randn(2, 3, 6, 4)
    rows = pack(x)
    assert torch.equal(rows, FluxPipeline._pack_latents(x, 2, 3, 6, 4)) and torch.equal(unpack(rows, 3, 2), x)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_other_sizes_than_the_configs_are_taken(name):
    model, given = tiny_prompted(name), prompts(name)
    z = torch.randn(BATCH, 1, 8, 4)
    assert model.denoise(z, 0.3, **given).shape == z.shape


# -- the pipelines of diffusers ----------------------------------------------------------------------------------


def pipeline_of(transformer: Any, name: str, scheduler: Any = None) -> Any:
    """The class's own pipeline without text encoders, around a VAE of random weights."""
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = tiny_vae(1, scaling_factor=0.8, shift_factor=0.1)
    if name == PIXART:
        scheduler = scheduler or DPMSolverMultistepScheduler(**BETAS)
        return PixArtAlphaPipeline(None, None, vae, transformer, scheduler)
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    if name == FLUX:
        return FluxPipeline(scheduler or flow, vae, transformer=transformer, **nothing)
    nothing |= {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline(transformer, scheduler or flow, vae, **nothing)


def sample(pipe: Any, name: str, steps: int = 4) -> Tensor:
    """Images of two prompts."""
    given = prompts(name, 2)
    arguments: dict[str, Any] = {"prompt_embeds": given["encoder_hidden_states"], "height": 16, "width": 16}
    if name == PIXART:
        mask = given["encoder_attention_mask"]
        empty = prompts(name, 2, seed=5)
        arguments |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "negative_prompt": None}
        arguments |= {"negative_prompt_embeds": empty["encoder_hidden_states"], "use_resolution_binning": False}
    else:
        arguments["pooled_prompt_embeds"] = given["pooled_projections"]
        if name == SD3:
            empty = prompts(name, 2, seed=5)
            arguments |= {"negative_prompt_embeds": empty["encoder_hidden_states"]}
            arguments |= {"negative_pooled_prompt_embeds": empty["pooled_projections"]}
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(**arguments, num_inference_steps=steps, generator=generator, output_type="pt").images


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_with_one_block_gives_the_images_of_its_base(name):
    base = base_of(name)
    pipe = pipeline_of(base, name)
    expected = sample(pipe, name)
    model = BlockedDiTModel.from_base(pipe, num_blocks=1)
    pipe.transformer = model.as_transformer()
    assert torch.equal(sample(pipe, name), expected)
    with torch.no_grad():
        next(p for n, p in model.block_parameters(0) if n.endswith("proj_out.bias")).add_(0.5)
    assert not torch.allclose(sample(pipe, name), expected)  # the images are the blocked model's


def test_one_prompt_serves_several_images_in_every_block_of_flux():
    model = BlockedDiTModel.from_base(base_of(FLUX), layers_per_block=[4, 2])
    assert not len(model.block(1).transformer_blocks)  # single-stream layers alone
    pipe = pipeline_of(model.as_transformer(), FLUX)
    given = prompts(FLUX, 1)
    text, pooled = given["encoder_hidden_states"], given["pooled_projections"]
    pipe.set_progress_bar_config(disable=True)
    how: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}
    one = pipe(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(0),
        **how,
    ).images
    each = {"prompt_embeds": text.expand(2, -1, -1), "pooled_prompt_embeds": pooled.expand(2, -1)}
    torch.testing.assert_close(one, pipe(**each, generator=torch.Generator().manual_seed(0), **how).images)


@pytest.mark.parametrize("name", NAMES)
def test_several_blocks_are_given_back_through_as_transformer(name):
    with pytest.raises(ValueError, match=f"as one {name}: .*as_transformer") as refused:
        tiny_prompted(name, num_blocks=2).to_base()
    assert "DiT:" not in str(refused.value) and "BlockedDiTPipeline" not in str(refused.value)


def test_a_pipeline_of_streamed_blocks_gives_the_same_images(tmp_path):
    pipe = pipeline_of(base_of(FLUX), FLUX)
    model = BlockedDiTModel.from_base(pipe, num_blocks=3)
    pipe.transformer = model.as_transformer()
    expected = sample(pipe, FLUX)
    model.enable_block_streaming("cpu", offload_to_disk_path=tmp_path)
    assert torch.equal(sample(pipe, FLUX), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_calls_the_block_that_owns_each_timestep(name):
    pipe = pipeline_of(base_of(name), name)
    model = BlockedDiTModel.from_base(pipe, num_blocks=3)
    called: list[tuple[int, float]] = []

    def note(block: int):
        return lambda module, args, kwargs: called.append((block, float(kwargs["timestep"].flatten()[0])))

    for block in range(3):
        model.block(block).register_forward_pre_hook(note(block), with_kwargs=True)
    pipe.transformer = model.as_transformer()
    sample(pipe, name, steps=40 if name == PIXART else 12)
    assert {block for block, _ in called} == {0, 1, 2} and [b for b, _ in called] == sorted(b for b, _ in called)
    scale = 1000 if name == FLUX else 1
    for block, timestep in called:
        if name == PIXART:
            alpha = pipe.scheduler.alphas_cumprod.double()[int(timestep)]
            sigma = float(((1 - alpha) / alpha).sqrt())
        else:
            t = timestep * scale / 1000
            sigma = t / (1 - t) if t < 1 else float("inf")
        low, high = model.partition.range(block)
        high = float("inf") if block == 0 else high
        assert low * (1 - 1e-5) <= sigma <= high * (1 + 1e-5)


def test_edm_networks_and_dits_sample_through_pipelines_too():
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0)
    pipe = pipeline_of(base_of(PIXART), PIXART, scheduler)
    expected = sample(pipe, PIXART)
    model = BlockedDiTModel.from_base(pipe.transformer, num_blocks=1)
    assert model.config.preconditioning == "edm"
    pipe.transformer = model.as_transformer()
    assert torch.equal(sample(pipe, PIXART), expected)
    scaled = BlockedDiTModel.from_base(base_of(PIXART), num_blocks=1, noise_scale=3.0).as_transformer()
    given, t = prompts(PIXART) | {"added_cond_kwargs": {}}, torch.full((BATCH,), -0.4)
    with torch.no_grad():
        assert torch.equal(
            scaled(noise(), timestep=t, **given)[0], base_of(PIXART)(noise(), timestep=3 * t, **given)[0]
        )
    dit = tiny_dit(1, base_config={"out_channels": 2}, preconditioning="vp_epsilon", noise_schedule=BETAS).eval()
    images = []
    for transformer in (dit.to_base(), dit.as_transformer()):
        pipe = DiTPipeline(transformer, tiny_vae(1), DPMSolverMultistepScheduler(**BETAS))
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        settings = {"guidance_scale": 1.0, "num_inference_steps": 3, "output_type": "np"}
        images.append(pipe([1, 2], generator=generator, **settings).images)
    assert (images[0] == images[1]).all()


def test_calls_that_name_no_block():
    routed = tiny_prompted(SD3, preconditioning="rectified_flow").as_transformer()
    given = prompts(SD3)
    with pytest.raises(ValueError, match=r"belong to blocks \[0, 2\]: give one timestep per call"):
        routed(noise(), timestep=torch.tensor([999.0, 999.0, 1.0, 1.0]), **given)
    with pytest.raises(ValueError, match="timestep is missing"):
        routed(noise(), **given)
    with pytest.raises(ValueError, match="skip_layers refers to layers of the whole network"):
        routed(noise(), timestep=torch.full((BATCH,), 500.0), skip_layers=[4], **given)
    assert routed.config.num_layers == 6 and routed.config.pos_embed_max_size == 8
    assert (routed.dtype, routed.device) == (torch.float32, torch.device("cpu"))


# -- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_trains_one_block_of_it(name, tmp_path):
    pipe = pipeline_of(base_of(name), name)
    model = BlockedDiTModel.from_base(pipe, num_blocks=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    args = DiffusionBlocksTrainingArguments(
        output_dir=tmp_path, max_steps=3, per_device_train_batch_size=4, blocks=[1], use_ema=False, learning_rate=1e-3
    )
    trainer = DiffusionBlocksTrainer(model, args, TinyPrompts(name), TinyPrompts(name, seed=1))
    assert trainer.train()["updates_per_block"] == {1: 3}
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    own = {k for k, _ in model.block_parameters(1)}
    assert changed <= own and len(changed) > 0.8 * len(own)
    assert held_out_loss(model, TinyPrompts(name, seed=1), max_samples=8, batch_size=4).total > 0


def test_where_blocks_rest_changes_no_weight(tmp_path):
    states = []
    for residency in ("device", "host"):
        model = tiny_prompted(FLUX)
        args = DiffusionBlocksTrainingArguments(
            output_dir=tmp_path / residency, max_steps=2, per_device_train_batch_size=4, residency=residency
        )
        trainer = DiffusionBlocksTrainer(model, args, TinyPrompts(FLUX))
        trainer.train()
        trainer.save_model(tmp_path / residency / "saved")
        states.append(BlockedDiTModel.from_pretrained(tmp_path / residency / "saved").state_dict())
    assert same_tensors(*states)


def test_prompts_are_dropped_for_the_empty_one_by_the_objective():
    model = tiny_prompted(SD3, label_dropout=0.5)
    batch = TinyPrompts(SD3)[:8]
    null = {name: value[0] for name, value in prompts(SD3, 1, seed=9).items()}
    given = model.conditioning(batch, torch.arange(8) < 3, null)
    for name, value in given.items():
        assert torch.equal(value[3:], batch[name][3:]) and torch.equal(value[:3], null[name].expand_as(value[:3]))
    with torch.no_grad():
        kept, dropped, none = (
            DenoisingScoreMatching(null_conditioning=n)(model, 1, batch, torch.Generator().manual_seed(0)).loss
            for n in (None, null, {})
        )
    assert torch.equal(kept, none) and not torch.allclose(kept, dropped)
    for wrong, message in [
        ({"prompt": null["pooled_projections"]}, "unknown null_conditioning column 'prompt'"),
        ({"encoder_hidden_states": torch.zeros(2, 12)}, r"of shape \[2, 12\], and a prompt's is \[3, 12\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.conditioning(batch, torch.ones(8, dtype=torch.bool), wrong)


@pytest.mark.parametrize(
    "name, change, message",
    [
        (SD3, {"pooled_projections": None}, "'encoder_hidden_states' and 'pooled_projections'. Encode the prompts"),
        (SD3, {"pooled_projections": torch.zeros(4, 11)}, r"pooled_projections has shape \[4, 11\].*\[4, 10\]"),
        (SD3, {"encoder_hidden_states": torch.zeros(4, 12)}, r"give a tensor \[4, text length, 12\]"),
        (SD3, {"encoder_hidden_states": torch.zeros(4, 3, 12).long()}, "dtype torch.int64"),
        (SD3, {"pixel_values": torch.zeros(4, 1, 8, 18)}, "multiples of 2 and at most 16"),
        (FLUX, {"guidance": torch.zeros(4, 1)}, r"guidance has shape \[4, 1\]"),
        (FLUX, {"pixel_values": torch.zeros(4, 1, 8, 7)}, r"takes \[batch, 1, height, width\] with height and width"),
        (PIXART, {"encoder_attention_mask": torch.ones(4, 2).long()}, "have the same length"),
        (PIXART, {"encoder_hidden_states": [1.0]}, "is of type list, not a tensor"),
        (PIXART, {"pixel_values": torch.full((4, 1, 8, 8), 255.0)}, "pixel_values reach 255"),
    ],
)
def test_batches_that_do_not_fit(name, change, message):
    batch = {k: v for k, v in (TinyPrompts(name)[:4] | change).items() if v is not None}
    with as_users_run(), pytest.raises(ValueError, match=message):
        tiny_prompted(name).check_batch(batch)


def test_samples_that_cannot_be_learned_from_are_named():
    batch = TinyPrompts(FLUX)[:4]
    batch["guidance"][1] = float("nan")
    batch["encoder_hidden_states"][3, 0, 0] = float("inf")
    assert tiny_prompted(FLUX).wrong_rows(batch).tolist() == [False, True, False, True]


# -- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_pipelines_directory_converts_and_one_block_of_it_loads(name, tmp_path):
    base = base_of(name)
    if name == SD3:  # these positions are weights of the file, and need not be what a formula gives
        base.pos_embed.pos_embed += 0.01
    pipeline_of(base, name).save_pretrained(tmp_path / "pipe")
    model = BlockedDiTModel.from_base(tmp_path / "pipe", num_blocks=2)
    expected = BlockedDiTModel.from_base(pipeline_of(base, name), num_blocks=2)
    assert same_tensors(model.state_dict(), expected.state_dict()) and model.partition == expected.partition
    assert model.config.base_class == name
    assert model.config.preconditioning == ("vp_epsilon" if name == PIXART else "rectified_flow")
    if name != PIXART:  # logit t = ln sigma, and the scheduler's shift multiplies sigma
        assert model.config.noise["p_mean"] == pytest.approx(1.0986123) and model.config.noise["p_std"] == 1.0
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "block-00.safetensors").unlink()
    alone = BlockedDiTModel.from_pretrained(tmp_path / "model", blocks=[1])
    assert alone.resident_blocks == (1,) and alone.config.base_class == name
    buffers = [dict(m.block(1).named_buffers()) for m in (alone, model)]
    assert same_tensors(alone.block(1).state_dict(), model.block(1).state_dict()) and same_tensors(*buffers)
    with torch.no_grad():
        outputs = [m.denoise(noise(), 0.02, **prompts(name)) for m in (alone, model)]
    assert torch.equal(*outputs)


def test_the_convert_command_cuts_a_pipelines_directory(tmp_path, capsys):
    base = base_of(FLUX)
    pipeline_of(base, FLUX).save_pretrained(tmp_path / "pipe")
    assert main(["convert", str(tmp_path / "pipe"), "--num-blocks", "3", "--output-dir", str(tmp_path / "out")]) == 0
    assert "preconditioning rectified_flow; kept from the base: its weights only" in capsys.readouterr().out
    model = BlockedDiTModel.from_pretrained(tmp_path / "out")
    expected = BlockedDiTModel.from_base(base, noise_schedule={"num_train_timesteps": 1000, "shift": 3.0})
    assert same_tensors(model.state_dict(), expected.state_dict()) and model.partition == expected.partition
    assert blocked_config_of(tmp_path / "pipe").edges == model.config.edges


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_block_is_given_back_bitwise(name, tmp_path):
    base = base_of(name)
    back = BlockedDiTModel.from_base(base, num_blocks=1, preconditioning="edm").to_base()
    assert type(back) is type(base) and same_tensors(back.state_dict(), base.state_dict())
    t = torch.full((BATCH,), 300.0)
    assert torch.equal(raw(back, noise(), t, prompts(name)), raw(base, noise(), t, prompts(name)))
    back.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {k: config[k] for k in CONFIGS[name]} == CONFIGS[name]


# -- the published configs ---------------------------------------------------------------------------------------

PUBLISHED: dict[str, dict[str, Any]] = {
    # transformer/config.json of PixArt-XL-2-512x512, stable-diffusion-3-medium and FLUX.1-dev
    PIXART: {
        "_class_name": "Transformer2DModel",
        "norm_type": "ada_norm_single",
        "num_layers": 28,
        "caption_channels": 4096,
        "cross_attention_dim": 1152,
        "sample_size": 64,
        "out_channels": 8,
        "num_vector_embeds": None,
        "double_self_attention": False,
        "only_cross_attention": False,
        "use_linear_projection": False,
    },
    SD3: {
        "_class_name": SD3,
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
    FLUX: {"_class_name": FLUX, "guidance_embeds": True},
}


@pytest.mark.parametrize("name, billions", [(PIXART, 0.611), (SD3, 2.028), (FLUX, 11.902)])
def test_the_published_sizes_are_cut_without_memory(name, billions):
    config = BlockedDiTModel.config_from(PUBLISHED[name], num_blocks=3)
    assert config.base_class == name
    with torch.device("meta"):
        model, whole = BlockedDiTModel(config), CLASSES[name](**config.base_config)
    assert sum(p.numel() for p in whole.parameters()) / 1e9 == pytest.approx(billions, abs=6e-4)
    assert sum(config.layers_per_block) == config.num_layers == {PIXART: 28, SD3: 24, FLUX: 57}[name]
    weights = whole.state_dict()
    for block in range(3):  # every weight of a block has a source of its shape
        layers, module = model.partition.layers(block), model.block(block)
        part = config.transformer_class.block_weights(config.base_config, layers, module, weights)
        assert {k: v.shape for k, v in part.items()} == {k: v.shape for k, v in module.state_dict().items()}
    if name == SD3:  # a step of each block, forward and backward, without memory
        assert training_flops(config).ratio == pytest.approx(1, abs=0.01)


def test_plans_count_what_a_step_holds_and_costs():
    shape = {"base_config": {"num_layers": 2, "num_single_layers": 1}}  # blocks of two double layers and a single one
    model = tiny_prompted(FLUX, 2, **shape)
    plan = plan_memory(model, batch_size=2, alternatives=False, device="cpu", text_length=5)
    row = next(row for row in plan.rows if row.method == "blocked" and row.block == 0)
    counted = measure_memory(tiny_prompted(FLUX, 2, blocks=[0], **shape), 0, model.dummy_batch(2, text_length=5))
    for kind in KINDS:
        assert getattr(row, kind) == pytest.approx(getattr(counted, kind), rel=0.05), kind
    # each block has a stem, a head and an embedding of the text, and the first makes no text for the second
    assert 0.9 < training_flops(model.config, batch_size=2, text_length=5).ratio < 1.2


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base, settings, message",
    [
        ({"_class_name": "UNet2DConditionModel"}, {}, "UNet2DConditionModel cannot be cut.*PixArtTransformer2DModel"),
        ({}, {"base_class": "Sana"}, "base_class='Sana' cannot be cut: give DiTTransformer2DModel, "),
        ({"_class_name": SD3, "num_layer": 3}, {}, "unknown SD3Transformer2DModel setting 'num_layer'"),
        ({"_class_name": SD3, "caption_projection_dim": 8}, {}, "caption_projection_dim=8 must be the width"),
        ({"_class_name": FLUX, "axes_dims_rope": [2, 2]}, {}, "must be three even numbers"),
        ({"_class_name": FLUX, "axes_dims_rope": 8}, {}, "axes_dims_rope=8 must be a list of whole numbers"),
        ({"_class_name": FLUX, "num_single_layers": -1}, {}, "num_single_layers=-1 must be a whole number of layers"),
        ({"_class_name": FLUX, "in_channels": 384, "out_channels": 64}, {}, "out_channels=16 must be in_channels=96"),
        ({"_class_name": SD3, "num_layers": 4}, {"num_blocks": 5}, "num_blocks=5 is more than the 4 layers"),
        ({"_class_name": SD3}, {"noise_schedule": {"shift": 0}}, "shift=0; it must be a positive number"),
        ({"_class_name": SD3}, {"noise_schedule": {"beta": 1}}, "unknown noise_schedule setting 'beta'"),
    ],
)
def test_bases_and_settings_that_are_refused(base, settings, message):
    with as_users_run(), pytest.raises(ValueError, match=message):
        BlockedDiTModel.from_base(base, **settings)


def test_a_multistep_schedulers_flow_is_a_flow():
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    model = BlockedDiTModel.from_base(pipeline_of(base_of(PIXART), PIXART, scheduler), num_blocks=2)
    assert model.config.preconditioning == "rectified_flow" and model.config.noise_schedule["shift"] == 3.0
    with pytest.raises(ValueError, match="prediction_type='v_prediction'; only networks that predict epsilon or a vel"):
        scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction")
        BlockedDiTModel.from_base(pipeline_of(base_of(PIXART), PIXART, scheduler), num_blocks=2)


def test_networks_that_cannot_be_cut_and_pipelines_that_do_not_fit():
    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2,
                                    up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    with pytest.raises(ValueError, match=r"UNet2DConditionModel cannot be cut.*skip connections.*Flux"):
        BlockedDiTModel.from_base(unet)
    with pytest.raises(ValueError, match="takes prompts: give model.as_transformer"):
        BlockedDiTPipeline(tiny_prompted(SD3))
    with pytest.raises(ValueError, match=r"unknown conditioning 'class_labels'"):
        tiny_prompted(SD3).denoise(noise(), 0.3, class_labels=torch.zeros(4), **prompts(SD3))
