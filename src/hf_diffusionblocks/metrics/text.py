"""What the text metrics share, and those that count n-grams: distinct-n, repetition, self-BLEU.

All text metrics, also ``GenerativePerplexity`` (perplexity.py) and ``Mauve`` (mauve.py), are ``evaluate.Metric``s.
They take lists of texts, at once (``compute``) or in batches (``add_batch``), and reach no network unless a model is
given by its name on the Hub. The order of the texts changes no figure. Every result says what it depends on: the model,
the tokenizer that n-grams are counted with, and how many texts and tokens went in.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import evaluate
import torch
from datasets import Features, Value
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .image import _TidyMetric

Tokens = Sequence[Any]
NGramTokenizer: TypeAlias = Callable[[str], Tokens] | PreTrainedTokenizerBase | Tokenizer | None

_DEFAULT_LENGTH = 1024


# -- checks, loading, encoding -----------------------------------------------------------------------------------


def check_texts(name: str, texts: Any, *, empty: bool = True) -> list[str]:
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        raise ValueError(f"{name} must be a list of texts, not {type(texts).__name__}; for one text give [text].")
    texts = list(texts)
    if not texts:
        raise ValueError(f"{name} are empty; at least one text is needed.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{index}] is {type(text).__name__}, not str; decode tokens to text first.")
        if not text and not empty:
            raise ValueError(f"{name}[{index}] is an empty text; drop such texts, and report how many there were.")
    return texts


def load_model(
    model: Any, tokenizer: Any, name: str | None, auto: Any
) -> tuple[nn.Module, PreTrainedTokenizerBase, str]:
    """A model, its tokenizer and its name, from objects or from a folder or Hub name."""
    if isinstance(model, str):
        name, tokenizer = name or Path(model).name, model if tokenizer is None else tokenizer
        model = auto.from_pretrained(model)
    if isinstance(tokenizer, str):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={type(model).__name__} is neither a transformers model nor the name of one.")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"tokenizer={type(tokenizer).__name__} is neither a transformers tokenizer nor the name of one; wrap one "
            "of the tokenizers library as PreTrainedTokenizerFast(tokenizer_object=...)."
        )
    name = name or Path(getattr(getattr(model, "config", None), "_name_or_path", None) or "").name
    if not name.strip():
        raise ValueError("the model has no name of its own; give name=..., because figures are called after it.")
    return model.eval(), tokenizer, name


def check_length(name: str, length: int | None, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """``length``, or by default what model and tokenizer take, at most 1024."""
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or math.inf
    if length is None:
        return int(min(positions, tokenizer.model_max_length, _DEFAULT_LENGTH))
    if not 1 <= length <= positions:
        raise ValueError(f"{name}={length} must lie between 1 and the model's {positions} positions.")
    return length


def check_ids(ids: list[list[int]], model: nn.Module) -> None:
    rows = len(model.get_input_embeddings().weight)
    highest = max(max(row, default=0) for row in ids)
    if highest >= rows:
        raise ValueError(
            f"the tokenizer gave id {highest}, but the model knows 0 .. {rows - 1}. Give the model's own tokenizer."
        )


def pad_right(ids: list[list[int]], tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> dict[str, Tensor]:
    """Right-padded ids [B, T] and mask [B, T] on the model's device. Padding on the right keeps every position."""
    device = next((parameter.device for parameter in model.parameters()), None)
    pad, longest = tokenizer.pad_token_id or 0, max(map(len, ids))
    return {
        "input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in ids], device=device),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device),
    }


# -- n-grams -----------------------------------------------------------------------------------------------------


class NGrams:
    """Texts to tokens, under a name: whitespace, a tokenizer of transformers or tokenizers, or any function."""

    def __init__(self, tokenizer: NGramTokenizer) -> None:
        if tokenizer is None:
            self.name = "whitespace"
            self._split: Callable[[str], Tokens] = lambda text: text.split()
        elif isinstance(tokenizer, PreTrainedTokenizerBase):
            self.name = Path(tokenizer.name_or_path or "").name or type(tokenizer).__name__
            self._split = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        elif isinstance(tokenizer, Tokenizer):
            self.name = f"tokenizers.{type(tokenizer.model).__name__}"
            self._split = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        elif callable(tokenizer):
            self.name, self._split = getattr(tokenizer, "__name__", type(tokenizer).__name__), tokenizer
        else:
            raise ValueError(
                f"tokenizer={tokenizer!r} must be None (whitespace), a tokenizer, or a function of a text."
            )

    def __call__(self, texts: list[str]) -> list[tuple[Any, ...]]:
        return [tuple(self._split(text)) for text in texts]


