"""Images from everything that ``datasets`` reads: its columns, and the pixels of its cells, kept on disk if many."""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..serialization import atomic_write
from ..suggest import unknown_name
from .image_dataset import class_indices
from .image_files import KNOWN_DATASETS
from .image_folders import load_directory
from .image_pixels import MODES, decode_cell, square
from .indexing import fixed_subset
from .scripts import script_error

_COUNTED = 1000  # so many images are looked at after one that cannot be read
CACHE_MIN_IMAGES = 10_000  # more decoded images than this are kept on disk


def open_hub(source: Any, split: str, loading: dict[str, Any]) -> Any:
    """A ``datasets.Dataset`` or ``IterableDataset``; ``loading`` holds arguments of ``datasets.load_dataset``."""
    import datasets
    import pyarrow

    if isinstance(source, str):
        path = Path(source)
        if not path.exists() and "/" not in source and difflib.get_close_matches(source, KNOWN_DATASETS, cutoff=0.7):
            raise ValueError(unknown_name("data set", source, KNOWN_DATASETS))  # before the Hub is asked for it
        try:
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                source = datasets.load_from_disk(str(path))
            else:
                name, loading = source, {k: v for k, v in loading.items() if v is not None}
                if path.is_file():
                    if path.suffix not in (".parquet", ".arrow"):
                        raise ValueError(f"{path}: a file must be .parquet or .arrow; for images give their directory.")
                    name, loading["data_files"] = path.suffix[1:], str(path)
                if "data_dir" in loading:
                    loading["data_dir"] = str(loading["data_dir"])
                load = load_directory if path.is_dir() else datasets.load_dataset
                source = load(name, split=split, **loading)
        except RuntimeError as err:
            raise script_error(source, err) from err
        except (OSError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as err:
            reason = str(err.__cause__ if isinstance(err, datasets.exceptions.DatasetGenerationError) else err)
            files = loading.get("data_files") or loading.get("data_dir")
            if files or path.exists():
                raise ValueError(f"{files or path} (split {split!r}) cannot be read by `datasets`: {reason}") from err
            raise ValueError(
                f"{unknown_name('data set', source, KNOWN_DATASETS)} It is no path on this machine either, and "
                f"was not found on the Hub: {reason}"
            ) from err
        except ValueError as err:
            if not re.search("Unknown split|Bad split", str(err)):
                raise
            raise ValueError(f"{source} has no split {split!r} (train_split= or test_split= names it): {err}") from err
    if isinstance(source, dict):  # DatasetDict, IterableDatasetDict
        if split not in source:
            raise ValueError(unknown_name("split", split, source))
        source = source[split]
    if not isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        raise ValueError(f"a {type(source).__name__} is no data set: give a name, a path or a datasets object.")
    return source


def load_table(
    dataset: Any,
    image_column: str | None,
    label_column: str | None,
    size: int | None,
    channels: int | None,
    max_samples: int | None,
    disable_progress: bool,
) -> tuple[Tensor, Any, list[str] | None]:
    import datasets

    dataset, image_column, label_column, names = find_columns(dataset.with_format(None), image_column, label_column)
    cache = None
    values: Any
    if isinstance(dataset, datasets.IterableDataset):
        cells = list(dataset if max_samples is None else dataset.take(max_samples))
        labels, values = [c[label_column] for c in cells], iter([c[image_column] for c in cells])
        rows = np.arange(len(cells))
    else:
        labels = dataset.select_columns(label_column)[:][label_column]
        rows = fixed_subset(len(dataset), max_samples or len(dataset))
        dataset = dataset if max_samples is None else dataset.select(rows)
        values = (v for start in range(0, len(rows), 256) for v in dataset[start : start + 256][image_column])
        if len(rows) > CACHE_MIN_IMAGES:
            key = json.dumps([1, dataset._fingerprint, image_column, size, channels]).encode()
            name = f"{hashlib.sha256(key).hexdigest()[:32]}.safetensors"
            cache = Path(datasets.config.HF_DATASETS_CACHE, "hf_diffusionblocks", name)
    if not labels:
        raise ValueError("the data set is empty: at least one image is needed. Check the split and any filter.")
    labels = class_indices(labels)
    # Classes are counted before rows are left out: a subset keeps the number of classes.
    names = [str(i) for i in range(int(labels.max()) + 1)] if names is None else names
    labels = labels[torch.from_numpy(rows)]
    if cache is not None and cache.is_file():
        try:
            return load_file(cache)["images"], labels, names
        except (SafetensorError, OSError, KeyError):
            pass  # a damaged cache is written again
    images = None
    bar = tqdm(values, "decoding", len(rows), delay=2, unit="img", disable=disable_progress)
    for i, value in enumerate(bar):
        mode = MODES[channels] if channels else None if images is None else MODES[images.shape[1]]
        try:
            pixels = decode_cell(value, int(rows[i]), mode, strict=channels is None)
        except ValueError as error:
            raise ValueError(f"{error}{_others_broken(values)}") from error
        pixels = pixels if size is None else square(pixels[None], size)[0]
        if images is None:
            images = torch.empty((len(labels), *pixels.shape), dtype=torch.uint8)
        if pixels.shape != images.shape[1:]:
            raise ValueError(
                f"the image of row {rows[i]} is {pixels.shape[1]}x{pixels.shape[2]} (height x width), that of row "
                f"{rows[0]} is {images.shape[2]}x{images.shape[3]}: give image_size= to bring all to one size."
            )
        images[i] = pixels
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(cache, partial(save_file, {"images": images}))
    return images, labels, names


def _others_broken(values: Any) -> str:
    """How many of the cells that were not read yet cannot be read either; of very many cells, of the next ones."""
    cells, broken = list(islice(iter(values), _COUNTED)), 0
    for value in cells:
        try:
            decode_cell(value, 0, None, strict=False)
        except ValueError:
            broken += 1
    return f" Of the {len(cells)} images after it {broken} cannot be read either." if broken else ""


def find_columns(
    dataset: Any, image_column: str | None, label_column: str | None
) -> tuple[Any, str, str, list[str] | None]:
    """The data set with its images as encoded bytes, the names of both columns, and those of the classes."""
    import datasets

    features = dataset.features or dict.fromkeys(next(iter(dataset), {}))  # a stream may not know its types
    image_column = _column("image", image_column, features, datasets.Image, ("image", "img", "images", "png", "jpg"))
    label_column = _column("label", label_column, features, datasets.ClassLabel, ("label", "labels", "cls", "class"))
    names = getattr(features[label_column], "names", None)
    if isinstance(features[image_column], datasets.Image):
        # Encoded bytes: rows are decoded below, where a bad one can be named.
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    return dataset, image_column, label_column, names


def _column(kind: str, wanted: str | None, features: Any, feature_type: type, usual: Sequence[str]) -> str:
    if wanted is not None:
        if wanted not in features:
            raise ValueError(unknown_name(f"{kind} column", wanted, features))
        return wanted
    typed = [name for name, feature in features.items() if isinstance(feature, feature_type)]
    found = typed or [name for name in features if name.lower() in usual]
    if len(found) != 1:
        which = f"several {kind} columns, {', '.join(found)}," if found else f"no {kind} column"
        raise ValueError(f"{which} among the columns {', '.join(features)}: name it with {kind}_column=.")
    return found[0]
