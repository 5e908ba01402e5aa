"""Models of latents from images to figures: encode, train, sample, score; and pretrained pipelines, converted."""

import json

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image

from hf_diffusionblocks import BlockedDiTModel, BlockedDiTPipeline, jobs
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.data import ImageDataset, open_image_dataset
from hf_diffusionblocks.data.images import load_image_dataset
from hf_diffusionblocks.evaluation.images import decoded
from hf_diffusionblocks.jobs import images
from hf_diffusionblocks.pipelines import decode_latents
from test_cli import SMALL
from tiny import perturbed, tiny_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    tiny_vae(shift_factor=0.25).save_pretrained(root / "vae")
    return root


MODEL = ["model.in_channels=4", "model.sample_size=8"]


def test_a_latent_recipe_runs_from_images_to_samples_and_figures(folder, capsys):
    vae = f"sampling.vae={folder / 'vae'}"
    for split in ("train", "test"):
        command = ["encode", "digits-dit", *SMALL, *MODEL, vae, "data.max_samples=40", "--split", split]
        assert main([*command, "--output-dir", str(folder / "latents" / split)]) == 0
    said = capsys.readouterr().out
    assert f"data.name={folder / 'latents'} data.train_split=train" in said and "its own --split" in said
    run = folder / "run"
    command = ["train", "digits-dit", *SMALL, *MODEL, f"data.name={folder / 'latents'}", vae, "--output-dir", str(run)]
    assert main([*command, "sampling.every=6"]) == 0
    with Image.open(run / "figures" / "denoising.png") as picture:
        assert min(picture.size) > 50
    with Image.open(run / "samples" / "iteration-0000006.png") as picture:
        assert min(picture.size) > 50
    figures = json.loads((run / "figures" / "figures.json").read_text())
    assert {"frechet_distance_latents-cnn", "class_agreement", "held_out_loss"} <= set(figures)

    pipe = BlockedDiTPipeline.from_pretrained(run / "model")  # the directory alone samples images
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae is not None and pipe([1], num_inference_steps=2).images[0].size == (16, 16)
    capsys.readouterr()
    sampled = ["sample", str(run / "model"), "--classes", "1", "2", "--steps", "2", "--output-dir", str(folder / "png")]
    assert main(sampled) == 0
    with Image.open(folder / "png" / "00000-class-1.png") as picture:
        assert picture.size == (16, 16) and picture.mode == "RGB"
    assert main(["evaluate", str(run / "model"), "--output", str(folder / "again.json")]) == 0
    again = json.loads((folder / "again.json").read_text())
    name = "frechet_distance_latents-cnn"
    assert again[name] == pytest.approx(figures[name], rel=1e-3)


def test_without_a_vae_latents_are_trained_but_not_scored(folder, tmp_path, capsys):
    data = ImageDataset(torch.randn(8, 4, 8, 8), torch.arange(8))
    from hf_diffusionblocks.evaluation import score
    from hf_diffusionblocks.recipes import load_recipe

    recipe = load_recipe("digits-dit", [*SMALL, *MODEL, "data.name=x"])
    with pytest.raises(ValueError, match=r"latents, .* set sampling\.vae"):
        score(recipe.build_model(), recipe, data, data, cache_dir=tmp_path)


