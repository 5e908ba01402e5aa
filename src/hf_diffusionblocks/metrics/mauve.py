"""MAUVE, and the features of texts that it compares.

mauve-text does the clustering and the divergence curve; here texts become features, from any transformers model and not
only GPT-2, and the figure is called after that model. mauve-text is GPLv3, so it is an extra and imported when needed.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedTokenizerBase

from .features import FeatureNetwork
from .image import _FeatureMetric
from .text import check_ids, check_length, check_texts, load_model, pad_right

_FEW_SAMPLES = 1000
_CURVE_POINTS = 25  # mauve-text's default


class TextFeatures(FeatureNetwork):
    """A transformers model as a map from texts to features [N, width]: its last hidden states, pooled.

    Args:
        model: any model of transformers with a ``last_hidden_state`` (of a causal one, the part below the head), or its
            name.
        tokenizer: the model's; may be left out when ``model`` is a name.
        name: goes into the name of every figure; by default the last part of the name the model was loaded by.
        pooling: "last" takes the state of a text's last token (as in the MAUVE paper), "mean" the mean over tokens.
        batch_size: texts per forward pass.
        max_length: tokens after which a text is cut; by default what the model takes, at most 1024.

    Raises ValueError for other settings, and for a tokenizer that does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module | str,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        *,
        name: str | None = None,
        pooling: str = "last",
        batch_size: int = 8,
        max_length: int | None = None,
    ) -> None:
        if pooling not in ("last", "mean"):
            raise ValueError(f"pooling={pooling!r} must be 'last' or 'mean'.")
        module, self.tokenizer, name = load_model(model, tokenizer, name, AutoModel)
        super().__init__(name, getattr(module, "base_model", module), batch_size=batch_size)
        self.pooling = pooling
        self.max_length = check_length("max_length", max_length, module, self.tokenizer)

    def _settings(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return f"{self.pooling} {self.max_length} {backend.to_str() if backend else self.tokenizer!r}"

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Features of ``texts``: float32 [N, width] on the CPU. Raises ValueError for what is not a list of texts, and
        for a text without tokens."""
        texts = check_texts("texts", texts, empty=False)
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_length, verbose=False)["input_ids"]
        for index, row in enumerate(ids):
            if not row:
                raise ValueError(f"texts[{index}]={texts[index][:40]!r} has no tokens; drop and count such texts.")
        check_ids(ids, self.module)
        self.module.eval()
        order = sorted(range(len(ids)), key=lambda index: (len(ids[index]), ids[index]))
        features: list[Any] = [None] * len(ids)
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            inputs = pad_right([ids[index] for index in batch], self.tokenizer, self.module)
            states = getattr(self.module(**inputs), "last_hidden_state", None)
            if states is None:
                raise ValueError(f"{self.name} ({type(self.module).__name__}) returns no last_hidden_state.")
            for row, index in enumerate(batch):
                state = states[row, : len(ids[index])].float()
                features[index] = (state[-1] if self.pooling == "last" else state.mean(dim=0)).cpu()
        return torch.stack(features)


def _load_mauve() -> Callable[..., Any]:
    try:
        from mauve import compute_mauve
    except ImportError as error:
        raise ImportError(
            f"MAUVE needs the mauve-text package ({error}). It is GPLv3 and therefore not installed by default: "
            "pip install 'hf-diffusionblocks[text]'"
        ) from error
    return compute_mauve


def _area(curve: np.ndarray) -> float:
    """Area under the divergence curve, points [M, 2] that run from (1, 0) to (0, 1).

    It is mauve-text's own ``mauve`` where the x are distinct. For two sets very much alike some round to x = 1, and
    mauve-text 0.4.0 then may sort the end (1, 0) before them: two equal sets scored 0.75. Here (1, 0) stays the end.
    """
    areas = []
    for x, y in (curve.T, curve.T[::-1]):
        order = np.lexsort((-y, x))
        areas.append(np.trapezoid(y[order], x[order]))
    return float(np.mean(areas))


def _floor(scaling_factor: float) -> float:
    """The area for P and Q without a common bucket: KL(Q | wP + (1-w)Q) = -log(1-w), KL(P | ...) = -log w. With many
    points Gamma(c+1)^2 / Gamma(2c+1); here with those that mauve-text takes."""
    w = np.linspace(1e-6, 1 - 1e-6, _CURVE_POINTS)
    inner = np.stack([1 - w, w], axis=1) ** scaling_factor
    return _area(np.concatenate([[[1.0, 0.0]], inner, [[0.0, 1.0]]]))


class Mauve(_FeatureMetric):
    """MAUVE between generated and human texts (arXiv 2102.01454), by mauve-text; 1 means alike, higher is better.

    ``predictions`` and ``references`` are texts, or features [N, F]. The result holds ``mauve_<network>``, that key as
    ``name``; ``floor``, what two sets without anything in common score at this scaling factor; ``num_predictions``,
    ``num_references``, ``num_buckets``, ``scaling_factor``, ``seed`` and ``feature_network``. Figures of different
    settings cannot be compared, and under a few thousand samples MAUVE is biased; a warning says so under 1000.

    Args:
        features: turns texts into features and gives its name to the figure. A string is the name of the network that
            precomputed features come from; texts are then refused.
        scaling_factor: c in exp(-c KL); 5 is the default of mauve-text. The floor is 0.004 at 5, but 0.95 at 0.2,
            the value that arXiv 2506.14202 states: there all figures lie between 0.95 and 1.
        num_buckets: clusters of the joint features; "auto" is a tenth of the smaller set.
        seed: of the clustering.
        **kwargs: of ``evaluate.Metric``.

    Raises:
        ImportError: if mauve-text is not installed.
        ValueError: for fewer than two texts, what is not a text, NaN or infinity, features of different widths, and
            more buckets than samples.
    """

    description = "Area under the divergence curve between generated and human texts, in clustered features."
    citation = "Pillutla et al., MAUVE: Measuring the Gap Between Neural Text and Human Text, 2021. arXiv:2102.01454"

    def __init__(
        self,
        features: TextFeatures | str,
        *,
        scaling_factor: float = 5.0,
        num_buckets: int | str = "auto",
        seed: int = 25,
        **kwargs: Any,
    ) -> None:
        if not isinstance(features, (TextFeatures, str)) or not features:
            raise ValueError(f"features={type(features).__name__} must be TextFeatures, or the name of a network.")
        if scaling_factor <= 0 or (num_buckets != "auto" and (not isinstance(num_buckets, int) or num_buckets < 2)):
            raise ValueError(
                f"scaling_factor={scaling_factor} must be above 0, and num_buckets={num_buckets!r} an integer of at "
                "least 2 or 'auto'."
            )
        self.scaling_factor, self.num_buckets = scaling_factor, num_buckets
        self._mauve = _load_mauve()
        super().__init__(features, seed=seed, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Add one text or one feature vector [F] to either side."""
        self.add_batch(
            predictions=None if prediction is None else [prediction],
            references=None if reference is None else [reference],
        )

    def _rows(self, name: str, value: Any) -> np.ndarray:
        if isinstance(value, np.ndarray) and value.dtype.kind in "OUT":
            value = value.tolist()
        if not isinstance(value, (Tensor, np.ndarray)):
            value = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
            if not (isinstance(value, list) and value and isinstance(value[0], (list, tuple, Tensor, np.ndarray))):
                texts = check_texts(name, value, empty=False)
                if isinstance(self.feature_network, str):
                    raise ValueError(
                        f"{name} are texts, but only the name of a feature network, {self.feature_network!r}, was "
                        "given. Give TextFeatures, or features [N, F]."
                    )
                value = self.feature_network(texts)
        return super()._rows(name, value)

    def _compare(self, predictions: Tensor, references: Tensor) -> dict[str, Any]:
        counts = {"num_predictions": len(predictions), "num_references": len(references)}
        if not isinstance(self.num_buckets, str) and self.num_buckets > sum(counts.values()):
            raise ValueError(f"num_buckets={self.num_buckets} exceeds the {sum(counts.values())} samples of both sets.")
        if min(counts.values()) < _FEW_SAMPLES:
            warnings.warn(
                f"MAUVE of {len(predictions)} predictions and {len(references)} references is biased: it is made for "
                f"a few thousand of each. Compare figures of equal counts only, and give at least {_FEW_SAMPLES}.",
                UserWarning,
                stacklevel=2,
            )
        # The clustering depends on the order of the rows; sorting them makes the figure independent of it.
        ordered = [sorted(rows.numpy(), key=lambda row: row.tobytes()) for rows in (references, predictions)]
        p, q = map(np.stack, ordered)
        result = self._mauve(
            p_features=p,
            q_features=q,
            num_buckets=self.num_buckets,
            mauve_scaling_factor=self.scaling_factor,
            seed=self.seed,
            divergence_curve_discretization_size=_CURVE_POINTS,
        )
        key = self._key("mauve")
        return {
            key: _area(result.divergence_curve),
            "name": key,
            "floor": _floor(self.scaling_factor),
            **counts,
            "num_buckets": int(result.num_buckets),
            "scaling_factor": self.scaling_factor,
            "seed": self.seed,
        }
