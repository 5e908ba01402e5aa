"""Scoring a trained image classifier on held-out images."""

from typing import Any

import torch
from torch import Tensor

from ..batches import fetch
from ..families.image_classification import BlockedForImageClassification
from ..metrics import ClassificationQuality
from ..objectives import LabelPrediction
from ..recipes.sections import ClassEvaluation, ClassPrediction


@torch.no_grad()
def predict(
    model: BlockedForImageClassification,
    dataset: Any,
    *,
    num_inference_steps: int | None = None,
    num_draws: int | None = None,
    max_samples: int | None = None,
    batch_size: int = 250,
) -> tuple[Tensor, Tensor]:
    """Logits [N, classes] and labels [N] of a data set, on the CPU.

    Args:
        model: with all blocks, in any mode.
        dataset: ``dataset[list of indices]`` gives ``pixel_values`` and ``class_labels``.
        num_inference_steps: as in the model's ``forward``.
        num_draws: the same.
        max_samples: use the first so many images only.
        batch_size: images per forward pass.
    """
    training, count = model.training, min(len(dataset), max_samples or len(dataset))
    walk = {"num_inference_steps": num_inference_steps, "num_draws": num_draws}
    model.eval()
    logits, labels = [], []
    for start in range(0, count, batch_size):
        batch = fetch(dataset, list(range(start, min(start + batch_size, count))))
        logits.append(model(batch["pixel_values"].to(model.device), **walk).logits.float().cpu())
        labels.append(batch["class_labels"].cpu())
    model.train(training)
    return torch.cat(logits), torch.cat(labels)


def score_classifier(
    model: BlockedForImageClassification,
    dataset: Any,
    prediction: ClassPrediction,
    settings: ClassEvaluation,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The table of figures: accuracy, likelihood and calibration, and what each block scores.

    Args:
        model: with all blocks.
        dataset: held-out images.
        prediction: how the model predicts.
        settings: on how many images, and how.
        seed: of the noise, for readouts that have some.

    Returns:
        What ``ClassificationQuality`` gives, and the loss that each block is trained
        on, on held-out images (with noise, it ranks nothing across models). Where the label is denoised, the accuracy
        for each number of steps as well, and that and the calibration for each number of noise draws asked for.
    """
    common = {"max_samples": settings.held_out_samples, "batch_size": settings.batch_size}
    walk = {"num_inference_steps": prediction.num_inference_steps, "num_draws": prediction.num_draws}
    quality = ClassificationQuality(settings.num_bins, keep_in_memory=True)
    logits, labels = predict(model, dataset, **walk, **common)
    figures = quality.compute(predictions=logits, references=labels)
    if model.config.two_stream:
        figures["num_inference_steps"] = walk["num_inference_steps"] or model.config.num_inference_steps
        figures["num_draws"] = walk["num_draws"] or model.config.num_draws
        accuracies = {}
        for steps in settings.steps:
            found = predict(model, dataset, num_inference_steps=steps, num_draws=walk["num_draws"], **common)[0]
            accuracies[steps] = float((found.argmax(-1) == labels).double().mean())
        if accuracies:
            figures["accuracy_by_steps"] = accuracies
        ensembles = {}
        for draws in settings.draws:
            found = predict(model, dataset, **walk | {"num_draws": draws}, **common)[0]
            ensembles[draws] = quality.compute(predictions=found, references=labels)
        for name in ("accuracy", "calibration_error", "negative_log_likelihood") if ensembles else ():
            figures[f"{name}_by_draws"] = {draws: found[name] for draws, found in ensembles.items()}
    local = LabelPrediction().held_out(model, dataset, seed=seed, **common)
    return figures | {"local_nats_per_block": local.per_range}
