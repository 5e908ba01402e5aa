"""Scoring a trained model of images: samples, and the table of figures."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import ImageDataset
from ..families.dit import BlockedDiTModel
from ..objectives import held_out_loss
from ..pipelines import BlockedDiTPipeline
from ..recipes import Recipe


@torch.no_grad()
def sample_images(
    pipe: BlockedDiTPipeline,
    labels: Tensor,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    solver: str = "euler",
    grid: str = "karras",
    batch_size: int = 250,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Images in [0, 1], [labels, channels, height, width], sampled in batches from one seeded stream."""
    from tqdm.auto import tqdm

    pipe.set_progress_bar_config(disable=True)
    device = next(pipe.model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    batches = [
        pipe(
            part.to(device),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            solver=solver,
            grid=grid,
            generator=generator,
            output_type="pt",
        ).images.cpu()
        for part in tqdm(labels.split(batch_size), desc="sampling", disable=not progress, unit="batch")
    ]
    return torch.cat(batches)


def score(
    model: BlockedDiTModel,
    recipe: Recipe,
    train: ImageDataset,
    test: ImageDataset,
    *,
    cache_dir: str | Path,
    seed: int = 0,
    vae: Any = None,
    edges: list[float] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The table of figures: held-out loss, Frechet and kernel distance, precision, recall, class agreement.

    The distances are between samples with the labels of held-out images and those images. The feature network is
    ``inception`` where its weights can be had, otherwise a small classifier trained on the training split, kept in
    ``cache_dir`` and named after the data set. The held-out loss is also split by noise range, by the model's own
    blocks or by descending ``edges``.
    """
    settings = recipe.evaluation
    held_out = held_out_loss(
        model, test, num_draws=settings.num_draws, max_samples=settings.held_out_samples, edges=edges
    )
    classifier, network = _feature_networks(recipe, train, test, Path(cache_dir))
    count = settings.num_samples
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(test), generator=generator) for _ in range(-(-count // len(test)))])[:count]
    labels = test.labels[order]
    start = time.perf_counter()
    images = sample_images(
        BlockedDiTPipeline(model, vae=vae),
        labels,
        num_inference_steps=recipe.sampling.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        solver=recipe.sampling.solver,
        grid=recipe.sampling.grid,
        batch_size=settings.batch_size,
        seed=seed,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    real = test[list(range(len(test)))]["pixel_values"]
    figures: dict[str, Any] = {
        "held_out_loss": held_out.total,
        "held_out_loss_standard_error": held_out.standard_error,
        "held_out_loss_per_range": held_out.per_range,
        "num_samples": count,
        "guidance_scale": settings.guidance_scale,
        "num_inference_steps": recipe.sampling.num_inference_steps,
        "sampling_seconds": seconds,
    }
    figures |= compare_images(2 * images - 1, real, network)
    if classifier is not None:
        from ..metrics import ClassAgreement

        figures |= ClassAgreement(classifier).compute(predictions=2 * images - 1, references=labels)
    return figures


def compare_images(samples: Tensor, real: Tensor, network: Any) -> dict[str, Any]:
    """Distances between two sets of images [N, channels, height, width] in [-1, 1], under a feature network."""
    from ..metrics import FrechetDistance, KernelDistance, PrecisionRecall

    sampled, reference = network(samples), network(real)
    figures: dict[str, Any] = {}
    size = min(1000, len(sampled), len(reference))
    for metric in (
        FrechetDistance(network),
        KernelDistance(network, subsets=20, subset_size=size),
        PrecisionRecall(network),
    ):
        result = metric.compute(predictions=sampled, references=reference)
        figures |= {k: v for k, v in result.items() if k not in ("name", "k")}
    return figures


def _feature_networks(recipe: Recipe, train: ImageDataset, test: ImageDataset, cache_dir: Path) -> tuple[Any, Any]:
    from ..metrics import ClassifierFeatures, InceptionFeatures, train_classifier

    if recipe.evaluation.feature_network not in ("classifier", "inception"):
        raise ValueError(
            f"evaluation.feature_network={recipe.evaluation.feature_network!r} must be 'classifier' or 'inception'; "
            "other networks can be used from Python (hf_diffusionblocks.metrics.ModuleFeatures)."
        )
    if train.is_latent:
        return None, InceptionFeatures()
    name = f"{Path(recipe.data.name).name}-cnn"
    epochs, width = recipe.evaluation.classifier_epochs, recipe.evaluation.classifier_width
    folder = cache_dir / f"{name}-{train.fingerprint}-{epochs}-{width}"
    try:
        classifier = ClassifierFeatures.load(folder)
    except (FileNotFoundError, ValueError):  # not there yet, or damaged: train it again
        classifier = train_classifier(
            train,
            train.num_classes,
            eval_dataset=test,
            name=name,
            epochs=epochs,
            width=width,
            stride=2 if train.image_size >= 24 else 1,
        )
        classifier.save(folder)
    if recipe.evaluation.feature_network == "inception":
        try:
            return classifier, InceptionFeatures()
        except (ImportError, OSError) as error:
            print(f"Inception features cannot be had ({error}); using {classifier.name} instead.")
    return classifier, classifier
