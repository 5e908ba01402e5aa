"""Which samples an update sees: a function of seed, block and update number alone, so that nothing has to be saved."""

import copy
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..batches import fetch
from ..modeling import BlockedPreTrainedModel


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed from any values; the same everywhere."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class SampleOrder:
    """An endless order of samples: one permutation after the other, each a function of seed, block and epoch.

    Args:
        num_samples: size of the data set.
        seed: of the run.
        block: every block has an order of its own.
    """

    def __init__(self, num_samples: int, seed: int, block: int):
        self.num_samples, self.seed, self.block = num_samples, seed, block
        self._cached: dict[int, list[int]] = {}

    def indices(self, start: int, count: int) -> list[int]:
        """The samples at positions ``start`` to ``start + count`` of the order."""
        result: list[int] = []
        while len(result) < count:
            epoch, offset = divmod(start + len(result), self.num_samples)
            result += self._permutation(epoch)[offset : offset + count - len(result)]
        return result

    def _permutation(self, epoch: int) -> list[int]:
        if epoch not in self._cached:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.block, epoch))
            self._cached = {k: v for k, v in self._cached.items() if k == epoch - 1}
            self._cached[epoch] = torch.randperm(self.num_samples, generator=generator).tolist()
        return self._cached[epoch]


class StreamOrder(SampleOrder):
    """From the beginning to the end, over and over: the order of a data set that is read in order only, every block's.

    Such a data set (``in_order`` is true) shuffles by itself, if at all.
    """

    def indices(self, start: int, count: int) -> list[int]:
        return [position % self.num_samples for position in range(start, start + count)]


def reader_of(dataset: Any, seed: int, block: int) -> tuple[Any, SampleOrder]:
    """A block's data set and order. Blocks do not share a reader that goes forward only: each has a copy."""
    if getattr(dataset, "in_order", False):
        return copy.deepcopy(dataset), StreamOrder(len(dataset), seed, block)
    return dataset, SampleOrder(len(dataset), seed, block)


class _IndexBatches(Sampler):
    def __init__(self, order: SampleOrder, start: int, batch_size: int, stride: int):
        self.order, self.start, self.batch_size, self.stride = order, start, batch_size, stride

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start
        while True:
            yield self.order.indices(position, self.batch_size)
            position += self.stride


class _Batched(Dataset):
    """Any map-style data set, read by a list of indices."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, indices: list[int]) -> dict[str, Tensor]:
        return fetch(self.dataset, indices)


def batches(
    dataset: Any,
    order: SampleOrder,
    start: int,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    stride: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Endless batches from position ``start`` of the order on, ``stride`` apart; by default one after the other."""
    sampler = _IndexBatches(order, start, batch_size, stride or batch_size)
    if num_workers == 0:
        for indices in sampler:
            yield fetch(dataset, indices)
    yield from DataLoader(
        _Batched(dataset), sampler=sampler, batch_size=None, num_workers=num_workers, pin_memory=pin_memory
    )


def data_fingerprint(dataset: Any) -> str:
    """A data set's own fingerprint; otherwise a hash of its samples, of 1024 evenly spread ones if there are more."""
    own = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)
    if isinstance(own, str):
        return own
    digest = hashlib.sha256()
    rows = torch.linspace(0, len(dataset) - 1, min(len(dataset), 1024)).round().long().tolist()
    for start in range(0, len(rows), 64):
        batch = fetch(dataset, rows[start : start + 64])
        for name in sorted(batch):
            digest.update(batch[name].detach().cpu().double().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_dataset(model: BlockedPreTrainedModel, dataset: Any, what: str) -> None:
    """Raise a ``ValueError`` for a data set that is empty or does not fit a model.

    Args:
        model: checks a batch of the first samples, and what is cheap to see of all.
        dataset: ``len()`` and ``dataset[list of indices]``.
        what: its name in the error, such as "training".
    """
    if len(dataset) == 0:
        raise ValueError(f"the {what} data set is empty. Check its name, split and filters.")
    try:
        batch = fetch(dataset, list(range(min(4, len(dataset)))))
        if not isinstance(batch, dict):
            raise ValueError(f"a batch holds {type(batch).__name__}; give a dict of tensors.")
        model.check_batch(batch)
        model.check_dataset(dataset)
    except ValueError as error:
        raise ValueError(f"the {what} data set does not fit the model: {error}") from error
