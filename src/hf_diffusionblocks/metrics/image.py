"""Image metrics as ``evaluate.Metric`` subclasses: Frechet distance, kernel distance, precision and recall, class
agreement.

They take images [N, C, H, W] in [-1, 1] or features [N, F], at once (``compute``) or in batches (``add_batch``), and
reach no network. Predictions and references may differ in number. What is kept between calls is the features, never
the images: float32 rows in evaluate's Arrow store, under ``cache_dir`` (``$HF_HOME/metrics`` unless given) until
``compute`` removes them, or in memory with ``keep_in_memory=True``. A ``compute`` that fails empties the store.

Every result names its feature network, because figures of different networks cannot be compared.
"""

import os
from abc import ABC, abstractmethod
from typing import Any

import evaluate
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Features, Sequence, Value
from torch import Tensor

from .features import ClassifierFeatures, FeatureNetwork, InceptionFeatures, as_tensor
from .statistics import FeatureStatistics, frechet_distance, kernel_distance, precision_recall

_INPUTS = """
        predictions: generated images [N, C, H, W] in [-1, 1], or their features [N, F]; tensors, arrays or lists.
        references: real images [M, C, H, W], or their features [M, F].
"""
_ROWS_PER_WRITE = 65_536  # Arrow counts the elements of one list column in 32 bits


