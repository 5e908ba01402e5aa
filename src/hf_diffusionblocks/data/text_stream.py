"""Rows of a text too large for memory, read in order."""

import hashlib
import itertools
import json
import numbers
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from .indexing import row_index
from .text_rows import Encode, TooShortError, check_ids, check_packing, check_sizes, row_batch, token_dtype
from .tokenizing import tokenizer_fingerprint, tokenizer_size

STREAM_WINDOW = 1024  # rows that are read at a time, unless a shuffle buffer says otherwise


class StreamingTextDataset(Dataset):
    """Rows of a text too large for memory, read in order: ``ds[[n, n + 1]]`` with n that grows from call to call.

    Rows are read in windows, and the last two windows are held. An earlier row cannot be read again, save that row 0
    starts the text anew. The rows are those that ``TextDataset`` would hold, in its order unless shuffled.

    Args:
        documents: a ``datasets.IterableDataset`` with a column ``text``.
        tokenizer: see ``load_text_dataset``.
        block_length: T, tokens per row.
        packing: see ``load_text_dataset``.
        max_samples: length of the data set in rows; without it, it has none.
        shuffle_buffer: size of the window, in rows, within which rows are shuffled: an order that depends on seed and
            position alone. 0 does not shuffle.
        seed: of the shuffling.

    Raises:
        ValueError: if there is not one row, a setting is out of range, or (from indexing) an earlier row is asked for.
        IndexError: from indexing, beyond the end of the text or ``max_samples``.
    """

    in_order = True  # the trainer reads from the beginning to the end, and makes a copy for each block

    def __init__(
        self,
        documents: Any,
        tokenizer: PreTrainedTokenizerBase,
        block_length: int,
        *,
        packing: str = "concatenate",
        max_samples: int | None = None,
        shuffle_buffer: int = 0,
        seed: int = 0,
    ) -> None:
        check_sizes(block_length, max_samples)
        check_packing(packing)
        if shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer={shuffle_buffer} must not be negative; 0 does not shuffle.")
        self.block_length, self.packing, self.max_samples = block_length, packing, max_samples
        self.shuffle_buffer, self.seed = shuffle_buffer, seed
        self.tokenizer_size = tokenizer_size(tokenizer)
        self._window = shuffle_buffer or STREAM_WINDOW
        self._separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._documents = documents.map(
            Encode(tokenizer),
            batched=True,
            with_indices=True,
            batch_size=16,
            remove_columns=["text"],
        )
        self._beginning = {"window": 0, "tokens": [], "starts": [], "documents": self._documents.state_dict()}
        self._seek(self._beginning)
        if not self._advance():
            raise TooShortError(self._left, block_length)
        head = [tokenizer_fingerprint(tokenizer), block_length, packing, shuffle_buffer, seed, max_samples]
        digest = hashlib.sha256(json.dumps(head).encode())
        for array in self._held[0][1:]:
            digest.update(np.ascontiguousarray(array))  # type: ignore[arg-type]  # it has a buffer
        self.fingerprint = digest.hexdigest()[:16]
        """First 16 hex digits of a SHA-256 of the settings and the first window of rows."""

    def __len__(self) -> int:
        if self.max_samples is None:
            # TypeError, as for every object without a length: list() and tqdm() ask and go on without.
            raise TypeError("a stream of text has no length: give max_samples=, the number of rows to train on.")
        return self.max_samples

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        if isinstance(index, numbers.Integral):
            return {name: value[0] for name, value in self[[index]].items()}
        if isinstance(index, slice):
            length = index.stop if self.max_samples is None and index.stop is not None else len(self)
            index = range(length)[index]
        else:
            index = row_index(index).tolist()
        rows = [self._row(i) for i in index]
        tokens = np.stack([row for row, _ in rows]) if rows else np.empty((0, self.block_length), np.int64)
        starts = np.stack([row for _, row in rows]) if rows else np.empty((0, self.block_length), bool)
        return row_batch(tokens, starts if self.packing == "documents" else None)

    def rows(self, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Rows from position ``start`` on, one at a time, to the end of the text or ``max_samples``."""
        if start // self._window < min(self._held, default=self._state["window"]):
            self._seek(self._beginning)
        for position in itertools.count(start):
            try:
                row = self[position]
            except IndexError:
                return
            yield row

    __iter__ = rows

    def state_dict(self) -> dict[str, Any]:
        """Where the reading is, as JSON values. After ``load_state_dict``, the rows held now can be read at once:
        without it, the text before a position is tokenised again to find it."""
        state = self._current_state()
        return {
            "fingerprint": self.fingerprint,
            "window": state["window"],
            "tokens": [int(i) for i in state["tokens"]],
            "starts": [bool(i) for i in state["starts"]],
            "documents": state["documents"],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where ``state_dict`` was taken.

        Raises:
            ValueError: if it is another data set's.
        """
        if state.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"the state is of another stream ({state.get('fingerprint')}, here {self.fingerprint}): source, "
                "tokenizer and settings must be the same."
            )
        self._seek({name: value for name, value in state.items() if name != "fingerprint"})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": self._current_state(), "_held": {}, "_iterator": None}

    def _current_state(self) -> dict[str, Any]:
        return self._held[min(self._held)][0] if self._held else self._state

    def _seek(self, state: dict[str, Any]) -> None:
        self._state: dict[str, Any] = state
        self._held: dict[int, tuple[dict, np.ndarray, np.ndarray]] = {}
        self._iterator: Iterator | None = None
        self._left = 0

    def _advance(self) -> bool:
        """Read the next window; False if there is none."""
        if self._iterator is None:
            self._iterator = self._windows(self._state)
        found = next(self._iterator, None)
        if found is not None:
            last = found[0]["window"]
            self._held = {w: held for w, held in self._held.items() if w == last - 1} | {last: found}
        return found is not None

    def _row(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        window, row = divmod(position, self._window)
        if position < 0 or position >= (self.max_samples or position + 1):
            raise IndexError(f"row {position} is not in [0, {self.max_samples or 'end of the text'}).")
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:  # `datasets` would give each of them a part of the text
            raise ValueError(f"a stream of text is read in order, not by {worker.num_workers} workers: give 0 or 1.")
        first = min(self._held, default=self._state["window"])
        if window < first and position == 0:
            self._seek(self._beginning)
        elif window < first:
            raise ValueError(
                f"row {position} of a stream has been passed: rows from {first * self._window} on are held. Ask for "
                "rows in growing order (row 0 starts anew), or load without streaming=True."
            )
        while window > max(self._held, default=-1) and self._advance():
            pass
        if window not in self._held or row >= len(self._held[window][1]):
            raise IndexError(f"row {position} is beyond the end of the text: give a smaller max_samples=.")
        return self._held[window][1][row], self._held[window][2][row]

    def _windows(self, state: dict[str, Any]) -> Iterator[tuple[dict, np.ndarray, np.ndarray]]:
        """The state before each window, and its tokens and document starts [rows, T]."""
        dtype, length = token_dtype(self.tokenizer_size), self.block_length
        self._documents.load_state_dict(state["documents"])
        documents = iter(self._documents)
        while True:
            tokens: list[np.ndarray] = [np.asarray(state["tokens"], dtype)]
            starts: list[np.ndarray] = [np.asarray(state["starts"], bool)]
            count = len(tokens[0])
            while count < self._window * length and (document := next(documents, None)) is not None:
                separator = self._separator if state["window"] or count else []
                ids = np.asarray([*separator, *document["input_ids"]])
                check_ids(ids, self.tokenizer_size)
                tokens.append(ids.astype(dtype))
                starts.append(np.arange(len(ids)) == len(separator))
                count += len(ids)
            # A long document lasts for many windows: what is left of it is not copied for each of them.
            flat, begins = (a[0] if len(a) == 1 else np.concatenate(a) for a in (tokens, starts))
            rows = min(count // length, self._window)
            kept = rows * length
            if rows == 0:
                self._left = count
                return
            order = np.arange(rows)
            if self.shuffle_buffer:
                order = np.random.default_rng([self.seed, state["window"]]).permutation(rows)
            yield state, flat[:kept].reshape(rows, length)[order], begins[:kept].reshape(rows, length)[order]
            state = {
                "window": state["window"] + 1,
                "tokens": flat[kept:],
                "starts": begins[kept:],
                "documents": self._documents.state_dict(),
            }
