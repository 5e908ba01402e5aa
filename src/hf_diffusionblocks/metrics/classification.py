"""How good the probabilities of a classifier are: accuracy, negative log-likelihood, calibration error.

The expected calibration error (Guo et al., arXiv 1706.04599, Eq. 3) puts predictions into bins of equal width by their
confidence, the largest probability, and averages how far a bin's mean confidence is from its accuracy::

    ECE = sum_m |B_m| / N |acc(B_m) - conf(B_m)|

It is torchmetrics' ``MulticlassCalibrationError``. With few predictions per bin it is biased upwards.
"""

from typing import Any

import evaluate
import torch
import torch.nn.functional as F
from datasets import Features, Sequence, Value
from torchmetrics.functional.classification import multiclass_calibration_error

from .features import as_tensor
from .image import _TidyMetric


class ClassificationQuality(_TidyMetric):
    """Accuracy, negative log-likelihood and calibration error of a classifier.

    Args:
        num_bins: of the calibration error.
        **settings: of ``evaluate.Metric``.

    Example:
        >>> import torch
        >>> found = ClassificationQuality().compute(predictions=torch.eye(3).log(), references=[0, 1, 2])
        >>> found["accuracy"], found["calibration_error"]
        (1.0, 0.0)
    """

    def __init__(self, num_bins: int = 15, **settings: Any):
        if isinstance(num_bins, bool) or not isinstance(num_bins, int) or num_bins < 1:
            raise ValueError(f"num_bins={num_bins!r} must be a whole number of at least 1.")
        self.num_bins = num_bins
        super().__init__(**settings)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, negative log-likelihood (nats) and expected calibration error.",
            citation="Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599",
            inputs_description="\n        predictions: logits or log-probabilities [N, classes].\n        "
            "references: labels [N].\n",
            features=Features({"predictions": Sequence(Value("float32")), "references": Value("int64")}),
        )

    def compute(self, *, predictions: Any = None, references: Any = None) -> dict[str, Any] | None:
        """Compute the metric over these predictions and all that were added before, then forget them.

        Returns:
            ``accuracy`` with its standard error, ``negative_log_likelihood`` in nats with ``nll_standard_error``,
            ``calibration_error``, and how many predictions and bins there were.

        Raises:
            ValueError: for logits that are not [N, classes], or NaN, or labels that do not fit them.
        """
        if predictions is not None and references is not None:
            self.add_batch(predictions=predictions, references=references)
            predictions = references = None
        return super().compute(predictions=predictions, references=references)

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Add predictions and their labels."""
        logits, labels = as_tensor(predictions).float(), as_tensor(references).long()
        if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
            raise ValueError(
                f"predictions have shape {list(logits.shape)} and references {list(labels.shape)}: give logits "
                "[N, classes] and labels [N], at least one."
            )
        if bool(torch.isnan(logits).any()):
            raise ValueError("predictions hold NaN: the classifier diverged, or its images were not finite.")
        if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
            raise ValueError(
                f"references run from {int(labels.min())} to {int(labels.max())}; predictions have classes 0 to "
                f"{logits.shape[1] - 1}."
            )
        super().add_batch(predictions=logits.tolist(), references=labels.tolist())

    def _has_references(self) -> bool:
        return True

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        log_p, labels = torch.tensor(predictions).log_softmax(-1), torch.tensor(references)
        count = len(labels)
        hits = (log_p.argmax(-1) == labels).double()
        losses = F.nll_loss(log_p, labels, reduction="none").double()
        error = multiclass_calibration_error(log_p.exp(), labels, num_classes=log_p.shape[1], n_bins=self.num_bins)
        accuracy = float(hits.mean())
        return {
            "accuracy": accuracy,
            "accuracy_standard_error": (accuracy * (1 - accuracy) / count) ** 0.5,
            "negative_log_likelihood": float(losses.mean()),
            "nll_standard_error": float(losses.std(correction=0) / count**0.5),
            "calibration_error": float(error),
            "calibration_bins": self.num_bins,
            "num_predictions": count,
        }
