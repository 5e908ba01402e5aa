"""Images with class labels, held in memory: pixels, or latents of a VAE cached on disk.

Every source ends in one form, ``ImageDataset``, and indexing it gives the batch that a class-conditional denoiser
trains on: ``pixel_values`` [B, C, H, W] in [-1, 1] and ``class_labels`` [B]. Bad rows are found while loading, never in
the middle of a run.
"""

import difflib
import gzip
import hashlib
import json
import numbers
import os
import re
import reprlib
import struct
import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..serialization import atomic_write
from ..suggest import unknown_name
from .image_folders import load_directory
from .indexing import row_index
from .scripts import script_error

KNOWN_DATASETS = ("digits", "fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_MNIST_DIR = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts the files
CACHE_MIN_IMAGES = 10_000  # more decoded images than this are kept on disk
_MODES = {1: "L", 3: "RGB"}


class ImageDataset(Dataset):
    """Labelled images in memory, indexed as Hugging Face ``datasets`` are: ``ds[[3, 1]]`` is one batch.

    Args:
        images: uint8 pixels [N, C, H, W], or latents [N, C, H, W] in float16, bfloat16 or float32.
        labels: class indices [N], integers from 0.
        class_names: name of each class; ``"0"``, ``"1"``, ... up to the largest label unless given.
        scaling_factor: factor on latents as they are read. Latents written by ``cache_latents`` hold the VAE's
            own factor already and need 1.

    Indexing with an int gives ``{"pixel_values": float32 [C, H, W], "class_labels": int64 []}``; with a list, slice,
    array or tensor of indices the same with a leading batch dimension. Pixels are scaled to [-1, 1].

    Raises:
        ValueError: if there are no images, shapes or dtypes do not fit, a label is not an integer in
            [0, num_classes), or a latent is not finite.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | np.ndarray | Sequence[int],
        class_names: Sequence[str] | None = None,
        *,
        scaling_factor: float = 1.0,
    ) -> None:
        if images.ndim != 4 or images.dtype not in (torch.uint8, torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}: expected [N, C, H, W], uint8 for pixels or float16, "
                "bfloat16 or float32 for latents."
            )
        if len(images) == 0 or len(labels) == 0:
            raise ValueError("the data set is empty: at least one image is needed. Check the split and any filter.")
        self.images = images
        self.labels = class_indices(labels)
        if len(self.labels) != len(images):
            raise ValueError(f"{len(images)} images but {len(self.labels)} labels: each image needs one label.")
        largest = int(self.labels.max())
        self.class_names = [str(c) for c in (range(largest + 1) if class_names is None else class_names)]
        if largest >= self.num_classes:
            row = int(self.labels.argmax())
            raise ValueError(f"label {largest} of row {row} is not in [0, {self.num_classes}): {self.class_names}.")
        self.scaling_factor = float(scaling_factor)
        if not self.is_latent and self.scaling_factor != 1.0:
            raise ValueError(f"scaling_factor={scaling_factor} applies to latents; pixels are scaled to [-1, 1].")
        if self.is_latent and (row := _first_not_finite(images)) is not None:
            raise ValueError(f"the latent of row {row} is not finite: encode again, with the VAE in float32.")

    @property
    def num_classes(self) -> int:
        """Number of classes, also those without an image."""
        return len(self.class_names)

    @property
    def is_latent(self) -> bool:
        """Whether the images are latents rather than pixels."""
        return self.images.dtype.is_floating_point

    @property
    def channels(self) -> int:
        """C."""
        return self.images.shape[1]

    @property
    def image_size(self) -> int:
        """Side of the square images (or latents). ValueError if they are not square."""
        height, width = self.images.shape[2:]
        if height != width:
            raise ValueError(f"images are {height}x{width} (height x width), not square: load them with image_size=.")
        return height

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of images, labels, class names and scaling factor."""
        head = [str(self.images.dtype), list(self.images.shape), self.class_names, self.scaling_factor]
        digest = hashlib.sha256(json.dumps(head).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def select(self, indices: Iterable[int]) -> "ImageDataset":
        """The data set of these rows, in this order, with the same classes."""
        index = row_index(indices)
        return ImageDataset(
            self.images[index], self.labels[index], self.class_names, scaling_factor=self.scaling_factor
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        index = row_index(index)
        images = self.images[index]
        # A new tensor in every case: in-place work on a batch must not reach the stored images.
        pixels = images.float() * self.scaling_factor if self.is_latent else images.float().div_(127.5).sub_(1.0)
        return {"pixel_values": pixels, "class_labels": self.labels[index].clone()}

    def __repr__(self) -> str:
        kind = "latents" if self.is_latent else "images"
        return f"ImageDataset({len(self)} {kind} {list(self.images.shape[1:])}, {self.num_classes} classes)"


def load_image_dataset(
    name_or_path: Any,
    split: str = "train",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    data_dir: str | os.PathLike | None = None,
    data_files: Any = None,
    max_samples: int | None = None,
    streaming: bool = False,
    scaling_factor: float = 1.0,
    disable_progress: bool = False,
    **load_dataset_kwargs: Any,
) -> ImageDataset:
    """Load labelled images, or cached latents, into memory.

    Args:
        name_or_path: one of

            - ``"digits"``: scikit-learn's 8x8 digits; a fixed stratified split, 80 % train and 20 % test;
            - ``"fashion-mnist"``: IDX files in ``data_dir``, ``$FASHION_MNIST_DIR`` or where Debian's package
              ``dataset-fashion-mnist`` puts them;
            - a directory of IDX files with MNIST's names, or of ``cache_latents``' files (those of ``train``, or
              of any split in a folder of the split's name);
            - a ``.parquet`` or ``.arrow`` file, a directory that ``datasets.load_dataset`` or ``load_from_disk`` reads
              (``imagefolder``, parquet, ...), the name of one of its builders, or a data set's id on the Hub;
            - a ``datasets`` object.
        split: name of the split; for ``datasets`` sources also slices such as ``"train[:10%]"``.
        image_column: column of images; by default the only one of type ``Image``, or named like one. Sources without
            columns leave it and ``label_column`` aside.
        label_column: column of integer labels; by default the only one of type ``ClassLabel``, or named like one.
        image_size: crop to the central square and resize to this side (bicubic with antialiasing), in pixels.
        channels: 1 (grey) or 3 (RGB), converted if need be; by default those of the first image.
        data_dir: directory of the files, where ``name_or_path`` does not say it.
        data_files: as in ``datasets.load_dataset``.
        max_samples: keep this many rows: a fixed random subset in the order of the source, so that sorted classes all
            stay; the first rows when streaming.
        streaming: read rows one by one without downloading the whole set first.
        scaling_factor: factor on latents, see ``ImageDataset``.
        disable_progress: no progress bar (there is one only for work of more than two seconds).
        **load_dataset_kwargs: for ``datasets.load_dataset``, such as ``name``, ``revision``, ``token``.

    Raises:
        ValueError: for anything that cannot be loaded; the message names the value, row or file.
    """
    for name, value in (("image_size", image_size), ("max_samples", max_samples)):
        if value is not None and (not isinstance(value, numbers.Integral) or value < 1):
            raise ValueError(f"{name}={value!r} must be a positive integer.")
    if isinstance(name_or_path, (str, os.PathLike)):
        name_or_path = os.path.expanduser(name_or_path)
    known = isinstance(name_or_path, str) and name_or_path in KNOWN_DATASETS
    path = Path(name_or_path) if isinstance(name_or_path, str) and not known else None
    if name_or_path == "fashion-mnist":
        path = Path(data_dir or os.environ.get("FASHION_MNIST_DIR") or FASHION_MNIST_DIR)
        data_dir = None
    latents = _latent_files(path, split) if path and not known else None
    if not latents and channels not in (None, *_MODES):
        raise ValueError(f"channels={channels!r} is not possible for images: use 1 (grey) or 3 (RGB).")
    is_hub = not (latents or known or (path and any(path.glob("*-images-idx3-ubyte*"))))
    loading = {"data_dir": data_dir, "data_files": data_files, "streaming": streaming or None, **load_dataset_kwargs}
    if not (is_hub and path) and (given := [name for name, value in loading.items() if value is not None]):
        source = repr(name_or_path) if isinstance(name_or_path, str) else f"a {type(name_or_path).__name__}"
        raise ValueError(f"{', '.join(given)}: no setting for {source}, which `datasets.load_dataset` does not load.")
    if is_hub:
        dataset = open_hub(name_or_path, split, loading)
        images, labels, names = _load_hub(
            dataset, image_column, label_column, image_size, channels, max_samples, disable_progress
        )
        return ImageDataset(images, labels, names, scaling_factor=scaling_factor)
    if latents:
        images, labels, names = _load_latents(latents)
        if image_size not in (None, images.shape[-1]) or channels not in (None, images.shape[1]):
            raise ValueError(
                f"image_size={image_size}, channels={channels} do not fit latents of shape {list(images.shape[1:])}, "
                "which cannot be converted: encode the images again."
            )
    else:
        if split not in ("train", "test"):
            raise ValueError(unknown_name("split", split, ("train", "test")))
        images, labels, names = _load_digits(split) if path is None else _load_idx(path, split)
        names = list(FASHION_MNIST_CLASSES) if name_or_path == "fashion-mnist" else names
    if max_samples is not None:
        rows = torch.from_numpy(fixed_subset(len(images), max_samples))
        images, labels = images[rows], torch.as_tensor(labels)[rows]
    if not latents:
        images = images if image_size is None else square(images, image_size)
        images = images.repeat(1, 3, 1, 1) if channels == 3 else images
    return ImageDataset(images, labels, names, scaling_factor=scaling_factor)


def cache_latents(
    dataset: Any,
    vae: Any,
    output_dir: str | os.PathLike,
    *,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    posterior: str = "sample",
    seed: int = 0,
    shard_size: int = 8192,
    disable_progress: bool = False,
) -> Path:
    """Encode images with a VAE and keep the latents in ``output_dir/latents-00000.safetensors``, ...

    What is stored, in float16, is ``(z - shift_factor) * scaling_factor`` with the VAE's own factors, the space in
    which a latent diffusion model works. ``load_image_dataset(output_dir)`` reads it back. Each file is complete or
    absent, and a second call with the same arguments goes on after the last finished file.

    Args:
        dataset: an ``ImageDataset`` of pixels, or anything with ``len``, ``ds[list]`` giving ``pixel_values`` and
            ``class_labels``, and a ``fingerprint``: a ``datasets.Dataset`` with a transform serves for sets that do not
            fit into memory.
        vae: a diffusers ``AutoencoderKL``; moved to ``device`` and ``dtype`` and left there, in eval mode.
        output_dir: directory of one split's latents, made if need be.
        batch_size: images per call of the encoder. It does not change the noise of ``posterior="sample"``.
        device: where to encode; by default where the VAE is.
        dtype: precision of the encoder; by default the VAE's.
        posterior: z is a ``"sample"`` of the posterior N(mean, std^2), as in DiT's training, or its ``"mode"``.
        seed: of the samples' noise, which is drawn on the CPU per file: the same on every device.
        shard_size: rows per file.
        disable_progress: no progress bar.

    Returns:
        ``output_dir``.

    Raises:
        ValueError: if the images do not fit the VAE, a latent is not finite, or the directory holds the latents of
            another data set, VAE or setting.
    """
    if posterior not in ("sample", "mode"):
        raise ValueError(unknown_name("posterior", posterior, ("sample", "mode")))
    if batch_size < 1 or shard_size < 1:
        raise ValueError(f"batch_size={batch_size} and shard_size={shard_size} must be positive.")
    if len(dataset) == 0:
        raise ValueError("the data set is empty: at least one image is needed. Check the split and any filter.")
    channels, *size = dataset[[0]]["pixel_values"].shape[1:]
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if getattr(dataset, "is_latent", False):
        raise ValueError("the data set holds latents already: give the images.")
    if channels != vae.config.in_channels or any(side % factor for side in size):
        raise ValueError(
            f"images {[channels, *size]} do not fit the VAE, which takes {vae.config.in_channels} channels and sides "
            f"that are multiples of {factor}: load them with channels= and image_size=."
        )
    fingerprint = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)
    if fingerprint is None:
        raise ValueError(f"{type(dataset).__name__} needs a fingerprint, by which a resumed run knows its data.")
    vae = vae.to(device or vae.device).eval()
    if dtype is not None and dtype != vae.dtype:  # diffusers warns of a cast even where it changes nothing
        vae = vae.to(dtype)
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    starts = range(0, len(dataset), shard_size)
    settings = {
        "dataset": fingerprint, "vae": _weights_fingerprint(vae), "dtype": str(vae.dtype), "posterior": posterior,
        "seed": seed, "scaling_factor": scale, "shift_factor": shift, "rows": len(dataset), "shard_size": shard_size,
        "num_shards": len(starts),
    }  # fmt: skip
    # Class names are of the data set, hence in its fingerprint. safetensors' metadata are strings.
    metadata = {"settings": json.dumps(settings), "class_names": json.dumps(getattr(dataset, "class_names", None))}
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    done = {}
    for file in output_dir.glob("latents*.safetensors"):
        done[file.name] = _read_latents(file, header_only=True)
        theirs = json.loads(done[file.name].get("settings", "{}"))
        if theirs != settings:
            names = sorted(k for k in settings if theirs.get(k) != settings[k])
            raise ValueError(
                f"{file} was written with another {', '.join(names)}: give an empty output_dir or remove the old files."
            )
    bar = tqdm(total=len(dataset), desc="encoding", unit="img", delay=2, disable=disable_progress)
    for shard, start in enumerate(starts):
        file = output_dir / f"latents-{shard:05d}.safetensors"
        rows = range(start, min(start + shard_size, len(dataset)))
        if file.name not in done:
            generator = torch.Generator().manual_seed(seed + shard)
            latents, labels, noise = [], [], None
            for i in range(0, len(rows), batch_size):
                batch = dataset[list(rows[i : i + batch_size])]
                with torch.no_grad():
                    distribution = vae.encode(batch["pixel_values"].to(vae.device, vae.dtype)).latent_dist
                z = distribution.mode().float().cpu()
                if posterior == "sample":
                    # Drawn for the whole file at once: the same noise for a row whatever the batch size.
                    noise = torch.randn((len(rows), *z.shape[1:]), generator=generator) if noise is None else noise
                    z = z + distribution.std.float().cpu() * noise[i : i + batch_size]
                latents.append(((z - shift) * scale).half())
                labels.append(class_indices(batch["class_labels"]))
                if (bad := _first_not_finite(latents[-1])) is not None:
                    raise ValueError(
                        f"the latent of row {rows[i + bad]} is not finite in {vae.dtype}: use dtype=torch.float32."
                    )
                bar.update(len(z))
            tensors = {"latents": torch.cat(latents).contiguous(), "labels": torch.cat(labels)}
            atomic_write(file, partial(save_file, tensors, metadata=metadata))
        else:
            bar.update(len(rows))
    bar.close()
    return output_dir


def class_indices(labels: Any) -> Tensor:
    """int64 labels [N]; ValueError naming the first row whose label is not an integer >= 0."""
    array = np.asarray(labels)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        values = labels if isinstance(labels, list) else array.tolist()
        row = next((i for i, v in enumerate(values) if not np.issubdtype(np.asarray(v).dtype, np.integer)), 0)
        raise ValueError(
            f"the label of row {row}, {reprlib.repr(values[row])}, is not an integer class index; turn names or "
            "floats into one with `dataset.class_encode_column(...)` of the datasets library."
        )
    if (array < 0).any():
        row = int((array < 0).argmax())
        raise ValueError(
            f"the label of row {row}, {array[row]}, is negative: labels are class indices from 0. Negative ones often "
            "mark rows without a label; drop those."
        )
    return torch.from_numpy(array.astype(np.int64))


def _first_not_finite(latents: Tensor) -> int | None:
    """First row with an inf or nan, a part at a time: the mask of a large set would not fit beside it."""
    for start in range(0, len(latents), 4096):
        finite = latents[start : start + 4096].isfinite().flatten(1).all(1)
        if not finite.all():
            return start + int(finite.int().argmin())
    return None


def fixed_subset(length: int, max_samples: int) -> np.ndarray:
    """A fixed random subset, ascending. Larger subsets contain smaller ones."""
    return np.sort(np.random.default_rng(0).permutation(length)[:max_samples])


def square(images: Tensor, size: int) -> Tensor:
    """Central square of uint8 images [N, C, H, W], resized to [N, C, size, size]."""
    side = min(images.shape[-2:])
    top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
    images = images[..., top : top + side, left : left + side]
    return images if side == size else F.interpolate(images, (size, size), mode="bicubic", antialias=True)


# Digits and IDX files


def _load_digits(split: str) -> tuple[Tensor, Tensor, list[str]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
    rows = np.sort(rows[split == "test"])
    images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)  # 0..16
    return torch.from_numpy(images)[:, None], digits.target[rows], [str(d) for d in range(10)]


def _load_idx(path: Path, split: str) -> tuple[Tensor, Tensor, None]:
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


# Latents


def _latent_files(path: Path, split: str) -> list[Path]:
    """The latent files of a split: those in the folder of its name, or for ``train`` in the directory itself."""
    files = sorted((path / split).glob("latents*.safetensors"))
    flat = sorted(path.glob("latents*.safetensors"))
    if flat and not files and split != "train":
        raise ValueError(f"{path} holds latents of split 'train' only; those of {split!r} belong into {path / split}.")
    return files or flat


def _read_latents(file: Path, header_only: bool = False) -> Any:
    """Metadata of a latent file; with tensors: (latents, labels, metadata)."""
    try:
        with safe_open(file, "pt") as f:
            metadata = f.metadata() or {}
            if missing := {"latents", "labels"} - set(f.keys()):
                raise ValueError(f"{file} has no {', '.join(sorted(missing))}, only {', '.join(f.keys())}.")
            return metadata if header_only else (f.get_tensor("latents"), f.get_tensor("labels"), metadata)
    except (SafetensorError, OSError) as err:
        raise ValueError(f"{file} is truncated or not a safetensors file ({err}): remove it and encode again.") from err


def _load_latents(files: list[Path]) -> tuple[Tensor, Tensor, list[str] | None]:
    latents, labels, metadata = zip(*[_read_latents(f) for f in files], strict=True)
    for file, tensor, meta in zip(files, latents, metadata, strict=True):
        expected = json.loads(meta.get("settings", "{}")).get("num_shards", len(files))
        if expected != len(files):
            raise ValueError(f"{file.parent} holds {len(files)} of {expected} latent files: run cache_latents again.")
        if tensor.shape[1:] != latents[0].shape[1:] or meta.get("settings") != metadata[0].get("settings"):
            raise ValueError(f"{file} does not belong to {files[0]}: shape or settings differ.")
        if tensor.dtype == torch.uint8:
            raise ValueError(f"{file} holds uint8, not latents: expected float16, bfloat16 or float32.")
        if (row := _first_not_finite(tensor)) is not None:
            raise ValueError(f"{file}: the latent of row {row} is not finite. Encode again, with the VAE in float32.")
    return torch.cat(latents), torch.cat(labels), json.loads(metadata[0].get("class_names", "null"))


def _weights_fingerprint(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# Everything that `datasets` reads


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


def _load_hub(
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
    if isinstance(dataset, datasets.IterableDataset):
        cells = list(dataset if max_samples is None else dataset.take(max_samples))
        labels, values = [c[label_column] for c in cells], [c[image_column] for c in cells]
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
        mode = _MODES[channels] if channels else None if images is None else _MODES[images.shape[1]]
        pixels = decode_cell(value, int(rows[i]), mode, strict=channels is None)
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


def decode_cell(value: Any, row: int, mode: str | None, strict: bool) -> Tensor:
    """uint8 pixels [C, H, W] of one cell: encoded bytes, a path, an array [H, W] or [H, W, C], or a PIL image."""
    import datasets

    if isinstance(value, (bytes, str)):
        value = {"bytes": value, "path": None} if isinstance(value, bytes) else {"bytes": None, "path": value}
    path = f" ({value['path']})" if isinstance(value, dict) and value.get("path") else ""
    try:
        if value is None:
            raise ValueError("the cell is empty")
        if isinstance(value, (list, np.ndarray)):
            value = Image.fromarray(np.asarray(value, dtype=np.uint8))
        image = datasets.Image().decode_example(value)  # also turns it as its EXIF orientation says
        coloured = len(image.getbands()) >= 3 or image.mode in ("P", "PA")
        mode = mode or ("RGB" if coloured else "L")
        if image.mode[0] in "IF":
            raise ValueError(f"mode {image.mode} has more than 8 bits per channel; convert it to 8 bits first")
        if strict and mode == "L" and coloured:
            raise ValueError(f"it has mode {image.mode} but the first image is grey; give channels=1 or channels=3")
        pixels = np.array(image.convert(mode))
    except Exception as err:  # each of PIL's codecs has errors of its own
        raise ValueError(f"the image of row {row}{path} cannot be read: {err}.") from err
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
