"""Mean and covariance of features, kept on disk, and the distances between sets of features.

Frechet distance: Heusel et al. (arXiv 1706.08500), Eq. 6. Kernel distance: Binkowski et al. (arXiv 1801.01401),
section 3. Precision and recall: Kynkaanniemi et al. (arXiv 1904.06991), Eq. 1-3. Everything is computed in float64.
"""

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float64
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .features import FeatureNetwork, IndexedImages, as_tensor, check_images, write_atomically

STATISTICS_FORMAT = "1"


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean [F] and unbiased covariance [F, F] (float64) of ``num_samples`` feature vectors of one network.

    ``network_fingerprint`` and ``data_fingerprint`` are empty where unknown.
    """

    mean: Float64[Tensor, "F"]
    cov: Float64[Tensor, "F F"]
    num_samples: int
    network: str
    network_fingerprint: str = ""
    data_fingerprint: str = ""

    @classmethod
    def from_batches(
        cls, batches: Iterable[Tensor | np.ndarray], network: str, network_fingerprint: str = ""
    ) -> "FeatureStatistics":
        """Statistics of features that come in batches [n, F], held one batch at a time and merged in float64 by Chan,
        Golub & LeVeque (1983), which does not cancel as sums of squares do. Raises ValueError for fewer than two
        samples, widths that differ, and NaN or infinity."""
        count, mean, scatter = 0, torch.zeros(0), torch.zeros(0)
        for batch in batches:
            batch = as_tensor(batch).double()
            if batch.ndim != 2 or (count and batch.shape[1] != len(mean)):
                raise ValueError(f"features must be [n, {len(mean) if count else 'F'}], not {tuple(batch.shape)}")
            if broken := int((~batch.isfinite().all(dim=1)).sum()):
                raise ValueError(f"{broken} of {len(batch)} feature vectors hold NaN or infinity")
            if not len(batch):
                continue
            new_mean = batch.mean(dim=0)
            centred = batch - new_mean
            if not count:
                mean, scatter = torch.zeros_like(new_mean), torch.zeros(len(new_mean), len(new_mean)).double()
            delta, total = new_mean - mean, count + len(batch)
            scatter = scatter + centred.T @ centred + torch.outer(delta, delta) * (count * len(batch) / total)
            mean, count = mean + delta * (len(batch) / total), total
        if count < 2:
            raise ValueError(f"{count} samples have no covariance; at least 2 are needed")
        return cls(mean, scatter / (count - 1), count, network, network_fingerprint)

    def save(self, path: str | os.PathLike[str]) -> None:
        """One safetensors file, written beside its final name and renamed."""
        metadata = {
            "format": STATISTICS_FORMAT,
            "num_samples": str(self.num_samples),
            "network": self.network,
            "network_fingerprint": self.network_fingerprint,
            "data_fingerprint": self.data_fingerprint,
        }
        content = {"mean": self.mean.contiguous(), "cov": self.cov.contiguous()}
        write_atomically(Path(path), save(content, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FeatureStatistics":
        """What ``save`` wrote. Raises FileNotFoundError, or ValueError for any other file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} holds no feature statistics; there is no such file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata, mean, cov = file.metadata() or {}, file.get_tensor("mean"), file.get_tensor("cov")
            if metadata.pop("format") != STATISTICS_FORMAT:
                raise ValueError("unknown format")
            if mean.ndim != 1 or cov.shape != 2 * mean.shape or not (mean.isfinite().all() and cov.isfinite().all()):
                raise ValueError(f"mean {tuple(mean.shape)} and covariance {tuple(cov.shape)} disagree or are broken")
            return cls(mean, cov, int(metadata.pop("num_samples")), **metadata)
        except Exception as error:  # safetensors raises its own class, derived from Exception alone
            raise ValueError(f"{path} does not hold feature statistics: {error}") from error


def default_cache_dir() -> Path:
    """``$HF_DIFFUSIONBLOCKS_CACHE``, or ``~/.cache/hf_diffusionblocks``."""
    return Path(os.environ.get("HF_DIFFUSIONBLOCKS_CACHE") or "~/.cache/hf_diffusionblocks").expanduser()


def _image_batches(data: IndexedImages | Tensor | np.ndarray, batch_size: int) -> Iterator[Tensor]:
    if isinstance(data, (Tensor, np.ndarray)):
        yield from check_images(data).split(batch_size)
        return
    if not len(data):
        raise ValueError("the dataset is empty; at least two images are needed")
    for start in range(0, len(data), batch_size):
        yield check_images(data[list(range(start, min(start + batch_size, len(data))))]["pixel_values"])


def dataset_fingerprint(data: IndexedImages | Tensor | np.ndarray, *, batch_size: int = 256) -> str:
    """32 hex digits of a SHA-256 over all images in their order, as float32; batches do not matter, labels neither."""
    digest, count = hashlib.sha256(), 0
    for batch in _image_batches(data, batch_size):
        if not count:
            digest.update(f"{tuple(batch.shape[1:])}".encode())
        digest.update(batch.contiguous().numpy())
        count += len(batch)
    digest.update(f"{count}".encode())
    return digest.hexdigest()[:32]


