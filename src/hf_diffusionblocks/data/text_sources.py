"""Where text comes from: pydoc's topics, text files, everything that ``datasets`` reads; and what of it is held out."""

import glob
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..suggest import unknown_name
from .scripts import script_error
from .text_bytes import check_utf8, read_text

KNOWN_TEXTS = ("pydoc",)
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
_HELD_OUT_SPLITS = ("test", "validation")


def load_documents(
    name: Any = "pydoc",
    split: str = "train",
    *,
    data_files: Any = None,
    text_column: str = "text",
    test_fraction: float = 0.05,
    streaming: bool = False,
    config_name: str | None = None,
    **load_dataset_kwargs: Any,
) -> Any:
    """The documents of a split: a ``datasets.Dataset`` (``IterableDataset`` when streaming) with one column, ``text``.

    Args:
        name: one of

            - ``"pydoc"``: the topics of Python's own documentation, sorted by name, without those that a longer one
              repeats; they are part of every Python, 373,000 characters of version 3.11;
            - a text file, a directory of ``.txt`` files (at any depth), a pattern such as ``"books/*.txt"``, or a list
              of these: UTF-8, one document per file, line ends read as ``"\\n"``;
            - a ``.parquet``, ``.arrow``, ``.json``, ``.jsonl`` or ``.csv`` file, a directory of ``save_to_disk``, a
              data set's id on the Hub, or the name of a builder of ``datasets`` (with ``data_files``; ``"text"`` takes
              each line for a document);
            - a ``datasets`` object.
        split: name of the split. A source with a split ``test`` or ``validation`` is used as it is split; every other
            one (a ``Dataset`` object too) has its ``train`` split parted into ``train`` and ``test``.
        data_files: as in ``datasets.load_dataset``.
        text_column: column of the text.
        test_fraction: part held out then, in [0, 1): of the documents, chosen by a hash of their index; but if there
            are fewer than ``10 / test_fraction`` of them (200), the last part of each one's characters.
        streaming: read on demand.
        config_name: configuration of a data set on the Hub.
        **load_dataset_kwargs: for ``datasets.load_dataset``, such as ``revision``, ``token``.

    Raises:
        ValueError: if there is no such source, split or column, or a file is not UTF-8 (naming the byte).
    """
    import datasets

    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction={test_fraction!r} must lie in [0, 1).")
    loading = {"data_files": data_files, "config_name": config_name, **load_dataset_kwargs}
    loading = {key: value for key, value in loading.items() if value is not None}
    source = _open(name, loading, streaming)
    splits = source if isinstance(source, dict) else {"train": source}
    documents = splits.get(split)
    can_part = "train" in splits and not any(s in splits for s in _HELD_OUT_SPLITS)
    to_part = can_part and split in ("train", "test")
    if to_part:
        documents = splits["train"]
    elif documents is None:
        raise ValueError(unknown_name("split", split, [*splits, "test"] if can_part else splits))
    if not isinstance(documents, (datasets.Dataset, datasets.IterableDataset)):
        raise ValueError(f"a {type(documents).__name__} is no data set: give a name, a path or a datasets object.")
    if isinstance(documents, datasets.IterableDataset) and not streaming:
        raise ValueError("an IterableDataset is read with streaming=True.")
    if isinstance(documents, datasets.Dataset) and not len(documents):
        raise ValueError(f"{_label(name)} has no documents in split {split!r}.")
    documents = _text_only(documents, text_column)
    if isinstance(documents, datasets.Dataset) and streaming:
        documents = documents.to_iterable_dataset()
    return _part(documents, split == "test", test_fraction) if to_part else documents


def row_text(value: Any, row: int) -> str:
    """A cell of the text column; ValueError if it holds no text."""
    if not isinstance(value, str):
        raise ValueError(
            f"row {row} of the split has {value!r} in the text column, not text: name another column with "
            "text_column=, or drop such rows with `dataset.filter(...)` of the datasets library."
        )
    return value


def _label(name: Any) -> str:
    return repr(str(name)) if isinstance(name, (str, os.PathLike)) else f"the {type(name).__name__}"


def _open(name: Any, loading: dict[str, Any], streaming: bool) -> Any:
    """A ``datasets`` object, or a dict of them by split."""
    import datasets

    if isinstance(name, (str, os.PathLike)):
        name = os.path.expanduser(name)
    files = _text_files(name)
    saved = isinstance(name, str) and any(Path(name, f).is_file() for f in ("dataset_dict.json", "state.json"))
    if loading and (files or saved or name in KNOWN_TEXTS or not isinstance(name, str)):
        raise ValueError(
            f"{', '.join(loading)}: no setting for {_label(name)}, which `datasets.load_dataset` does not load."
        )
    if files and streaming:
        return datasets.IterableDataset.from_generator(_each_file, gen_kwargs={"files": files})
    if files:
        return datasets.Dataset.from_dict({"text": [read_text(file) for file in files]})
    if isinstance(name, str) and name == "pydoc":
        return datasets.Dataset.from_dict({"text": _pydoc_topics()})
    return _load(name, loading, streaming, saved) if isinstance(name, str) else name


def _pydoc_topics() -> list[str]:
    """The topics, sorted by name, without those that a longer one repeats.

    ``compound``, for one, is ``if``, ``while``, ``for`` and more, one after the other: 38 % of the topics' text stands
    in another topic too (in pieces of 80 characters), and held-out text would be known from training. Of those kept it
    is 0.1 %.
    """
    from pydoc_data.topics import topics

    kept: list[str] = []
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = {" ".join(paragraph.split()) for paragraph in topics[name].split("\n\n")}
        if 2 * sum(map(len, paragraphs & seen)) < sum(map(len, paragraphs)):
            kept.append(name)
            seen |= paragraphs
    return [topics[name] for name in sorted(kept)]


