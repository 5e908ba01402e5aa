"""What each command does with models of images."""

from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from ..baselines.end_to_end import resolve_method
from ..data import cache_latents, open_image_dataset
from ..evaluation import check_scoring, compares_samples, sample_images, score
from ..families.base_loading import hub_settings
from ..families.dit import BlockedDiTModel
from ..families.dit_conversion import load_components
from ..memory import MemoryPlan
from ..modeling import format_block_parameters
from ..pipelines import BlockedDiTPipeline, decode_latents
from ..recipes import Recipe
from ..training import DiffusionBlocksTrainer
from .common import Say, check_output, loading, new_directory, pick_device, say_figures
from .image_advice import plan_images
from .image_pieces import LATENTS, build_trainer, check_classes, data_line, is_latent_source, load_data, load_vae
from .planning import Plan
from .run import Pictures, Run
from .sample_files import write_samples

ONE_CLASS = (
    "all images are of one class: they are scored without a classifier, by the held-out loss alone "
    "(evaluation.feature_network=inception also compares samples with them)"
)


def plan(recipe: Recipe) -> Plan:
    """What ``diffusionblocks plan`` prints; see ``hf_diffusionblocks.jobs.plan``."""
    return plan_images(recipe)


class ImageRun(Run):
    """A run of a model of images."""

    def load(self) -> None:
        self.recipe = resolve_method(self.recipe)
        self.train_data, self.test_data = load_data(self.recipe)
        is_latent = self.train_data.is_latent
        self.vae = load_vae(self.recipe) if is_latent or self.recipe.sampling.vae else None
        self.draws = not is_latent or self.vae is not None
        if not self.draws:
            self.say(
                "the data are latents, and sampling.vae names no VAE: the model will be saved, but not sampled and "
                "scored."
            )
            self.report = False
        if self.reports and compares_samples(self.recipe, self.train_data):
            check_scoring(self.recipe, self.test_data)

    def check(self, model: BlockedDiTModel) -> None:
        check_classes(self.train_data, model, self.recipe.kind.classes_key)

    def data_lines(self, model: BlockedDiTModel) -> list[str]:
        lines = [data_line(self.recipe, self.train_data, self.test_data)]
        return [*lines, ONE_CLASS] if self.reports and not compares_samples(self.recipe, self.train_data) else lines

    def build_trainer(self) -> DiffusionBlocksTrainer:
        from ..plots import SampleGridCallback

        callbacks, sampling = [], self.recipe.sampling
        if sampling.every > 0 and self.blocks is None and self.draws:
            callbacks.append(
                SampleGridCallback(
                    sampling.every,
                    list(range(min(10, self.train_data.num_classes))),
                    sampling.num_inference_steps,
                    sampling.guidance_scale,
                    self.recipe.training_arguments().seed,
                    self.vae,
                )
            )
        return build_trainer(self.recipe, self.train_data, self.test_data, blocks=self.blocks, callbacks=callbacks)

    def save_beside(self, model: BlockedDiTModel, directory: Path) -> None:
        BlockedDiTPipeline(model, vae=self.vae).save_components(directory)

    def draw(self, model: BlockedDiTModel, folder: Path) -> Pictures:
        from .. import plots

        recipe, seed = self.recipe, self.recipe.training_arguments().seed
        if self.vae is not None:
            self.vae.to(model.device)
        classes = min(10, self.train_data.num_classes)
        labels = torch.arange(classes).repeat_interleave(8)
        images = sample_images(
            BlockedDiTPipeline(model, vae=self.vae),
            labels,
            num_inference_steps=recipe.sampling.num_inference_steps,
            guidance_scale=recipe.sampling.guidance_scale,
            solver=recipe.sampling.solver,
            grid=recipe.sampling.grid,
            seed=seed,
        )
        samples = plots.save_sample_grid(images, labels, folder / "samples.png", self.train_data.class_names)
        steps = record_denoising(model, torch.arange(min(4, classes)), recipe, seed=seed, vae=self.vae)
        return [
            ("samples per class", samples),
            ("one batch through the blocks", plots.plot_denoising(steps, model.partition, folder / "denoising.png")),
            ("the partition", plots.plot_partition(model.partition, folder / "partition.png")),
        ]

    def score(self, model: BlockedDiTModel) -> dict[str, Any]:
        return score(
            model,
            self.recipe,
            self.train_data,
            self.test_data,
            cache_dir=self.output / "cache",
            seed=self.recipe.training_arguments().seed,
            vae=self.vae,
            progress=True,
        )

    def plot(self, model: BlockedDiTModel, figures: dict[str, Any], memory: MemoryPlan, folder: Path) -> Pictures:
        from .. import plots

        return [
            ("memory", plots.plot_memory(memory, folder / "memory.png")),
            ("losses", plots.plot_losses(self.output, folder / "losses.png")),
        ]

    def usage_lines(self, model: BlockedDiTModel, model_dir: PurePath) -> list[str]:
        labels = list(range(min(4, model.config.num_classes)))
        return [
            "from hf_diffusionblocks import BlockedDiTPipeline",
            f"pipe = BlockedDiTPipeline.from_pretrained({str(model_dir)!r})",
            f"images = pipe({labels}, num_inference_steps=50).images",
        ]