def test_a_vae_that_cannot_be_loaded_stops_the_run_before_training(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits-dit", *SMALL, "sampling.vae=/no/such/vae"]) == 2
    assert "sampling.vae='/no/such/vae' cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_decoding_undoes_scale_and_shift():
    vae = tiny_vae(shift_factor=0.25)
    z = torch.randn(2, 4, 8, 8)
    latents = (z - vae.config.shift_factor) * vae.config.scaling_factor
    with torch.no_grad():
        torch.testing.assert_close(decode_latents(vae, latents), vae.decode(z).sample, rtol=1e-4, atol=1e-5)
    decoded_set = decoded(ImageDataset(latents, [0, 1]), vae, max_samples=1)
    assert len(decoded_set) == 1 and decoded_set.images.dtype == torch.uint8
    expected = vae.decode(z[:1]).sample.detach().clamp(-1, 1)
    torch.testing.assert_close(decoded_set[[0]]["pixel_values"], expected, rtol=0, atol=1 / 127.5)


def test_images_decoded_row_by_row_are_those_that_are_loaded(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 12, 10, 3), dtype=np.uint8)
    columns = {"image": [Image.fromarray(p) for p in pixels], "label": [0, 1, 2, 0, 1, 2, 3]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcd"))})
    path = tmp_path / "set"
    datasets.Dataset.from_dict(columns, features).save_to_disk(str(path))
    for max_samples in (None, 4):
        settings = {"image_size": 8, "channels": 3, "max_samples": max_samples}
        lazy = open_image_dataset(str(path), "train", **settings)
        loaded = load_image_dataset(str(path), "train", **settings)
        assert not isinstance(lazy, ImageDataset) and lazy.class_names == loaded.class_names == list("abcd")
        rows = [len(loaded) - 1, 0]
        for name in ("pixel_values", "class_labels"):
            torch.testing.assert_close(lazy[rows][name], loaded[rows][name], rtol=0, atol=0)
            torch.testing.assert_close(lazy[1][name], loaded[1][name], rtol=0, atol=0)
        assert len(lazy) == len(loaded)
    other = open_image_dataset(str(path), "train", image_size=4, channels=3)
    assert other.fingerprint != open_image_dataset(str(path), "train", image_size=8, channels=3).fingerprint


def test_latents_cannot_be_encoded_again(folder, capsys):
    command = ["encode", "imagenet256-dit-l2", f"sampling.vae={folder / 'vae'}", "--output-dir", str(folder / "x")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "--split train" in error and "--split validation" in error


# -- a pretrained pipeline ---------------------------------------------------------------------------------------


def dit(**settings) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    shape = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "in_channels": 4}
    return perturbed(DiTTransformer2DModel(**shape | {"num_embeds_ada_norm": 1000} | settings)).eval()


def test_a_converted_pipeline_samples_the_images_of_the_base(tmp_path, capsys):
    scheduler = DDIMScheduler(beta_end=0.015, clip_sample=False)
    base = DiTPipeline(dit(out_channels=4), tiny_vae(), scheduler, id2label={1: "one"})
    base.save_pretrained(tmp_path / "base")
    command = ["convert", str(tmp_path / "base"), "--num-blocks", "1", "--output-dir", str(tmp_path / "out")]
    assert main(command) == 0
    assert "preconditioning vp_epsilon; kept from the base: scheduler, VAE" in capsys.readouterr().out
    pipe = BlockedDiTPipeline.from_pretrained(tmp_path / "out")
    assert pipe.model.config.noise_schedule["beta_end"] == 0.015
    drawn = []
    for one in (base, pipe):
        one.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": 5, "guidance_scale": 4.0, "generator": generator, "output_type": "np"}
        drawn.append(one([1, 7], **settings).images)
    np.testing.assert_allclose(drawn[1], drawn[0], atol=2e-3)
    assert drawn[0].std() > 0.01


def test_a_bare_dit_says_which_preconditioning_is_taken(tmp_path, capsys):
    dit().save_pretrained(tmp_path / "dit")
    model = BlockedDiTModel.from_base(tmp_path / "dit", num_blocks=2)
    assert model.config.preconditioning == "edm"
    assert main(["convert", str(tmp_path / "dit"), "--num-blocks", "2", "--output-dir", str(tmp_path / "out")]) == 0
    assert "preconditioning edm; kept from the base: its weights only" in capsys.readouterr().out


def test_a_base_that_predicts_something_else_is_refused():
    base = DiTPipeline(dit(), tiny_vae(), DDIMScheduler(prediction_type="v_prediction"))
    with pytest.raises(ValueError, match="prediction_type='v_prediction'"):
        BlockedDiTModel.from_base(base, num_blocks=1)
    assert BlockedDiTModel.from_base(base, num_blocks=1, preconditioning="edm").config.preconditioning == "edm"


# -- where commands run ------------------------------------------------------------------------------------------


def test_commands_run_where_the_accelerator_is(folder, tmp_path, monkeypatch):
    assert jobs.pick_device() == (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("meta"))
        assert jobs.pick_device().type == "meta"
    moved = []
    monkeypatch.setattr(images, "pick_device", lambda: torch.device("meta"))
    monkeypatch.setattr(BlockedDiTPipeline, "to", lambda pipe, device: moved.append(device) or pipe)
    BlockedDiTPipeline(BlockedDiTModel.from_base(dit(), num_blocks=2), vae=tiny_vae()).save_pretrained(tmp_path / "m")
    jobs.sample(str(tmp_path / "m"), str(tmp_path / "png"), class_labels=[1], num_inference_steps=1)
    assert moved == [torch.device("meta")]