def _text_files(name: Any) -> list[str]:
    """The text files that a path, a pattern or a list of these names; none if it names something else."""
    if isinstance(name, (list, tuple)):
        if not name:
            raise ValueError("the list of text files is empty: give at least one.")
        files = []
        for part in name:
            found = _text_files(os.path.expanduser(part)) if isinstance(part, (str, os.PathLike)) else []
            if not found:
                raise ValueError(f"{part!r} is no text file on this machine, nor a directory or pattern of such.")
            files += found
        return files
    if not isinstance(name, str) or name in KNOWN_TEXTS or Path(name).suffix in _BUILDERS and Path(name).is_file():
        return []
    if os.path.isdir(name):
        return _directory_texts(Path(name))
    if os.path.isfile(name):
        return [name]
    files = sorted(file for file in glob.glob(name, recursive=True) if os.path.isfile(file))
    if not files and (glob.has_magic(name) or name.endswith(".txt")):
        raise ValueError(f"there is no file {name}: check the path or the pattern.")
    return files


def _directory_texts(directory: Path) -> list[str]:
    """The ``.txt`` files of a directory, at any depth."""
    suffixes = {file.suffix for file in directory.rglob("*") if file.is_file()}
    if ".txt" in suffixes and (others := sorted(suffixes & set(_BUILDERS))):
        raise ValueError(
            f"{directory} holds .txt files and {', '.join(others)} files, and it is not clear which are the text: "
            f"give a pattern such as {str(directory / '*.txt')!r}, or a builder's name with data_files=."
        )
    return sorted(str(file) for file in directory.rglob("*.txt") if file.is_file())


def _each_file(files: list[str]) -> Any:
    for file in files:
        yield {"text": read_text(file)}


def _load(name: str, loading: dict[str, Any], streaming: bool, saved: bool) -> Any:
    import datasets
    import pyarrow

    builder, path = name, Path(name)
    config = loading.pop("config_name", None)
    if builder == "text" and streaming:  # datasets would notice in the middle of a run
        for file in _local(loading.get("data_files")):
            check_utf8(file)
    try:
        if saved:
            return datasets.load_from_disk(name)
        if path.suffix in _BUILDERS and path.is_file():
            builder, loading = _BUILDERS[path.suffix], {**loading, "data_files": name}
        return datasets.load_dataset(builder, config, streaming=streaming, **loading)
    except RuntimeError as error:
        raise script_error(name, error) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        reason = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        files = loading.get("data_files")
        if isinstance(reason, UnicodeDecodeError):  # its position is counted in a part of the file
            for file in _local(files):
                check_utf8(file)
        if files or path.exists():
            raise ValueError(f"{files or name} cannot be read by `datasets`: {reason}") from error
        raise ValueError(
            f"{unknown_name('text data set', name, KNOWN_TEXTS)} It is no path on this machine either, and could not "
            f"be loaded from the Hub: {reason}"
        ) from error


def _local(data_files: Any) -> list[str]:
    """The files on this machine among ``data_files``, without compressed ones."""
    if isinstance(data_files, (str, os.PathLike)):
        files = sorted(glob.glob(os.path.expanduser(data_files), recursive=True))
        return [file for file in files if os.path.isfile(file) and Path(file).suffix not in _COMPRESSED]
    parts = data_files.values() if isinstance(data_files, dict) else data_files or ()
    return [file for part in parts for file in _local(part)]


def _text_only(documents: Any, column: str) -> Any:
    """The data set with one column, ``text``."""
    columns = documents.column_names or list(next(iter(documents), {}))  # a stream may not know its columns
    if column not in columns:
        raise ValueError(f"{unknown_name('text column', column, columns)} Name it with text_column=.")
    documents = documents.with_format(None).select_columns([column])
    return documents if column == "text" else documents.rename_column(column, "text")


def _part(documents: Any, test: bool, fraction: float) -> Any:
    """The training or the held-out part of documents."""
    import datasets

    if fraction == 0:
        if test:
            raise ValueError("test_fraction=0 holds out nothing: there is no split 'test'. Give a larger one.")
        return documents
    many = math.ceil(10 / fraction)  # of fewer, the hash would hold out a handful: too few to stand for the others
    if isinstance(documents, datasets.Dataset):
        if len(documents) >= many:
            return documents.select(np.flatnonzero(_held_out(np.arange(len(documents)), fraction) == test))
        texts = enumerate(documents["text"])
        return datasets.Dataset.from_dict({"text": [_cut(row_text(text, i), test, fraction) for i, text in texts]})
    if sum(1 for _ in documents.take(many)) < many:
        return documents.map(partial(_cut_row, test=test, fraction=fraction), with_indices=True)
    return documents.filter(partial(_kept_rows, test=test, fraction=fraction), with_indices=True, batched=True)


# Functions of the module, so that a stream can be pickled for a worker process.


def _cut_row(row: dict[str, Any], index: int, test: bool, fraction: float) -> dict[str, str]:
    return {"text": _cut(row_text(row["text"], index), test, fraction)}


def _kept_rows(rows: dict[str, list], indices: list[int], test: bool, fraction: float) -> list[bool]:
    return (_held_out(np.asarray(indices), fraction) == test).tolist()


def _cut(text: str, test: bool, fraction: float) -> str:
    cut = round(len(text) * (1 - fraction))
    return text[cut:] if test else text[:cut]


def _held_out(indices: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out, by Knuth's multiplicative hash of their index (The Art of Computer Programming,
    vol. 3, section 6.4). It spreads any run of indices evenly: close to ``fraction`` of the run is held out."""
    hashed = indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, modulo 2^64
    return (hashed >> np.uint64(11)).astype(np.float64) * 2.0**-53 >= 1 - fraction
