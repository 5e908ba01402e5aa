"""What each command does with models of images."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import serialization
from ..baselines.end_to_end import resolve_method
from ..data import ImageDataset, cache_latents, load_image_dataset, open_image_dataset
from ..evaluation import format_figures, sample_images, score
from ..families.dit import BlockedDiTModel
from ..families.dit_conversion import load_components
from ..hub import model_card, write_model_card
from ..modeling import format_block_parameters
from ..pipelines import BlockedDiTPipeline, decode_latents
from ..recipes import Recipe
from ..training import DiffusionBlocksTrainer
from ..training.checkpoint import find_checkpoints
from ..training.residency import construction
from .common import (
    FIGURES_DIR,
    FIGURES_NAME,
    MODEL_DIR,
    RECIPE_NAME,
    Say,
    loading,
    new_directory,
    pick_device,
    planned,
)

_LATENTS = "latents"  # where the recipes of latent models expect them


def is_latent_source(name: Any) -> bool:
    """Whether a directory holds cached latents, itself or in folders of splits."""
    path = Path(str(name))
    found = (file for pattern in ("", "*/") for file in path.glob(f"{pattern}latents*.safetensors"))
    return path.is_dir() and next(found, None) is not None


# -- pieces -------------------------------------------------------------------------------------------------------


def load_data(recipe: Recipe) -> tuple[ImageDataset, ImageDataset]:
    """Training and held-out data of a recipe. Size and channels are the model's where the recipe gives none."""
    data = recipe.data
    size, channels = recipe.model.get("sample_size"), recipe.model.get("in_channels")
    if is_latent_source(data.name) or "base" in recipe.model or channels not in (1, 3):
        size = channels = None  # latents come as they are, and a base is loaded later
    if data.name == "digits":  # 8 x 8 in every run: another size is a mistake
        size = channels = None
    common = {
        "image_column": data.image_column,
        "label_column": data.label_column,
        "image_size": data.image_size or size,
        "channels": data.channels or channels,
        "data_dir": data.data_dir,
        "max_samples": data.max_samples,
        "scaling_factor": data.scaling_factor,
    }

    def load(key: str, name: str, files: str | None) -> ImageDataset:
        try:
            return load_image_dataset(data.name, name, data_files={name: files} if files else None, **common)
        except ValueError as error:
            if "split" in str(error) and key not in str(error):
                raise ValueError(f"{error} The recipe's setting is {key}={name}.") from error
            raise

    return (
        load("data.train_split", data.train_split, data.train_files),
        load("data.test_split", data.test_split, data.test_files),
    )


def check_classes(data: ImageDataset, model: BlockedDiTModel) -> None:
    """Raise a ``ValueError`` for data with more classes than the model has."""
    if data.num_classes > model.config.num_classes:
        raise ValueError(
            f"the data have {data.num_classes} classes and the model {model.config.num_classes} (class_labels 0 to "
            f"{model.config.num_classes - 1}): set model.num_embeds_ada_norm={data.num_classes}."
        )


def build_trainer(
    recipe: Recipe,
    train: ImageDataset,
    held_out: ImageDataset | None,
    *,
    blocks: list[int] | None = None,
    callbacks: list[Any] | None = None,
) -> DiffusionBlocksTrainer:
    """The trainer of a recipe. The model's initial weights follow from the training seed."""
    args = recipe.training_arguments()
    with torch.random.fork_rng(devices=[]), construction(args):
        torch.manual_seed(args.seed)
        model = recipe.build_model(blocks)
    check_classes(train, model)
    if train.class_names and len(train.class_names) == model.config.num_classes:
        model.config.id2label = dict(enumerate(train.class_names))
        model.config.label2id = {name: i for i, name in enumerate(train.class_names)}
    teacher = None
    if args.distillation_weight > 0:
        if "base" not in recipe.model:
            raise ValueError("training.distillation_weight needs model.base, the pretrained network to distil from.")
        settings = {k: v for k, v in recipe.blocks.items() if k not in ("num_blocks", "layers_per_block", "edges")}
        teacher = BlockedDiTModel.from_base(recipe.model["base"], num_blocks=1, **settings)
    return DiffusionBlocksTrainer(model, args, train, held_out, teacher=teacher, callbacks=callbacks)


# -- commands -----------------------------------------------------------------------------------------------------


def plan(recipe: Recipe, say: Say = print) -> dict[str, Any]:
    """``diffusionblocks plan``: the partition, parameters by block and what a training step holds in memory."""
    from ..memory import plan_memory

    recipe = resolve_method(recipe)
    config = recipe.config()
    args = recipe.training_arguments()
    table = plan_memory(config, **planned(args))
    with torch.device("meta"):
        model = BlockedDiTModel(config)
    say(format_block_parameters(model))
    say("")
    say(str(table))
    return table.to_dict()


