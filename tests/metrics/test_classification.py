"""Accuracy, likelihood and calibration against hand-made answers."""

import math

import pytest
import torch

from hf_diffusionblocks.metrics import ClassificationQuality


def test_the_figures_are_those_of_the_formulas():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    labels = torch.tensor([0, 1, 0, 1])
    found = ClassificationQuality(num_bins=10).compute(predictions=probabilities.log(), references=labels)
    assert found["accuracy"] == 0.75
    assert found["accuracy_standard_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    nll = -(math.log(0.9) + math.log(0.1) + 2 * math.log(0.6)) / 4
    assert found["negative_log_likelihood"] == pytest.approx(nll)
    # two of confidence 0.9, one right; two of confidence 0.6, both right
    assert found["calibration_error"] == pytest.approx(0.5 * abs(0.5 - 0.9) + 0.5 * abs(1 - 0.6))
    assert (found["num_predictions"], found["calibration_bins"]) == (4, 10)


def test_batches_add_up_and_logits_need_not_be_normalised():
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 7), torch.randint(7, (50,))
    whole = ClassificationQuality().compute(predictions=logits, references=labels)
    metric = ClassificationQuality(keep_in_memory=True)
    for rows in (slice(0, 20), slice(20, 50)):
        metric.add_batch(predictions=(logits + 3)[rows], references=labels[rows])
    assert metric.compute() == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2), [0, 1], r"shape \[2\] and references \[2\]"),
        (torch.zeros(2, 3), [0], r"references \[1\]"),
        (torch.full((1, 3), math.nan), [0], "predictions hold NaN"),
        (torch.zeros(1, 3), [3], "references run from 3 to 3; predictions have classes 0 to 2"),
    ],
)
def test_predictions_that_cannot_be_scored(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        ClassificationQuality().compute(predictions=logits, references=torch.tensor(labels))


def test_bins_are_counted():
    with pytest.raises(ValueError, match="num_bins=0 must be a whole number of at least 1"):
        ClassificationQuality(num_bins=0)
