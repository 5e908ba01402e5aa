"""Generative perplexity: what a judge, a causal language model, makes of generated texts.

It is low for "the the the", so it always comes with figures of diversity.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from .image import _TidyMetric
from .text import (
    NGrams,
    NGramTokenizer,
    _TextMetric,
    check_ids,
    check_length,
    check_texts,
    distinct,
    load_model,
    pad_right,
    repetition,
)


class GenerativePerplexity(_TextMetric):
    """Perplexity of generated texts under a judge, a causal language model; never without diversity beside it.

    ``compute(predictions=texts, prompts=None)``. With prompts, prompt + text is tokenised as one string (the space
    between them belongs to one of the two), and the tokens that differ from the prompt's own are scored. Without, a
    text follows the tokenizer's beginning-of-text token; where it has none, a text's first token is not scored.

    The result holds ``generative_perplexity_<judge>`` = exp(``nll_per_token``), that key as ``name``; ``nll_per_token``
    in nats, the mean over all scored tokens; ``num_tokens`` (scored) and ``num_texts``; ``distinct_1`` to
    ``distinct_4`` and ``repetition`` (n = 4) of the texts without prompts, as ``DistinctN`` and ``Repetition`` define
    them; ``judge`` and ``ngram_tokenizer``. Sequences longer than a window are scored in overlapping windows: each
    token once, with at least ``max_length`` - ``stride`` tokens (or all there are) before it.

    Args:
        judge: a model that maps ``input_ids`` and ``attention_mask`` [B, T] to ``logits`` [B, T, V], or its name.
        tokenizer: the judge's; may be left out when ``judge`` is a name.
        name: of the judge in the result; by default the last part of the name it was loaded by.
        batch_size: windows per forward pass; logits take batch_size * max_length * V floats.
        max_length: tokens in a window; by default what the judge takes, at most 1024.
        stride: tokens by which a window moves on; by default half of max_length.
        ngram_tokenizer: splits the texts for the diversity figures; None is whitespace.
        **kwargs: of ``evaluate.Metric``.

    Raises:
        ValueError: for no texts, what is not a text, an empty text or one with no token to score, prompts in another
            number than predictions, a tokenizer that does not fit the judge, likelihoods of NaN or 0, and bad settings.
    """

    description = "exp of the mean negative log-likelihood of generated tokens under a judge, with diversity figures."
    columns = ("predictions", "prompts")

    def __init__(
        self,
        judge: nn.Module | str,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        *,
        name: str | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        stride: int | None = None,
        ngram_tokenizer: NGramTokenizer = None,
        **kwargs: Any,
    ) -> None:
        self.judge, self.tokenizer, self.judge_name = load_model(judge, tokenizer, name, AutoModelForCausalLM)
        self.max_length = check_length("max_length", max_length, self.judge, self.tokenizer)
        self.stride = self.max_length // 2 if stride is None else stride
        if batch_size < 1 or not 1 <= self.stride < self.max_length:
            raise ValueError(
                f"batch_size={batch_size} must be at least 1, stride={self.stride} lie between 1 and "
                f"max_length - 1 = {self.max_length - 1}."
            )
        self.batch_size = batch_size
        self.ngram_tokenizer = NGrams(ngram_tokenizer)
        super().__init__(**kwargs)

    def compute(  # type: ignore[override]  # prompts are its only further column
        self, *, predictions: Any = None, references: Any = None, prompts: Any = None
    ) -> dict[str, Any] | None:
        """Judge these texts and all that were added before, then forget them. ``references`` are not looked at."""
        return super().compute(predictions=predictions, prompts=prompts)

    def add_batch(self, *, predictions: Any = None, prompts: Any = None) -> None:
        """Add texts and, if they continue prompts, as many prompts."""
        predictions = check_texts("predictions", predictions, empty=False)
        prompts = [""] * len(predictions) if prompts is None else check_texts("prompts", prompts)
        if len(prompts) != len(predictions):
            raise ValueError(f"{len(predictions)} predictions have {len(prompts)} prompts; give one for each, or none.")
        _TidyMetric.add_batch(self, predictions=predictions, prompts=prompts)

    def add(self, *, prediction: Any = None, prompt: Any = None) -> None:
        """Add one text and, if it continues one, its prompt."""
        self.add_batch(predictions=[prediction], prompts=None if prompt is None else [prompt])

    def _compute(self, predictions: list[str], prompts: list[str]) -> dict[str, Any]:
        sequences = self._sequences(list(predictions), list(prompts))
        tokens = sum(len(ids) - start for ids, start in sequences)
        windows = [(len(w), w, first) for ids, start in sequences for w, first in self._windows(ids, start)]
        nll = self._nll(sorted(windows)) / tokens
        texts = self.ngram_tokenizer(list(predictions))
        key = f"generative_perplexity_{self.judge_name}"
        return {
            key: math.exp(nll) if nll < 700 else math.inf,
            "name": key,
            "nll_per_token": nll,
            "num_tokens": tokens,
            "num_texts": len(texts),
            **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3, 4)},
            "repetition": repetition(texts, 4),
            "judge": self.judge_name,
            "ngram_tokenizer": self.ngram_tokenizer.name,
        }

    def _sequences(self, texts: list[str], prompts: list[str]) -> list[tuple[list[int], int]]:
        """For each text, the ids of all it is judged by, and the index of the first that is scored (at least 1)."""
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        strings = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        ids = self.tokenizer(strings + prompts, add_special_tokens=False, verbose=False)["input_ids"]
        wholes, sequences = ids[: len(texts)], []
        for index, (whole, prompt) in enumerate(zip(wholes, ids[len(texts) :], strict=True)):
            # Whole and prompt may part before the prompt's end, where its last letters join the text's first ones.
            parted = (i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b)
            start = max(1, len(bos) + next(parted, min(len(whole), len(prompt))))
            if len(bos) + len(whole) <= start:
                raise ValueError(
                    f"predictions[{index}]={texts[index][:40]!r} leaves {self.judge_name} no token to score (a text of "
                    "one token has none if the tokenizer has no beginning-of-text token). Drop and count such texts."
                )
            sequences.append((bos + whole, start))
        check_ids(wholes + [bos], self.judge)
        return sequences

    def _windows(self, ids: list[int], start: int) -> Iterator[tuple[list[int], int]]:
        """Overlapping windows of ``ids``, each with its first index not scored before."""
        for begin in range(0, len(ids), self.stride):
            end = min(begin + self.max_length, len(ids))
            if end > start:
                yield ids[begin:end], start - begin
                start = end

    @torch.no_grad()
    def _nll(self, windows: list[tuple[int, list[int], int]]) -> float:
        """Summed over all scored tokens, in nats. Windows of like length share a batch."""
        self.judge.eval()
        sums = []
        for first in range(0, len(windows), self.batch_size):
            batch = windows[first : first + self.batch_size]
            inputs = pad_right([ids for _, ids, _ in batch], self.tokenizer, self.judge)
            logits = self.judge(**inputs).logits
            for row, (length, _, start) in enumerate(batch):
                scored = logits[row, start - 1 : length - 1].float()  # the logits at i - 1 are about token i
                targets = inputs["input_ids"][row, start:length]
                sums.append(nn.functional.cross_entropy(scored, targets, reduction="none").double().sum().item())
        if not math.isfinite(total := math.fsum(sums)):
            raise ValueError(
                f"the sum of negative log-likelihoods is {total}: {self.judge_name} gives NaN, or no probability at "
                "all to a token of these texts. Check its weights, its dtype and its tokenizer."
            )
        return total
