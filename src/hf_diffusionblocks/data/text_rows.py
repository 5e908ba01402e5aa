"""Rows of token ids in memory, and what every reader of text shares."""

import hashlib
import json
import numbers
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..suggest import unknown_name
from .indexing import row_index
from .text_sources import row_text

PACKINGS = ("concatenate", "documents")
PIECE_LENGTH = 1 << 17  # characters of a document that are tokenised at a time
_PIECES_LENGTH = 1 << 21  # characters in one call of the tokenizer


class TextDataset(Dataset):
    """Rows of token ids in memory, 2 bytes per token (4 if there are more than 65,536 ids).

    Args:
        tokens: integer ids [n, T].
        tokenizer_size: number of ids, see ``tokenizer_size``.
        num_characters: of the text that the rows hold.
        starts: bool [n, T], where documents begin (``packing="documents"``), or None. Each row begins one in any case.

    Indexing with an int gives ``{"input_ids": int64 [T]}``, with ``"position_ids"`` [T] if ``starts`` are given: they
    count from 0 at the start of each document and each row. With a list, slice, array or tensor of indices the same
    with a leading batch dimension.

    Raises:
        ValueError: if there are no rows, rows are shorter than 2 tokens, or an id is outside the tokenizer.
    """

    def __init__(
        self, tokens: np.ndarray, *, tokenizer_size: int, num_characters: int, starts: np.ndarray | None = None
    ) -> None:
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}: expected integer ids [rows, tokens].")
        check_sizes(tokens.shape[1], None)
        if len(tokens) == 0:
            raise ValueError("there are no rows: at least one is needed.")
        check_ids(tokens, tokenizer_size)
        if starts is not None and starts.shape != tokens.shape:
            raise ValueError(f"starts {list(starts.shape)} do not fit tokens {list(tokens.shape)}.")
        self.tokens: np.ndarray = np.ascontiguousarray(tokens, dtype=token_dtype(tokenizer_size))
        self.starts = None if starts is None else np.packbits(starts, axis=1)
        self.tokenizer_size, self.num_characters = tokenizer_size, int(num_characters)

    @property
    def block_length(self) -> int:
        """T, tokens per row."""
        return self.tokens.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, those between documents included."""
        return self.tokens.size

    @property
    def characters_per_token(self) -> float:
        """A loss in nats per token is ``loss / log(2) / characters_per_token`` bits per character."""
        return self.num_characters / self.num_tokens

    @property
    def packing(self) -> str:
        """How documents were packed."""
        return "concatenate" if self.starts is None else "documents"

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of rows, document starts, and number of ids and characters."""
        head = [str(self.tokens.dtype), self.tokens.shape, self.packing, self.tokenizer_size, self.num_characters]
        digest = hashlib.sha256(json.dumps(head).encode())
        for array in (self.tokens, self.starts):
            if array is not None:
                digest.update(array)  # type: ignore[arg-type]  # it has a buffer
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        if isinstance(index, numbers.Integral):
            return {name: value[0] for name, value in self[[index]].items()}
        index = row_index(index)
        index = index.numpy() if isinstance(index, Tensor) else index
        starts = self.starts
        if starts is not None:
            starts = np.unpackbits(starts[index], axis=1, count=self.block_length).astype(bool)
        return row_batch(self.tokens[index], starts)

    def __repr__(self) -> str:
        per_token = f"{self.characters_per_token:.2f} characters per token"
        return f"TextDataset({len(self)} rows of {self.block_length} tokens, {self.tokenizer_size} ids, {per_token})"


class Encode:
    """Token ids and number of characters of a batch of documents; empty ones are left out.

    Long documents go through the tokenizer in pieces, because what it notes about each token takes some 50 times the
    text's memory. A piece ends between a word and a space, where tokenizers that split by words split in any case.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        texts = [row_text(text, row) for text, row in zip(batch["text"], indices, strict=True)]
        ids: list[list[np.ndarray]] = [[] for _ in texts]
        pieces: list[tuple[int, str]] = []
        for number, text in enumerate(texts):
            for piece in _pieces(text):
                pieces.append((number, piece))
                if sum(len(p) for _, p in pieces) >= _PIECES_LENGTH:
                    self._encode(pieces, ids)
                    pieces = []
        self._encode(pieces, ids)
        kept = [(np.concatenate(i), len(text)) for i, text in zip(ids, texts, strict=True) if any(map(len, i))]
        return {"input_ids": [i for i, _ in kept], "characters": [length for _, length in kept]}

    def _encode(self, pieces: list[tuple[int, str]], ids: list[list[np.ndarray]]) -> None:
        if not pieces:
            return
        # verbose=False: documents may be longer than the positions of the tokenizer's own model.
        encoded = self.tokenizer(
            [piece for _, piece in pieces], add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        for (number, _), piece_ids in zip(pieces, encoded["input_ids"], strict=True):
            ids[number].append(np.asarray(piece_ids, np.int32))


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_LENGTH:
        end = start + PIECE_LENGTH
        cut = text.rfind(" ", start + 1, end)
        while cut > 0 and not text[cut - 1].isalnum():
            cut = text.rfind(" ", start + 1, cut)
        end = cut if cut > 0 else end
        yield text[start:end]
        start = end
    yield text[start:]


def row_batch(tokens: np.ndarray, starts: np.ndarray | None) -> dict[str, Tensor]:
    """``input_ids`` and, from document starts, ``position_ids``."""
    batch = {"input_ids": torch.from_numpy(tokens.astype(np.int64))}
    if starts is not None:
        columns = np.arange(tokens.shape[1])
        batch["position_ids"] = torch.from_numpy(columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1))
    return batch


def token_dtype(size: int) -> type:
    """The smallest of uint16 and int32 that holds every id."""
    return np.uint16 if size <= 1 << 16 else np.int32


def check_sizes(block_length: int, max_samples: int | None) -> None:
    """Raise a ``ValueError`` for a length of rows, or a number of them, out of range."""
    if not isinstance(block_length, numbers.Integral) or block_length < 2:
        raise ValueError(
            f"block_length={block_length!r} must be an integer of at least 2: one token predicts the next."
        )
    if max_samples is not None and (not isinstance(max_samples, numbers.Integral) or max_samples < 1):
        raise ValueError(f"max_samples={max_samples!r} must be a positive integer, or None for all rows.")


def check_packing(packing: str) -> None:
    """Raise a ``ValueError`` for an unknown packing."""
    if packing not in PACKINGS:
        raise ValueError(unknown_name("packing", packing, PACKINGS))


def check_ids(ids: np.ndarray, size: int) -> None:
    """Raise a ``ValueError`` for ids outside the tokenizer."""
    if ids.size and not (0 <= ids.min() and ids.max() < size):
        raise ValueError(
            f"token ids run from {ids.min()} to {ids.max()}, outside the tokenizer's {size} ids, 0 to {size - 1}: "
            "tokenise again with the tokenizer that is given."
        )


class TooShortError(ValueError):
    """A text without one full row.

    Args:
        tokens: that it has.
        block_length: tokens of a row.
    """

    def __init__(self, tokens: int, block_length: int) -> None:
        self.tokens, self.block_length = tokens, block_length
        super().__init__(
            f"the text has {tokens} tokens, fewer than one row of block_length={block_length}: give more text, a "
            "shorter block_length, or (if this is the held-out part) a larger test_fraction."
        )