class _TidyMetric(evaluate.Metric):
    """An ``evaluate.Metric`` that leaves no file and no lock behind when ``compute`` fails."""

    writer: Any  # what ``evaluate.Metric`` has, and this class sets to None
    cache_file_name: Any
    filelock: Any

    def compute(self, *, predictions: Any = None, references: Any = None) -> dict[str, Any] | None:
        """Compute the metric over these inputs and all that were added before, then forget them."""
        try:
            given = predictions is not None and (references is not None or self._has_references())
            if self.writer is None and not given:
                raise ValueError("predictions or references are missing: give both, or add them before compute().")
            return super().compute(predictions=predictions, references=references)
        except BaseException:
            self._discard()
            raise
        finally:
            self.file_paths = self.filelocks = None
            self._forget()

    def _has_references(self) -> bool:
        """Whether references were given in another way than through the store."""
        return False

    def _forget(self) -> None:
        """Drop what a subclass keeps between ``add_batch`` and ``compute``."""

    def _discard(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.writer = self.buf_writer = self.data = None
        for path in [self.cache_file_name, *(self.file_paths or [])]:
            if path is not None and os.path.exists(path):
                os.remove(path)
        for lock in [self.filelock, *(self.filelocks or [])]:
            if lock is not None:
                lock.release()
        self.cache_file_name = self.filelock = self.selected_feature_format = None


class _FeatureMetric(_TidyMetric, ABC):
    """A metric of two sets of features. Subclasses set ``description``, ``citation`` and ``_compare``.

    Args:
        feature_network: turns images into features and gives its name to the figures. Inception when None. A string
            is the name of the network that precomputed features come from; images are then refused.
        seed: of random subsets, where the metric draws any.
        **kwargs: of ``evaluate.Metric``, such as ``cache_dir``, ``keep_in_memory``, ``num_process``, ``process_id``.

    Raises:
        ImportError, OSError: if Inception is wanted and cannot be had; see ``InceptionFeatures``.
    """

    description = ""
    citation = ""

    def __init__(self, feature_network: FeatureNetwork | str | None = None, *, seed: int = 0, **kwargs: Any) -> None:
        self.feature_network = InceptionFeatures() if feature_network is None else feature_network
        if not isinstance(self.feature_network, (FeatureNetwork, str)):
            raise ValueError(
                f"feature_network={type(feature_network).__name__} is neither a FeatureNetwork nor a name. Wrap a "
                "module as ModuleFeatures(name, module)."
            )
        super().__init__(seed=seed, **kwargs)

    @property
    def network_name(self) -> str:
        return self.feature_network if isinstance(self.feature_network, str) else self.feature_network.name

    def _key(self, metric: str, with_inception: str | None = None) -> str:
        if with_inception and isinstance(self.feature_network, InceptionFeatures):
            return with_inception
        return f"{metric}_{self.network_name}"

    def _info(self) -> evaluate.MetricInfo:
        rows = Sequence(Value("float32"))
        info = evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description=_INPUTS,
            features=Features({"predictions": rows, "references": rows}),
        )
        # MetricInfo's constructor allows a format for scalars only. Without one, compute() would hand over lists of
        # Python floats: 10,000 x 128 features take 1 s that way, 0.03 s as Arrow.
        info.format = "arrow"
        return info

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Add images or features; either side may be left out, and the two may differ in number."""
        columns = {
            name: np.zeros((0, 1), np.float32) if value is None else self._rows(name, value)
            for name, value in (("predictions", predictions), ("references", references))
        }
        longest = max(map(len, columns.values()))
        if not longest:
            raise ValueError("add_batch() got neither predictions nor references; give at least one of them.")
        if self.writer is None:
            self.selected_feature_format = self.features
            self._init_writer()
        for start in range(0, longest, _ROWS_PER_WRITE):
            count = min(_ROWS_PER_WRITE, longest - start)
            rows = {name: _list_array(value[start : start + count], count) for name, value in columns.items()}
            self.writer.write_table(pa.table(rows))

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Add one image [C, H, W] or one feature vector [F] to either side."""
        self.add_batch(
            predictions=None if prediction is None else as_tensor(prediction)[None],
            references=None if reference is None else as_tensor(reference)[None],
        )

    def _rows(self, name: str, value: Any) -> np.ndarray:
        value = as_tensor(value)
        if not len(value):
            raise ValueError(f"{name} of shape {tuple(value.shape)} are empty; at least one is needed.")
        if value.ndim == 4:
            if isinstance(self.feature_network, str):
                raise ValueError(
                    f"{name} are images, but only the name of a feature network, {self.feature_network!r}, was given. "
                    "Give the network itself, or features [N, F]."
                )
            value = self.feature_network(value)
        elif value.ndim != 2:
            raise ValueError(f"{name} must be images [N, C, H, W] or features [N, F], not shape {tuple(value.shape)}.")
        value = value.float()
        if broken := int((~value.isfinite().all(dim=1)).sum()):
            raise ValueError(f"{broken} of {len(value)} feature vectors of {name} hold NaN or infinity.")
        return value.contiguous().numpy()

    def _compute(self, predictions: pa.ChunkedArray, references: pa.ChunkedArray) -> dict[str, Any]:
        sets = [_matrix(name, rows) for name, rows in (("predictions", predictions), ("references", references))]
        if sets[0].shape[1] != sets[1].shape[1]:
            raise ValueError(
                f"predictions have features of width {sets[0].shape[1]}, references of width {sets[1].shape[1]}. "
                "Both must come from one network."
            )
        return self._compare(*sets) | {"feature_network": self.network_name}

    @abstractmethod
    def _compare(self, predictions: Tensor, references: Tensor) -> dict[str, Any]:
        """The metric's figures from two sets of features, [samples, width] each."""


def _list_array(rows: np.ndarray, length: int) -> pa.ListArray:
    """``rows`` as an Arrow list column of ``length`` entries, those beyond the last row null."""
    offsets = np.minimum(np.arange(length + 1), len(rows)) * rows.shape[1]
    missing = pa.array(np.arange(length) >= len(rows))
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(rows.reshape(-1)), mask=missing)


def _matrix(name: str, column: pa.ChunkedArray) -> Tensor:
    count = len(column) - column.null_count
    if count < 2:
        raise ValueError(f"{count} {name} are too few: at least 2 are needed.")
    widths = sorted(pc.unique(pc.list_value_length(column).drop_null()).to_pylist())
    if len(widths) > 1:
        raise ValueError(f"{name} have features of different widths: {widths}. All must come from one network.")
    values = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
    return torch.from_numpy(values.reshape(count, -1)).double()