def feature_statistics(
    data: IndexedImages | Tensor | np.ndarray,
    network: FeatureNetwork,
    cache_dir: str | os.PathLike[str] | None = None,
) -> FeatureStatistics:
    """Feature statistics of a dataset or of images [N, C, H, W], from the cache when the same images met the same
    network before.

    The key hashes the network's weights and the pixels themselves, so the data are read once even when the cache
    answers, and twice when it does not; they must be the same at every reading, so turn random augmentation off. A file
    that cannot be read is computed anew, with a warning.

    Args:
        cache_dir: ``$HF_DIFFUSIONBLOCKS_CACHE`` or ``~/.cache/hf_diffusionblocks`` when None.
    """
    network_hash, data_hash = network.fingerprint, dataset_fingerprint(data)
    key = hashlib.sha256(f"{STATISTICS_FORMAT} {network_hash} {data_hash}".encode()).hexdigest()[:32]
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    path = folder / "feature_statistics" / f"{key}.safetensors"
    if path.exists():
        try:
            found = FeatureStatistics.load(path)
            if (found.network_fingerprint, found.data_fingerprint) != (network_hash, data_hash):
                raise ValueError(f"{path} holds the statistics of another network or other images")
            return replace(found, network=network.name)
        except ValueError as error:
            warnings.warn(f"{error}; computing the statistics anew", stacklevel=2)
    batches = (network(batch) for batch in _image_batches(data, network.batch_size))
    statistics = FeatureStatistics.from_batches(batches, network.name, network_hash)
    statistics = replace(statistics, data_fingerprint=data_hash)
    try:
        statistics.save(path)
    except OSError as error:
        warnings.warn(f"the statistics could not be cached: {error}", stacklevel=2)
    return statistics


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """``|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2))`` (arXiv 1706.08500, Eq. 6), by torchmetrics.

    Warns when either set has too few samples for a covariance of full rank: the distance is then biased upwards.

    Raises:
        ValueError: if the statistics come from different networks or differ in width.
    """
    from torchmetrics.image.fid import _compute_fid

    known = first.network_fingerprint and second.network_fingerprint
    if first.network != second.network or (known and first.network_fingerprint != second.network_fingerprint):
        raise ValueError(
            f"statistics of {first.network!r} ({first.network_fingerprint or 'weights unknown'}) cannot be compared "
            f"with those of {second.network!r} ({second.network_fingerprint or 'weights unknown'}). Use one network."
        )
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features of width {len(first.mean)} cannot be compared with width {len(second.mean)}.")
    for statistics in (first, second):
        if statistics.num_samples <= len(statistics.mean):
            warnings.warn(
                f"the covariance of {statistics.num_samples} samples in {len(statistics.mean)} dimensions is rank "
                "deficient and the Frechet distance biased. Use more samples, or KernelDistance, which is unbiased.",
                stacklevel=2,
            )
    # Rounding can leave the distance of equal sets slightly below zero.
    return max(0.0, _compute_fid(first.mean, first.cov, second.mean, second.cov).item())


def kernel_distance(
    predictions: Float[Tensor, "N F"],
    references: Float[Tensor, "M F"],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel ``(x.y / F + 1)^3`` (arXiv 1801.01401), by torchmetrics.

    The unbiased estimate is averaged over ``subsets`` random subsets of ``subset_size`` from either set, or of the size
    of the smaller set where that is less. Being unbiased, it may be negative.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: for fewer than two samples in a set or a subset, or no subsets.
    """
    from torchmetrics.image.kid import poly_mmd

    size = min(subset_size, len(predictions), len(references))
    if size < 2 or subsets < 1:
        raise ValueError(
            f"subset_size={subset_size} and subsets={subsets} with {len(predictions)} predictions and "
            f"{len(references)} references: at least one subset of two samples is needed."
        )
    if size == len(predictions) == len(references):
        subsets = 1  # every subset would be the whole
    generator = torch.Generator().manual_seed(seed)
    x, y = predictions.double(), references.double()
    draws = []
    for _ in range(subsets):
        some_x = x[torch.randperm(len(x), generator=generator)[:size]]
        some_y = y[torch.randperm(len(y), generator=generator)[:size]]
        draws.append(poly_mmd(some_y, some_x))
    values = torch.stack(draws)
    return values.mean().item(), values.std(unbiased=False).item()


def precision_recall(
    predictions: Float[Tensor, "N F"], references: Float[Tensor, "M F"], *, k: int = 3
) -> tuple[float, float]:
    """Shares of predictions within the references' manifold and of references within the predictions'.

    A set's manifold is the union of balls around its members, each reaching to the member's k-th nearest neighbour
    (arXiv 1904.06991, Eq. 1-3).

    Raises:
        ValueError: if k is below 1 or either set has no more than k samples.
    """
    fewest = min(len(predictions), len(references))
    if not 1 <= k < fewest:
        raise ValueError(f"k={k} must be at least 1 and below the number of samples in either set, here {fewest}.")
    centre = references.double().mean(dim=0)  # distances do not change, their rounding shrinks
    x, y = (predictions.double() - centre).numpy(), (references.double() - centre).numpy()
    return _share_inside(x, y, k), _share_inside(y, x, k)


def _share_inside(points: np.ndarray, members: np.ndarray, k: int) -> float:
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.neighbors import NearestNeighbors

    radii = NearestNeighbors(n_neighbors=k).fit(members).kneighbors()[0][:, -1]  # a point is not its own neighbour
    # Distances come from x.x - 2 x.y + y.y, so equal points are apart by rounding. Features are float32: this is less.
    radii = radii + 1e-7 * np.sqrt(max(np.square(points).sum(1).max(), np.square(members).sum(1).max()))
    chunks = pairwise_distances_chunked(
        points, members, reduce_func=lambda distances, _: (distances <= radii).any(axis=1), working_memory=64
    )
    return float(np.concatenate(list(chunks)).mean())
