"""Text as rows of token ids: every source, tokenised through ``datasets`` with its cache, packed into equal rows.

A *document* is one text: a file, or a row of a data set. ``load_documents`` gives the documents of a split,
``load_text_dataset`` tokenises and packs them. In memory that is a ``TextDataset``, indexed as Hugging Face
``datasets`` are; what does not fit is read in order through a ``StreamingTextDataset``.

Packing, with an end-of-text token e between documents (where the tokenizer has one) and rows of 4 tokens::

    documents       [a b c] [d e f g h]
    rows            a b c e | d e f g | (h is dropped)
    position_ids    0 1 2 3 | 0 1 2 3 |     with packing="documents" only
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .text_rows import Encode, TextDataset, TooShortError, check_ids, check_packing, check_sizes, token_dtype
from .text_sources import load_documents
from .text_stream import StreamingTextDataset
from .tokenizing import tokenizer_fingerprint, tokenizer_size

__all__ = ["StreamingTextDataset", "TextDataset", "load_documents", "load_text_dataset"]


def load_text_dataset(
    name: Any = "pydoc",
    split: str = "train",
    *,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    data_files: Any = None,
    text_column: str = "text",
    packing: str = "concatenate",
    test_fraction: float = 0.05,
    max_samples: int | None = None,
    streaming: bool = False,
    shuffle_buffer: int = 0,
    seed: int = 0,
    config_name: str | None = None,
    num_proc: int | None = None,
    disable_progress: bool = False,
    **load_dataset_kwargs: Any,
) -> "TextDataset | StreamingTextDataset":
    """Load text as rows of ``block_length`` tokens. Tokens of the last row, if it is not full, are dropped.

    Args:
        name: of the source, see ``load_documents``.
        split: of the source.
        tokenizer: gives the ids; its special tokens are not added, but its end-of-text token (``eos_token``), if it
            has one, stands between documents and counts to the one before.
        block_length: T, tokens per row, at least 2.
        data_files: as in ``datasets.load_dataset``.
        text_column: column of the text.
        packing: ``"concatenate"``, one long text cut into rows; or ``"documents"``, the same rows with
            ``position_ids`` that restart with every document, so that a model attends within documents only. A
            document that does not end with its row goes on in the next, as a document of its own.
        test_fraction: part held out where the source has no test split, see ``load_documents``.
        max_samples: keep the first so many rows.
        streaming: read on demand, in order, instead of into memory.
        shuffle_buffer: rows of a stream that are shuffled among themselves, see ``StreamingTextDataset``.
        seed: of that shuffling.
        config_name: configuration of a data set on the Hub.
        num_proc: processes that tokenise.
        disable_progress: no progress bar.
        **load_dataset_kwargs: for ``datasets.load_dataset``, such as ``revision``, ``token``.

    Tokenised text is kept in the cache of ``datasets``, by the fingerprints of text and tokenizer: another
    ``block_length`` or ``packing`` does not tokenise again.

    Raises:
        ValueError: for anything that cannot be loaded, or if there are fewer tokens than one row has.
    """
    check_sizes(block_length, max_samples)
    check_packing(packing)
    with _progress(not disable_progress):
        documents = load_documents(
            name,
            split,
            data_files=data_files,
            text_column=text_column,
            test_fraction=test_fraction,
            streaming=streaming,
            config_name=config_name,
            **load_dataset_kwargs,
        )
    if streaming:
        return StreamingTextDataset(
            documents,
            tokenizer,
            block_length,
            packing=packing,
            max_samples=max_samples,
            shuffle_buffer=shuffle_buffer,
            seed=seed,
        )
    if shuffle_buffer:
        raise ValueError(f"shuffle_buffer={shuffle_buffer} is for streaming=True; in memory any order can be read.")
    with _progress(not disable_progress):
        encoded = _tokenise(documents, tokenizer, num_proc)
    return _rows(encoded, tokenizer, block_length, max_samples, packing)


def _rows(
    encoded: Any, tokenizer: PreTrainedTokenizerBase, block_length: int, max_samples: int | None, packing: str
) -> TextDataset:
    """Tokenised documents, one after the other, cut into rows."""
    size = tokenizer_size(tokenizer)
    flat, starts, characters = _join(encoded, tokenizer.eos_token_id, size)
    rows = min(len(flat) // block_length, max_samples or len(flat))
    if rows == 0:
        raise TooShortError(len(flat), block_length)
    kept = rows * block_length
    # Within the document that is cut, characters are taken to be spread evenly over tokens.
    num_characters = round(float(np.interp(kept, *characters)))
    begins: np.ndarray = np.zeros(kept, bool)
    begins[starts[starts < kept]] = True
    return TextDataset(
        flat[:kept].reshape(rows, block_length),
        tokenizer_size=size,
        num_characters=num_characters,
        starts=begins.reshape(rows, block_length) if packing == "documents" else None,
    )


def _tokenise(documents: Any, tokenizer: PreTrainedTokenizerBase, num_proc: int | None) -> Any:
    """``datasets.Dataset`` of ``input_ids`` and ``characters`` per document, from the cache if it is there."""
    import datasets

    key = json.dumps([1, documents._fingerprint, tokenizer_fingerprint(tokenizer)])
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE, "hf_diffusionblocks")
    folder.mkdir(parents=True, exist_ok=True)
    return documents.map(
        Encode(tokenizer),
        batched=True,
        with_indices=True,
        batch_size=256,
        writer_batch_size=256,
        remove_columns=documents.column_names,
        features=datasets.Features(
            {"input_ids": datasets.List(datasets.Value("int32")), "characters": datasets.Value("int64")}
        ),
        num_proc=num_proc,
        cache_file_name=str(folder / f"tokens-{digest}.arrow"),
        new_fingerprint=digest,
        desc="tokenising",
    )


def _join(
    encoded: Any, separator: int | None, size: int
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """All documents in one array [tokens], where each starts, and (tokens, characters) up to the end of each."""
    import pyarrow.compute as pc

    ids: list[np.ndarray] = [np.empty(0, token_dtype(size))]
    lengths: list[int] = []
    characters = [0]
    for table in encoded.with_format("arrow").iter(1000):
        values = pc.list_flatten(table["input_ids"]).to_numpy()
        check_ids(values, size)
        ids.append(values.astype(token_dtype(size)))
        lengths += pc.list_value_length(table["input_ids"]).to_pylist()
        characters += table["characters"].to_pylist()
    flat, ends = np.concatenate(ids), np.cumsum([0, *lengths])
    if separator is not None:
        flat = np.insert(flat, ends[1:-1], separator)
        ends[1:-1] += np.arange(1, len(ends) - 1)
        ends[-1] = len(flat)
    return flat, ends[:-1], (ends, np.cumsum(characters))


@contextlib.contextmanager
def _progress(show: bool) -> Iterator[None]:
    import datasets

    hide = not show and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()