class FrechetDistance(_FeatureMetric):
    """Frechet distance between Gaussians fitted to two sets of features (arXiv 1706.08500, Eq. 6); lower is better.

    ``references`` may also be ``FeatureStatistics``, for instance cached ones. The result holds the distance under
    ``fid`` with Inception features and under ``frechet_distance_<network>`` with any other, and that key as ``name``.
    Biased upwards for few samples (a warning says so when they are fewer than the features): compare equal numbers.

    Raises:
        ValueError: for fewer than two samples, NaN or infinity, features of different widths, and reference statistics
            of another network.
    """

    description = "Frechet distance between Gaussians fitted to features of generated and of real images."
    citation = "Heusel et al., GANs Trained by a Two Time-Scale Update Rule, 2017. arXiv:1706.08500"
    _statistics: FeatureStatistics | None = None

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Add images or features, or reference ``FeatureStatistics``, which take the place of all references."""
        if isinstance(references, FeatureStatistics):
            self._check_network(references)
            self._statistics, references = references, None
            if predictions is None:
                return
        super().add_batch(predictions=predictions, references=references)

    def _check_network(self, statistics: FeatureStatistics) -> None:
        known = not isinstance(self.feature_network, str) and statistics.network_fingerprint
        fingerprint = getattr(self.feature_network, "fingerprint", "") if known else ""
        if statistics.network != self.network_name or (known and statistics.network_fingerprint != fingerprint):
            raise ValueError(
                f"the reference statistics come from {statistics.network!r} (weights "
                f"{statistics.network_fingerprint or 'unknown'}), the metric uses {self.network_name!r} (weights "
                f"{fingerprint or 'unknown'}). Compute them with the metric's own network."
            )

    def _has_references(self) -> bool:
        return self._statistics is not None

    def _forget(self) -> None:
        self._statistics = None

    def _compute(self, predictions: pa.ChunkedArray, references: pa.ChunkedArray) -> dict[str, Any]:
        if self._statistics is None:
            return super()._compute(predictions, references)
        if references.null_count < len(references):
            raise ValueError("references were given both as samples and as FeatureStatistics. Give one of the two.")
        result = self._result(self._fit(_matrix("predictions", predictions)), self._statistics)
        return result | {"feature_network": self.network_name}

    def _compare(self, predictions: Tensor, references: Tensor) -> dict[str, Any]:
        return self._result(self._fit(predictions), self._fit(references))

    def _fit(self, features: Tensor) -> FeatureStatistics:
        return FeatureStatistics.from_batches([features], self.network_name)

    def _result(self, predictions: FeatureStatistics, references: FeatureStatistics) -> dict[str, Any]:
        key = self._key("frechet_distance", with_inception="fid")
        return {key: frechet_distance(predictions, references), "name": key}


class KernelDistance(_FeatureMetric):
    """Kernel distance between two sets of features (arXiv 1801.01401): unbiased also for few samples; lower is better.

    The result holds the mean over random subsets under ``kid`` with Inception features and under
    ``kernel_distance_<network>`` with any other, that key as ``name``, and the standard deviation over the subsets
    under the key with ``_std`` appended.

    Args:
        subsets, subset_size: as for ``kernel_distance``; the defaults are the usual 100 of 1000.
        feature_network, seed, **kwargs: as for every feature metric.
    """

    description = "Squared maximum mean discrepancy, cubic kernel, between features of generated and of real images."
    citation = "Binkowski et al., Demystifying MMD GANs, 2018. arXiv:1801.01401"

    def __init__(
        self,
        feature_network: FeatureNetwork | str | None = None,
        *,
        subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if subsets < 1 or subset_size < 2:
            raise ValueError(f"subsets={subsets} must be at least 1 and subset_size={subset_size} at least 2.")
        self.subsets, self.subset_size = subsets, subset_size
        super().__init__(feature_network, seed=seed, **kwargs)

    def _compare(self, predictions: Tensor, references: Tensor) -> dict[str, Any]:
        key = self._key("kernel_distance", with_inception="kid")
        mean, deviation = kernel_distance(
            predictions, references, subsets=self.subsets, subset_size=self.subset_size, seed=self.seed
        )
        return {key: mean, f"{key}_std": deviation, "name": key}


class PrecisionRecall(_FeatureMetric):
    """Improved precision and recall (arXiv 1904.06991): how much of the predictions is real, and of the real covered.

    The result holds ``precision_<network>``, ``recall_<network>`` and ``k``.

    Args:
        k: a ball around a sample reaches to its k-th nearest neighbour in the same set.
        feature_network, seed, **kwargs: as for every feature metric.
    """

    description = "Share of generated images inside the manifold of real ones, and of real inside that of generated."
    citation = "Kynkaanniemi et al., Improved Precision and Recall Metric, 2019. arXiv:1904.06991"

    def __init__(self, feature_network: FeatureNetwork | str | None = None, *, k: int = 3, **kwargs: Any) -> None:
        if k < 1:
            raise ValueError(f"k={k} must be at least 1.")
        self.k = k
        super().__init__(feature_network, **kwargs)

    def _compare(self, predictions: Tensor, references: Tensor) -> dict[str, Any]:
        precision, recall = precision_recall(predictions, references, k=self.k)
        return {self._key("precision"): precision, self._key("recall"): recall, "k": self.k}


class ClassAgreement(_TidyMetric):
    """Share of samples that a classifier of stated accuracy puts into the class they were asked to be of.

    ``predictions`` are images [N, C, H, W] in [-1, 1] or predicted classes [N], ``references`` the classes asked for,
    integers [N]. The result holds ``class_agreement``, ``classifier`` and ``classifier_accuracy``: perfect samples
    reach about the accuracy, not 1.

    Args:
        classifier: from ``train_classifier`` or ``ClassifierFeatures.load``.
        **kwargs: of ``evaluate.Metric``.

    Raises:
        ValueError: for a classifier whose accuracy nobody measured, classes out of range or not integers, and
            different numbers of predictions and references.
    """

    def __init__(self, classifier: ClassifierFeatures, **kwargs: Any) -> None:
        if classifier.accuracy is None:
            raise ValueError(
                f"the accuracy of classifier {classifier.name!r} is unknown, so agreement with it means nothing. "
                "Measure it on held-out images and set classifier.accuracy, or use train_classifier()."
            )
        self.classifier = classifier
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of generated images that a classifier puts into the requested class.",
            citation="",
            inputs_description="\n        predictions: images or classes; references: requested classes.\n",
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
            format="numpy",
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Add images [N, C, H, W] or predicted classes [N], and as many requested classes [N]."""
        if predictions is None or references is None:
            raise ValueError("class agreement needs predictions and references together, one for each sample.")
        predictions = as_tensor(predictions)
        if predictions.ndim == 4:
            predictions = self.classifier.predict(predictions)
        columns = {"predictions": predictions, "references": as_tensor(references)}
        for name, classes in columns.items():
            if classes.ndim != 1 or not len(classes) or classes.is_floating_point() or classes.is_complex():
                raise ValueError(f"{name} must be integers [N], not {classes.dtype} of shape {tuple(classes.shape)}.")
            if classes.min() < 0 or classes.max() >= self.classifier.num_classes:
                raise ValueError(
                    f"{name} reach from {classes.min()} to {classes.max()}, outside the classes 0 .. "
                    f"{self.classifier.num_classes - 1} of {self.classifier.name!r}."
                )
        if len(columns["predictions"]) != len(columns["references"]):
            raise ValueError(f"{len(columns['predictions'])} predictions have {len(columns['references'])} references.")
        super().add_batch(**{name: classes.long().tolist() for name, classes in columns.items()})

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Add one image [C, H, W] or predicted class, and its requested class."""
        if prediction is None or reference is None:
            raise ValueError("class agreement needs a prediction and its reference together.")
        self.add_batch(predictions=as_tensor(prediction)[None], references=as_tensor(reference)[None])

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, Any]:
        return {
            "class_agreement": float(np.mean(np.asarray(predictions) == np.asarray(references))),
            "classifier": self.classifier.name,
            "classifier_accuracy": self.classifier.accuracy,
        }