def train(
    recipe: Recipe,
    *,
    blocks: list[int] | None = None,
    resume: bool = True,
    report: bool = True,
    say: Say = print,
) -> Path:
    """``diffusionblocks train``: train, save the model, and (unless told otherwise) draw and score it.

    Returns:
        The directory of the saved model.
    """
    from ..plots import SampleGridCallback

    recipe = resolve_method(recipe)
    output = Path(recipe.training_arguments().output_dir)
    train_data, test_data = load_data(recipe)
    vae = load_vae(recipe) if train_data.is_latent or recipe.sampling.vae else None
    if train_data.is_latent and vae is None:
        say("the data are latents, and sampling.vae names no VAE: the model will be saved, but not sampled and scored.")
        report = False
    callbacks = []
    if recipe.sampling.every > 0 and blocks is None and not (train_data.is_latent and vae is None):
        callbacks.append(
            SampleGridCallback(
                recipe.sampling.every,
                list(range(min(10, train_data.num_classes))),
                recipe.sampling.num_inference_steps,
                recipe.sampling.guidance_scale,
                recipe.training_arguments().seed,
                vae,
            )
        )
    trainer = build_trainer(recipe, train_data, test_data, blocks=blocks, callbacks=callbacks)
    output.mkdir(parents=True, exist_ok=True)
    resumed = resume and bool(find_checkpoints(output))
    say(f"{'going on with' if resumed else 'training'} {recipe.name} ({recipe.method}) in {output}")
    say(format_block_parameters(trainer.model))
    serialization.write_json(output / RECIPE_NAME, recipe.to_dict())
    summary = trainer.train(resume_from_checkpoint=resume)
    seconds = summary["training_seconds"]
    model_dir = trainer.save_model(output / MODEL_DIR)
    BlockedDiTPipeline(trainer.model, vae=vae).save_components(model_dir)
    _write_card(trainer.model, recipe, model_dir, {"training_seconds": seconds})
    say(f"trained {summary['iterations']} updates in {seconds:.0f} s; model saved in {model_dir}")
    if report and blocks is None:
        with trainer.averaged_weights():
            write_report(trainer.model, recipe, train_data, test_data, output, summary, vae, say)
    return model_dir


def write_report(
    model: BlockedDiTModel,
    recipe: Recipe,
    train_data: ImageDataset,
    test_data: ImageDataset,
    output: Path,
    summary: dict[str, Any],
    vae: Any = None,
    say: Say = print,
) -> dict[str, Any]:
    """Pictures and a table of figures of a trained model, under ``output/figures``."""
    from .. import plots
    from ..memory import plan_memory

    folder = output / FIGURES_DIR
    folder.mkdir(parents=True, exist_ok=True)
    args = recipe.training_arguments()
    if vae is not None:
        vae.to(model.device)
    pictures = []
    classes = min(10, train_data.num_classes)
    labels = torch.arange(classes).repeat_interleave(8)
    images = sample_images(
        BlockedDiTPipeline(model, vae=vae),
        labels,
        num_inference_steps=recipe.sampling.num_inference_steps,
        guidance_scale=recipe.sampling.guidance_scale,
        solver=recipe.sampling.solver,
        grid=recipe.sampling.grid,
        seed=args.seed,
    )
    pictures.append(
        ("samples per class", plots.save_sample_grid(images, labels, folder / "samples.png", train_data.class_names))
    )
    steps = record_denoising(model, torch.arange(min(4, classes)), recipe, seed=args.seed, vae=vae)
    pictures.append(
        ("one batch through the blocks", plots.plot_denoising(steps, model.partition, folder / "denoising.png"))
    )
    pictures.append(("the partition", plots.plot_partition(model.partition, folder / "partition.png")))
    memory = plan_memory(model.config, **planned(args), alternatives=False)
    pictures.append(("memory", plots.plot_memory(memory, folder / "memory.png")))
    pictures.append(("losses", plots.plot_losses(output, folder / "losses.png")))
    figures = score(
        model, recipe, train_data, test_data, cache_dir=output / "cache", seed=args.seed, vae=vae, progress=True
    )
    figures |= {"training_seconds": summary["training_seconds"], "updates_per_block": summary["updates_per_block"]}
    serialization.write_json(folder / FIGURES_NAME, figures)
    _write_card(model, recipe, output / MODEL_DIR, figures)
    say("")
    say(str(memory))
    say("")
    say(format_figures(figures))
    say("")
    for what, path in pictures:
        say(f"{what + ':':<32}{path}")
    say("")
    say(f"saved model: {output / MODEL_DIR}")
    say("load it:")
    for line in usage_lines(output / MODEL_DIR, classes):
        say(f"    {line}")
    return figures


