"""Scoring a trained model of images: samples, and the table of figures."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import ImageDataset
from ..families.dit import BlockedDiTModel
from ..objectives import held_out_loss
from ..pipelines import BlockedDiTPipeline, decode_latents
from ..recipes import Recipe

_DECODED = 20_000  # so many latents are decoded to train the classifier of a latent model's score


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
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Images in [0, 1], [labels, channels, height, width], sampled in batches from one stream, given or seeded."""
    pipe.set_progress_bar_config(disable=True)
    device = next(pipe.model.parameters()).device
    generator = generator or torch.Generator().manual_seed(seed)
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


def compares_samples(recipe: Recipe, train: ImageDataset) -> bool:
    """Whether samples can be compared with images: by a classifier, which needs two classes, or by Inception."""
    return train.num_classes > 1 or recipe.evaluation.feature_network == "inception"


def check_scoring(recipe: Recipe, test: ImageDataset) -> None:
    """Raise a ``ValueError`` for fewer samples or held-out images than precision and recall (3 neighbours) need."""
    count = recipe.evaluation.num_samples
    if min(count, len(test)) < 4:
        raise ValueError(
            f"evaluation.num_samples={count} and {len(test)} held-out images are too few to score: at least 4 of each "
            "are compared. Give more, or train with --no-report."
        )


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

    Images of one class, for which there is no classifier, have the held-out loss alone unless Inception can be had.

    The distances are between samples with the labels of held-out images and those images. The feature network is
    ``inception`` where its weights can be had, otherwise a small classifier trained on the training split, kept in
    ``cache_dir`` and named after the data set. The held-out loss is also split by noise range, by the model's own
    blocks or by descending ``edges``.
    """
    settings = recipe.evaluation
    if compares_samples(recipe, train):
        check_scoring(recipe, test)
    if test.is_latent and vae is None:
        raise ValueError(
            "the data are latents, and a score compares images: set sampling.vae to the VAE that made them, or load a "
            "model that was saved with its vae/."
        )
    held_out = held_out_loss(
        model, test, num_draws=settings.num_draws, max_samples=settings.held_out_samples, edges=edges
    )
    classifier, network = _feature_networks(recipe, train, test, Path(cache_dir), vae)
    figures: dict[str, Any] = {
        "held_out_loss": held_out.total,
        "held_out_loss_standard_error": held_out.standard_error,
        "held_out_loss_per_range": held_out.per_range,
    }
    if network is None:
        return figures
    count = settings.num_samples
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(test), generator=generator) for _ in range(-(-count // len(test)))])[:count]
    labels = test.labels[order]
    sampled, guessed, seconds = _sampled_features(model, recipe, labels, network, classifier, seed, vae, progress)
    figures |= {
        "num_samples": count,
        "guidance_scale": settings.guidance_scale,
        "num_inference_steps": recipe.sampling.num_inference_steps,
        "sampling_seconds": seconds,
    }
    figures |= compare_features(sampled, _features_of(test, network, vae, settings.batch_size), network)
    if classifier is not None:
        from ..metrics import ClassAgreement

        figures |= ClassAgreement(classifier).compute(predictions=guessed, references=labels)
    return figures


def _sampled_features(
    model: BlockedDiTModel,
    recipe: Recipe,
    labels: Tensor,
    network: Any,
    classifier: Any,
    seed: int,
    vae: Any,
    progress: bool,
) -> tuple[Tensor, Tensor | None, float]:
    """Features of samples with these labels, the classes that a classifier takes them for, and seconds of sampling."""
    settings = recipe.evaluation
    sampled, guessed, seconds = [], [], 0.0
    pipe, stream = BlockedDiTPipeline(model, vae=vae), torch.Generator().manual_seed(seed)
    for part in tqdm(labels.split(settings.batch_size), desc="sampling", disable=not progress, unit="batch"):
        start = time.perf_counter()
        images = 2 * sample_images(
            pipe,
            part,
            num_inference_steps=recipe.sampling.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            solver=recipe.sampling.solver,
            grid=recipe.sampling.grid,
            batch_size=settings.batch_size,
            generator=stream,
        )
        images -= 1
        seconds += time.perf_counter() - start
        sampled.append(network(images))  # a batch at a time: the images of all samples may not fit into memory
        if classifier is not None:
            guessed.append(classifier.predict(images))
    return torch.cat(sampled), torch.cat(guessed) if guessed else None, seconds


def _pixels(dataset: ImageDataset, rows: list[int], vae: Any) -> Tensor:
    """Images [rows, channels, height, width] in [-1, 1] of a data set; of latents, decoded."""
    pixels = dataset[rows]["pixel_values"]
    if not dataset.is_latent:
        return pixels
    return decode_latents(vae, pixels).float().clamp(-1, 1).cpu()


def _features_of(dataset: ImageDataset, network: Any, vae: Any, batch_size: int) -> Any:
    rows = range(len(dataset))
    parts = [network(_pixels(dataset, list(rows[i : i + batch_size]), vae)) for i in rows[::batch_size]]
    return torch.cat(parts)


def decoded(dataset: ImageDataset, vae: Any, max_samples: int, batch_size: int = 32) -> ImageDataset:
    """A data set of latents as images, the first so many; one of images as it is."""
    if not dataset.is_latent:
        return dataset
    rows = list(range(min(len(dataset), max_samples)))
    parts = [_pixels(dataset, rows[i : i + batch_size], vae) for i in rows[::batch_size]]
    pixels = torch.cat([part.add(1).mul(127.5).round().to(torch.uint8) for part in parts])
    return ImageDataset(pixels, dataset.labels[rows], dataset.class_names)


def compare_features(sampled: Tensor, reference: Tensor, network: Any) -> dict[str, Any]:
    """Distances between two sets of features [N, dimensions] that a network gave."""
    from ..metrics import FrechetDistance, KernelDistance, PrecisionRecall

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


def _feature_networks(
    recipe: Recipe, train: ImageDataset, test: ImageDataset, cache_dir: Path, vae: Any
) -> tuple[Any, Any]:
    """A classifier of the classes and the network that features are read from; None for what cannot be had."""
    from ..metrics import ClassifierFeatures, train_classifier

    if train.num_classes == 1:
        asked = compares_samples(recipe, train)
        return None, (_inception("the held-out loss is the only score") if asked else None)
    if train.is_latent and recipe.evaluation.feature_network == "inception":
        # No classifier beside it: decoding the training images would be a job of its own.
        if (network := _inception("a classifier of decoded images is trained instead")) is not None:
            return None, network
    name = f"{Path(recipe.data.name).name}-cnn"
    epochs, width = recipe.evaluation.classifier_epochs, recipe.evaluation.classifier_width
    folder = cache_dir / f"{name}-{train.fingerprint}-{epochs}-{width}"
    latent, train, test = train.is_latent, decoded(train, vae, _DECODED), decoded(test, vae, _DECODED)
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
    if recipe.evaluation.feature_network == "inception" and not latent:
        return classifier, _inception(f"using {classifier.name} instead") or classifier
    return classifier, classifier


def _inception(otherwise: str) -> Any:
    """Inception's features; None, saying what is done instead, where they cannot be had."""
    from ..metrics import InceptionFeatures

    try:
        return InceptionFeatures()
    except (ImportError, OSError) as error:
        print(f"Inception features cannot be had ({error}); {otherwise}.")
        return None
