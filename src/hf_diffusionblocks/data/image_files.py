"""Images from files that ``datasets`` does not read: scikit-learn's digits, and MNIST's IDX format."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

KNOWN_DATASETS = ("digits", "fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_MNIST_DIR = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts the files


def load_digits_split(split: str) -> tuple[Tensor, Tensor, list[str]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
    rows = np.sort(rows[split == "test"])
    images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)  # 0..16
    return torch.from_numpy(images)[:, None], digits.target[rows], [str(d) for d in range(10)]


def load_idx(path: Path, split: str) -> tuple[Tensor, Tensor, None]:
    prefix = {"train": "train", "test": "t10k"}[split]
    arrays = []
    for kind in ("images-idx3", "labels-idx1"):
        files = [path / f"{prefix}-{kind}-ubyte{suffix}" for suffix in (".gz", "")]
        file = next((f for f in files if f.is_file()), None)
        if file is None:
            raise ValueError(
                f"{files[0]} is missing. Fashion-MNIST is in Debian's dataset-fashion-mnist (apt-get install "
                "dataset-fashion-mnist); for files elsewhere give data_dir= or set FASHION_MNIST_DIR; or load "
                "'zalando-datasets/fashion_mnist' from the Hub."
            )
        arrays.append(_read_idx(file))
    if len(arrays[0]) != len(arrays[1]):
        raise ValueError(f"{path}: {len(arrays[0])} images but {len(arrays[1])} labels for split {split!r}.")
    return torch.from_numpy(arrays[0])[:, None], torch.from_numpy(arrays[1]), None


def _read_idx(file: Path) -> np.ndarray:
    """uint8 array of an IDX file (two zero bytes, type, number of dimensions, big-endian sizes, values)."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        zero, dtype, ndim = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{ndim}I", data, 4)
        if (zero, dtype, ndim) != (0, 8, 3 if "idx3" in file.name else 1):
            raise ValueError(f"its head {data[:4].hex()} is not that of unsigned bytes")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy()
    except (EOFError, OSError, zlib.error, struct.error, ValueError) as err:
        raise ValueError(f"{file} is truncated or not an IDX file ({err}): fetch it again.") from err
