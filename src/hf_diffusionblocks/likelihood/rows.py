"""Rows of tokens on their way through a language model: batches, targets, and each block's denoiser on them."""

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..batches import fetch
from ..families.causal_lm import BlockedForCausalLM
from ..losses import CHUNK_ELEMENTS, Pairs, linear_cross_entropy, linear_logits
from ..objectives.next_token import IGNORED, next_tokens
from .bound import Errors


def batches(dataset: Any, batch_size: int, max_rows: int | None, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The rows in order, a batch at a time.

    Raises:
        ValueError: for sizes that are none, or a data set without rows or without ``input_ids``.
    """
    for name, value in (("batch_size", batch_size), ("max_rows", max_rows)):
        if isinstance(value, bool) or not (isinstance(value, int) and value >= 1 or (value is None and name[0] == "m")):
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    count = len(dataset) if max_rows is None else min(len(dataset), max_rows)
    if count == 0:
        raise ValueError("the data set has no rows: at least one is needed.")
    for start in range(0, count, batch_size):
        batch = fetch(dataset, list(range(start, min(start + batch_size, count))))
        if "input_ids" not in batch:
            raise ValueError(f"a batch holds {sorted(batch)}; 'input_ids' are needed. Load it with load_text_dataset.")
        yield {name: torch.as_tensor(value).to(device) for name, value in batch.items()}


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without gradients and dropout; the model's mode is put back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class Targets:
    """What each position of a batch predicts, and each block's denoiser of it.

    Attributes:
        labels: the next token, -100 where there is none.
        kept: where there is one.
        counts: how many there are in each row, [rows].
        embedded: e_y, 0 where there is none.
    """

    def __init__(self, model: BlockedForCausalLM, batch: dict[str, Tensor]):
        model.check_batch(batch)
        self.model, self.ids = model, batch["input_ids"]
        self.labels: Int[Tensor, "rows tokens"] = next_tokens(batch)
        self.kept: Bool[Tensor, "rows tokens"] = self.labels != IGNORED
        self.counts: Tensor = self.kept.sum(1)
        self.table = model.target_table()
        self.embedded: Float[Tensor, "rows tokens width"] = self.table[self.labels.clamp_min(0)] * self.kept[..., None]
        self.places = _places(batch)

    def walk(self) -> "Iterator[tuple[int, OneStream | TwoStreams]]":
        """Each block and the errors of its own D; a block is done with when the next one is asked for."""
        model = self.model
        hidden = model.embed_tokens(self.ids)
        for block in range(model.partition.num_blocks):
            denoiser: OneStream | TwoStreams
            if model.config.two_stream:
                denoiser = TwoStreams(self, hidden, block)
            else:
                denoiser = OneStream.of_block(self, hidden, block)
            yield block, denoiser
            if model.config.context == "cascade":
                hidden = denoiser.output

    @cached_property
    def language_features(self) -> Float[Tensor, "rows tokens width"]:
        """What the next token's logits are made of, see ``BlockedForCausalLM.language_hidden``."""
        return self.model.language_hidden(self.model.embed_tokens(self.ids), None, None, **self.places)

    def next_token_losses(self) -> Float[Tensor, "rows tokens"]:
        """``-log softmax(f)`` of each next token, float64; 0 where there is none."""
        pairs = [(self.language_features[self.kept], self.model.language_head())]
        return _spread(linear_cross_entropy(pairs, self.labels[self.kept]).double(), self.kept)

    def language_model(self) -> "OneStream":
        """The errors of the next token's f, the same at every noise level."""
        return OneStream(self, self.language_features, self.model.language_blocks()[-1])

    def reference(self) -> Errors:
        """The errors of the exact form with one fixed f: the next token's at sigma_max, whatever the readout."""
        f = self.language_features, self.model.language_head()
        return lambda z, sigma: self.errors([f, (z / sigma[..., None] ** 2, self.table)])

    def errors(self, pairs: Pairs) -> tuple[Float[Tensor, "rows tokens"], Float[Tensor, "rows tokens"]]:
        """``||e_y - D||^2`` and ``-log p(y)`` of logits given as pairs; 0 where there is no target."""
        pairs = [(x[self.kept], weight) for x, weight in pairs]
        squared, losses = posterior_errors(pairs, self.labels[self.kept], self.table)
        return _spread(squared, self.kept), _spread(losses, self.kept)


class OneStream:
    """A denoiser whose features are those of the clean stream: they do not depend on z and sigma."""

    def __init__(self, targets: Targets, features: Tensor, block: int):
        self.targets, self.features, self.block = targets, features, block
        self.output: Tensor | None = None

    @classmethod
    def of_block(cls, targets: "Targets", hidden: Tensor, block: int) -> "OneStream":
        """A block's own, with its output before the norm."""
        output = targets.model.clean_block(hidden, block, **targets.places)
        denoiser = cls(targets, targets.model.block(block).norm(output), block)
        denoiser.output = output
        return denoiser

    def alone(self) -> Float[Tensor, "rows tokens"]:
        """``-log softmax(f)``: the cross-entropy where z tells nothing."""
        return self.targets.errors([(self.features, self.targets.model.head_weight(self.block))])[1]

    def __call__(self, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        targets = self.targets
        return targets.errors(targets.model.readout(self.features, z, sigma, self.block, targets.table))


class TwoStreams:
    """A denoiser that reads z and sigma: a pass through both streams for each draw."""

    def __init__(self, targets: Targets, hidden: Tensor, block: int):
        self.targets, self.hidden, self.block = targets, hidden, block
        self.output: Tensor | None = None  # of the clean stream; any draw gives it

    def __call__(self, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        targets, model = self.targets, self.targets.model
        self.output, features = model.two_streams(self.hidden, z, sigma, self.block, **targets.places)
        return targets.errors(model.readout(features, z, sigma, self.block, targets.table))


BlockErrors = OneStream | TwoStreams


def posterior_errors(
    pairs: Pairs,
    labels: Int[Tensor, "targets"],
    table: Float[Tensor, "classes dimensions"],
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Float[Tensor, "targets"], Float[Tensor, "targets"]]:
    """``||e_y - sum_k p_k e_k||^2`` and ``-log p_y``, ``p = softmax(sum_i x_i W_i^T)``, in chunks of tokens.

    Args:
        pairs: features [tokens, width] and weights [vocab, width].
        labels: y.
        table: e_k.
        chunk_elements: largest number of logits to hold at a time.

    Returns:
        Both float32.
    """
    size = max(1, chunk_elements // len(table))
    squared, losses = [labels.new_zeros(0, dtype=torch.float32)], [labels.new_zeros(0, dtype=torch.float32)]
    for start in range(0, len(labels), size):
        rows = slice(start, start + size)
        log_p = linear_logits([(x[rows], weight) for x, weight in pairs]).float().log_softmax(-1)
        losses.append(-log_p.gather(-1, labels[rows, None])[:, 0])
        squared.append((table[labels[rows]] - log_p.exp_() @ table).square().sum(-1))
    return torch.cat(squared), torch.cat(losses)


def next_token_losses(
    model: PreTrainedModel, batch: dict[str, Tensor], labels: Int[Tensor, "rows tokens"]
) -> Float[Tensor, "rows tokens"]:
    """``-log softmax(f)`` of each next token, float64; 0 where there is none.

    f is that of ``BlockedForCausalLM.forward``, or any transformers model's logits.
    """
    if isinstance(model, BlockedForCausalLM):
        return Targets(model, batch).next_token_losses()
    kept = labels != IGNORED
    places = {k: batch[k] for k in ("position_ids", "attention_mask") if k in batch}
    logits, wanted = model(input_ids=batch["input_ids"], use_cache=False, **places).logits[kept], labels[kept]
    size = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    losses = [logits.new_zeros(0, dtype=torch.float32)]
    for start in range(0, len(wanted), size):
        rows = slice(start, start + size)
        losses.append(torch.nn.functional.cross_entropy(logits[rows].float(), wanted[rows], reduction="none"))
    return _spread(torch.cat(losses).double(), kept)


def _spread(values: Float[Tensor, "targets"], kept: Bool[Tensor, "rows tokens"]) -> Float[Tensor, "rows tokens"]:
    """Each target's value in its place, 0 elsewhere."""
    return values.new_zeros(kept.shape).masked_scatter(kept, values)


def _places(batch: dict[str, Tensor]) -> dict[str, Any]:
    positions = batch.get("position_ids")
    if positions is None:
        ids = batch["input_ids"]
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return {"position_ids": positions, "attention_mask": batch.get("attention_mask")}