@torch.no_grad()
def record_denoising(
    model: BlockedDiTModel, labels: Tensor, recipe: Recipe, seed: int = 0, vae: Any = None, sigma_data: float = 0.5
) -> list[dict[str, Any]]:
    """State and estimate at every step of sampling one batch, with the block that worked; of latents, decoded.

    A noisy latent is decoded as it is drawn, times ``c = sigma_data / sqrt(sigma^2 + sigma_data^2)``: undone here, as
    ``plot_denoising`` multiplies by it.
    """
    steps: list[dict[str, Any]] = []

    def record(_pipe: Any, _step: int, sigma: float, tensors: dict[str, Tensor]) -> None:
        z, denoised = tensors["noisy"], tensors["denoised"]
        if vae is not None:
            c = sigma_data / (sigma**2 + sigma_data**2) ** 0.5
            z, denoised = decode_latents(vae, c * z) / c, decode_latents(vae, denoised)
        block = model.partition.block_of(sigma)
        steps.append({"sigma": sigma, "block": block, "z": z.float().cpu(), "denoised": denoised.float().cpu()})

    pipe = BlockedDiTPipeline(model)
    pipe.set_progress_bar_config(disable=True)
    pipe(
        labels.to(next(model.parameters()).device),
        num_inference_steps=recipe.sampling.num_inference_steps,
        guidance_scale=recipe.sampling.guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        callback_on_step_end=record,
        callback_on_step_end_tensor_inputs=("noisy", "denoised"),
    )
    return steps


def convert(
    base: str, output_dir: str, settings: dict[str, Any], say: Say = print, kind: Any = BlockedDiTModel
) -> Path:
    """``diffusionblocks convert``: cut a pretrained DiT into blocks and save it."""
    target = new_directory(output_dir)
    model = kind.from_base(base, **settings)
    scheduler, vae = load_components(base, **hub_settings(settings))
    if model.config.preconditioning != "vp_epsilon":
        scheduler = None  # it is for the noise levels that the base was trained on
    if model.config.num_classes:
        BlockedDiTPipeline(model, scheduler, vae).save_pretrained(target)
    else:  # sampled by the base's own pipeline, with model.as_transformer()
        scheduler = vae = None
        model.save_pretrained(target)
    say(format_block_parameters(model))
    kept = [name for name, part in (("scheduler", scheduler), ("VAE", vae)) if part is not None]
    say(f"preconditioning {model.config.preconditioning}; kept from the base: {', '.join(kept) or 'its weights only'}")
    say(f"saved in {target}")
    return target


def sample(
    model_dir: str,
    output_dir: str,
    *,
    class_labels: list[int] | None = None,
    per_class: int = 1,
    num_inference_steps: int = 50,
    guidance_scale: float = 2.0,
    solver: str = "euler",
    grid: str = "karras",
    seed: int = 0,
    block_streaming: str | None = None,
    say: Say = print,
) -> list[Path]:
    """``diffusionblocks sample``: PNG files and one picture of them all."""
    from .. import plots

    if per_class < 1:
        raise ValueError(f"per_class={per_class} must be at least 1 image per label.")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with loading(block_streaming):
        pipe = BlockedDiTPipeline.from_pretrained(model_dir).to(pick_device())
    names = [pipe.model.config.id2label.get(i, str(i)) for i in range(pipe.model.config.num_classes)]
    if class_labels is None:
        class_labels = list(range(min(10, pipe.model.config.num_classes)))
    labels = torch.tensor(class_labels).repeat_interleave(per_class)
    pipe.model.check_input(torch.empty(len(labels), *pipe.sample_shape), class_labels=labels)
    walk = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "solver": solver,
        "grid": grid,
    }
    images, paths = write_samples(pipe, labels, folder, torch.Generator().manual_seed(seed), **walk)
    grid_path = plots.save_sample_grid(images, labels, folder / "grid.png", names)
    say(f"{len(paths)} images in {folder}; together in {grid_path}")
    return paths


def evaluate(
    model_dir: str, recipe: Recipe, output: str | None = None, seed: int = 0, say: Say = print
) -> dict[str, Any]:
    """``diffusionblocks evaluate``; see ``hf_diffusionblocks.jobs.evaluate``."""
    check_output(output)
    pipe = BlockedDiTPipeline.from_pretrained(model_dir).to(pick_device())
    train_data, test_data = load_data(recipe)
    cache = Path(model_dir).parent / "cache" if Path(model_dir).is_dir() else Path("cache")
    check_classes(train_data, pipe.model, recipe.kind.classes_key)
    vae = pipe.vae or load_vae(recipe)
    if vae is not None:
        vae.to(pipe.model.device)
    if not compares_samples(recipe, train_data):
        say(ONE_CLASS)
    figures = score(pipe.model, recipe, train_data, test_data, cache_dir=cache, seed=seed, vae=vae, progress=True)
    say_figures(figures, output, say)
    return figures


def encode(recipe: Recipe, output_dir: str, split: str, batch_size: int = 32, say: Say = print) -> Path:
    """``diffusionblocks encode``; see ``hf_diffusionblocks.jobs.encode``."""
    vae = load_vae(recipe)
    if vae is None:
        raise ValueError(f"recipe {recipe.name!r} names no VAE: set sampling.vae to a directory or Hub id.")
    data = recipe.data
    if is_latent_source(data.name) or data.name == LATENTS:
        raise ValueError(
            f"data.name={data.name} stands for latents: name the images to encode, such as "
            "data.name=ILSVRC/imagenet-1k, once with --split train and once with --split validation."
        )
    size = recipe.config().sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    images = open_image_dataset(
        data.name,
        split,
        image_column=data.image_column,
        label_column=data.label_column,
        image_size=data.image_size or size,
        channels=vae.config.in_channels,
        data_dir=data.data_dir,
        max_samples=data.max_samples,
    )
    cache_latents(images, vae, output_dir, batch_size=batch_size, device=pick_device())
    target = Path(output_dir)
    say(f"latents of {len(images)} images in {target}")
    say(
        f"train on them with data.name={target.parent} data.train_split={target.name}, or data.test_split={target.name}"
        f"; the other split belongs into a folder beside {target.name}, encoded by this command with its own --split."
    )
    return target
