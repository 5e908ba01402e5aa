"""Metrics for generated samples. Each is an `evaluate.Metric` that works offline; none takes the model that made them.

The names below are imported when first used: `evaluate`, `torchmetrics` and scikit-learn take seconds to import, and
whoever needs only one of these names should not wait for the rest.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "ClassAgreement": "image",
    "ClassificationQuality": "classification",
    "ClassifierFeatures": "features",
    "DistinctN": "text",
    "FeatureNetwork": "features",
    "FeatureStatistics": "statistics",
    "FrechetDistance": "image",
    "GenerativePerplexity": "perplexity",
    "InceptionFeatures": "features",
    "KernelDistance": "image",
    "Mauve": "mauve",
    "ModuleFeatures": "features",
    "PrecisionRecall": "image",
    "Repetition": "text",
    "SelfBLEU": "text",
    "TextFeatures": "mauve",
    "feature_statistics": "statistics",
    "prefer_inception": "features",
    "train_classifier": "features",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {sorted(_HOMES)}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