def usage_lines(model_dir: Path, num_classes: int) -> list[str]:
    """The lines of Python that load a saved model and sample from it."""
    return [
        "from hf_diffusionblocks import BlockedDiTPipeline",
        f"pipe = BlockedDiTPipeline.from_pretrained({str(model_dir)!r})",
        f"images = pipe({list(range(min(4, num_classes)))}, num_inference_steps=50).images",
    ]


def _write_card(model: BlockedDiTModel, recipe: Recipe, model_dir: Path, figures: dict[str, Any]) -> None:
    card = model_card(
        model,
        title=recipe.name,
        usage="\n".join(usage_lines(model_dir, model.config.num_classes)),
        training={"method": recipe.method, **{k: v for k, v in recipe.training.items() if k != "output_dir"}},
        figures=figures,
        dataset=recipe.data.name,
    )
    write_model_card(model_dir, card)


@torch.no_grad()
def record_denoising(
    model: BlockedDiTModel, labels: Tensor, recipe: Recipe, seed: int = 0, vae: Any = None, sigma_data: float = 0.5
) -> list[dict[str, Any]]:
    """State and estimate at every step of sampling one batch, with the block that worked; of latents, decoded.

    A noisy latent is decoded as it is drawn, times ``c = sigma_data / sqrt(sigma^2 + sigma_data^2)``: undone here, as
    :func:`~hf_diffusionblocks.plots.plot_denoising` multiplies by it.
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


def load_vae(recipe: Recipe) -> Any:
    """The recipe's VAE, or None for models of pixels."""
    if recipe.sampling.vae is None:
        return None
    from diffusers import AutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(recipe.sampling.vae)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"sampling.vae={recipe.sampling.vae!r} cannot be loaded: {error} Give the directory or Hub id of a "
            "diffusers AutoencoderKL."
        ) from error
    vae.enable_slicing()  # decodes image by image: a batch of large ones would not fit
    return vae.eval()


def convert(base: str, output_dir: str, settings: dict[str, Any], say: Say = print) -> Path:
    """``diffusionblocks convert``: cut a pretrained DiT into blocks and save it."""
    target = new_directory(output_dir)
    model = BlockedDiTModel.from_base(base, **settings)
    scheduler, vae = load_components(base)
    if model.config.preconditioning != "vp_epsilon":
        scheduler = None  # it is for the noise levels that the base was trained on
    BlockedDiTPipeline(model, scheduler, vae).save_pretrained(target)
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

    with loading(block_streaming):
        pipe = BlockedDiTPipeline.from_pretrained(model_dir).to(pick_device())
    names = [pipe.model.config.id2label.get(i, str(i)) for i in range(pipe.model.config.num_classes)]
    if class_labels is None:
        class_labels = list(range(min(10, pipe.model.config.num_classes)))
    labels = torch.tensor(class_labels).repeat_interleave(per_class)
    pipe.model.check_input(torch.empty(len(labels), *pipe.sample_shape), class_labels=labels)
    images = sample_images(
        pipe,
        labels,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        solver=solver,
        grid=grid,
        seed=seed,
        progress=True,
    )
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, picture in enumerate(pipe.numpy_to_pil(images.permute(0, 2, 3, 1).numpy())):
        paths.append(folder / f"{i:05d}-class-{int(labels[i])}.png")
        picture.save(paths[-1])
    grid_path = plots.save_sample_grid(images, labels, folder / "grid.png", names)
    say(f"{len(paths)} images in {folder}; together in {grid_path}")
    return paths


def evaluate(
    model_dir: str, recipe: Recipe, output: str | None = None, seed: int = 0, say: Say = print
) -> dict[str, Any]:
    """``diffusionblocks evaluate``: the table of figures of a saved model on a recipe's data."""
    pipe = BlockedDiTPipeline.from_pretrained(model_dir).to(pick_device())
    train_data, test_data = load_data(recipe)
    cache = Path(model_dir).parent / "cache" if Path(model_dir).is_dir() else Path("cache")
    check_classes(train_data, pipe.model)
    vae = pipe.vae or load_vae(recipe)
    if vae is not None:
        vae.to(pipe.model.device)
    figures = score(pipe.model, recipe, train_data, test_data, cache_dir=cache, seed=seed, vae=vae, progress=True)
    say(format_figures(figures))
    if output is not None:
        serialization.write_json(Path(output), figures)
        say(f"written to {output}")
    return figures


def encode(recipe: Recipe, output_dir: str, split: str, batch_size: int = 32, say: Say = print) -> Path:
    """``diffusionblocks encode``: VAE latents of a recipe's images, for training on them."""
    vae = load_vae(recipe)
    if vae is None:
        raise ValueError(f"recipe {recipe.name!r} names no VAE: set sampling.vae to a directory or Hub id.")
    data = recipe.data
    if is_latent_source(data.name) or data.name == _LATENTS:
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