def _ngrams(tokens: Tokens, n: int) -> list[tuple[Any, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(texts: list[tuple[Any, ...]], n: int) -> float | None:
    grams = [gram for tokens in texts for gram in _ngrams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(texts: list[tuple[Any, ...]], n: int) -> float | None:
    per_text = [1 - len(set(grams)) / len(grams) for tokens in texts if (grams := _ngrams(tokens, n))]
    return math.fsum(per_text) / len(per_text) if per_text else None


def self_bleu(texts: list[tuple[Any, ...]], n: int) -> float:
    """Mean BLEU-n of each text against all others. torchmetrics' ``bleu_score`` gives the same, but goes through all
    references anew for each text (15 s for 200 texts of 50 words, growing with more than the square). Here the highest
    count of an n-gram in any *other* text comes from its two highest counts overall: linear in the number of tokens."""
    counts = [Counter(gram for k in range(1, n + 1) for gram in _ngrams(tokens, k)) for tokens in texts]
    top: dict[Any, tuple[int, int, int]] = {}  # n-gram: highest count, the text it is in, second highest count
    for index, counter in enumerate(counts):
        for gram, count in counter.items():
            best, holder, second = top.get(gram, (0, -1, 0))
            top[gram] = (count, index, best) if count > best else (best, holder, max(second, count))
    lengths = Counter(map(len, texts))
    scores = []
    for index, (tokens, counter) in enumerate(zip(texts, counts, strict=True)):
        matches, totals = [0] * n, [0] * n
        for gram, count in counter.items():
            best, holder, second = top[gram]
            matches[len(gram) - 1] += min(count, second if holder == index else best)
            totals[len(gram) - 1] += count
        if not all(matches):
            scores.append(0.0)
            continue
        # BLEU's reference length is that of the closest reference, the shorter one of two as close.
        others = [length for length, number in lengths.items() if number > (length == len(tokens))]
        closest = min(others, key=lambda length: (abs(length - len(tokens)), length))
        precision = math.fsum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / n
        scores.append(math.exp(precision + min(0.0, 1 - closest / len(tokens))))
    return math.fsum(scores) / len(scores)


class _TextMetric(_TidyMetric):
    """A metric of one set of texts. Subclasses set ``description`` and ``citation`` and define ``_compute``."""

    description = ""
    citation = ""
    columns: tuple[str, ...] = ("predictions",)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description="\n        predictions: generated texts, a list of str.\n",
            features=Features({column: Value("string") for column in self.columns}),
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **columns: Any) -> dict[str, Any] | None:
        """Compute the metric over these texts and all that were added before, then forget them. ``references`` are not
        looked at: ``evaluate.combine`` gives them to each of its metrics."""
        try:
            if predictions is not None or any(value is not None for value in columns.values()):
                self.add_batch(predictions=predictions, **columns)
            elif self.writer is None:
                raise ValueError("predictions are missing: give them, or add them before compute().")
        except BaseException:
            self._discard()
            raise
        return super().compute()

    def add_batch(self, *, predictions: Any = None) -> None:
        """Add texts."""
        super().add_batch(predictions=check_texts("predictions", predictions))

    def add(self, *, prediction: Any = None) -> None:
        """Add one text."""
        self.add_batch(predictions=[prediction])


class _NGramMetric(_TextMetric, ABC):
    def __init__(self, tokenizer: NGramTokenizer = None, **kwargs: Any) -> None:
        self.tokenizer = NGrams(tokenizer)
        super().__init__(**kwargs)

    def _compute(self, predictions: list[str]) -> dict[str, Any]:
        texts = self.tokenizer(list(predictions))
        counts = {"num_texts": len(texts), "num_tokens": sum(map(len, texts))}
        return self._measure(texts) | counts | {"tokenizer": self.tokenizer.name}

    @abstractmethod
    def _measure(self, texts: list[tuple[Any, ...]]) -> dict[str, Any]:
        """The metric's figures of texts, each a sequence of tokens."""


def _check_order(n: Any) -> int:
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n={n!r} must be an integer of at least 1, the length of the n-grams.")
    return n


class DistinctN(_NGramMetric):
    """Share of n-grams that are distinct, over the whole set of texts (arXiv 1510.03055); higher is more diverse.

    Distinct n-grams divided by all n-grams; no n-gram reaches over two texts. The share falls as texts are added, so
    compare equal numbers of tokens. The result holds ``distinct_<n>`` for each n (None where no text has n tokens),
    ``num_texts``, ``num_tokens`` and ``tokenizer``.

    Args:
        n: the lengths of n-grams.
        tokenizer: splits a text. None is whitespace; a tokenizer of transformers or tokenizers, or a function.
        **kwargs: of ``evaluate.Metric``, such as ``cache_dir`` and ``keep_in_memory``.

    Raises ValueError for no texts, for what is not a text, and n below 1.
    """

    description = "Distinct n-grams over all n-grams of a set of texts."
    citation = "Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models, 2016. 1510.03055"

    def __init__(self, n: Sequence[int] = (1, 2, 3, 4), *, tokenizer: NGramTokenizer = None, **kwargs: Any) -> None:
        self.n = tuple(_check_order(order) for order in (n if isinstance(n, Sequence) else (n,)))
        if not self.n:
            raise ValueError("n is empty; give the lengths of n-grams, such as (1, 2, 3, 4).")
        super().__init__(tokenizer, **kwargs)

    def _measure(self, texts: list[tuple[Any, ...]]) -> dict[str, Any]:
        return {f"distinct_{n}": distinct(texts, n) for n in self.n}


class Repetition(_NGramMetric):
    """Share of repeated n-grams inside a text, mean over texts: seq-rep-n of arXiv 1908.04319 (section 6); lower is
    better.

    1 - distinct n-grams of the text / its n-grams; texts of fewer than n tokens have none and are left out. The result
    holds ``repetition`` (None where every text is too short), ``repetition_n``, ``num_scored``, ``num_texts``,
    ``num_tokens`` and ``tokenizer``. Arguments and errors as for ``DistinctN``; the usual n is 4 (seq-rep-4).
    """

    description = "Share of n-grams that occurred before in the same text."
    citation = "Welleck et al., Neural Text Generation with Unlikelihood Training, 2019. arXiv:1908.04319"

    def __init__(self, n: int = 4, *, tokenizer: NGramTokenizer = None, **kwargs: Any) -> None:
        self.n = _check_order(n)
        super().__init__(tokenizer, **kwargs)

    def _measure(self, texts: list[tuple[Any, ...]]) -> dict[str, Any]:
        scored = sum(len(tokens) >= self.n for tokens in texts)
        return {"repetition": repetition(texts, self.n), "repetition_n": self.n, "num_scored": scored}


class SelfBLEU(_NGramMetric):
    """Mean BLEU-n of each text against all the others (arXiv 1802.01886); lower is more diverse.

    Unsmoothed sentence BLEU with uniform weights: 0 for a text without one shared n-gram of every length. It grows with
    the number of texts, so compare equal numbers. The result holds ``self_bleu``, ``self_bleu_n``, ``num_texts``,
    ``num_tokens`` and ``tokenizer``. Arguments and errors as for ``DistinctN``, and ValueError for a single text.
    """

    description = "Mean BLEU of each text with all other texts as its references."
    citation = "Zhu et al., Texygen: A Benchmarking Platform for Text Generation Models, 2018. arXiv:1802.01886"

    def __init__(self, n: int = 4, *, tokenizer: NGramTokenizer = None, **kwargs: Any) -> None:
        self.n = _check_order(n)
        super().__init__(tokenizer, **kwargs)

    def _measure(self, texts: list[tuple[Any, ...]]) -> dict[str, Any]:
        if len(texts) < 2:
            raise ValueError("self-BLEU compares texts with each other; 1 prediction is too few, give 2 or more.")
        return {"self_bleu": self_bleu(texts, self.n), "self_bleu_n": self.n}
