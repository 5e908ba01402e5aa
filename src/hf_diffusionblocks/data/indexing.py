"""Row indices as ``datasets`` takes them, and the subset that ``max_samples`` keeps."""

import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor


def row_index(index: Any) -> Any:
    """int, slice, or int64 tensor of rows."""
    if isinstance(index, (numbers.Integral, slice)):
        return index
    index = torch.as_tensor(index if isinstance(index, (Tensor, np.ndarray)) else list(index))
    if index.dtype.is_floating_point and len(index):
        raise ValueError(f"row indices must be integers, not {index.dtype}.")
    return index.nonzero().flatten() if index.dtype == torch.bool else index.long()


def fixed_subset(length: int, max_samples: int) -> np.ndarray:
    """A fixed random subset, ascending. Larger subsets contain smaller ones."""
    return np.sort(np.random.default_rng(0).permutation(length)[:max_samples])
