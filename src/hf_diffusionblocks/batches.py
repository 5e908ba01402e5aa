"""A batch from any map-style data set: rows that are tensors, lists of numbers, or samples one by one."""

from typing import Any

from torch import Tensor, tensor
from torch.utils.data import default_collate


def fetch(dataset: Any, indices: list[int]) -> dict[str, Tensor]:
    """One batch of a data set.

    ``dataset[list]`` must give a dict of tensors, as ``datasets.Dataset`` (format ``torch``) and
    ``ImageDataset`` do; a data set that knows single indices only is collated.

    Raises:
        ValueError: for rows of several lengths.
    """
    try:
        batch = dataset[indices]
    except TypeError:
        samples = [dataset[i] for i in indices]
        if all(isinstance(sample, dict) for sample in samples):
            columns = {name: [sample.get(name) for sample in samples] for name in samples[0]}
            made = _with_tensors(columns)
            lists = [name for name, rows in columns.items() if isinstance(made[name], Tensor)]
            rest = [{k: v for k, v in sample.items() if k not in lists} for sample in samples]
            return {name: made[name] for name in lists} | (default_collate(rest) if rest[0] else {})
        return default_collate(samples)
    return _with_tensors(batch) if isinstance(batch, dict) else batch


def _with_tensors(columns: dict[str, Any]) -> dict[str, Any]:
    """Columns of numbers as tensors where their rows are lists of one length, as `datasets` gives them."""
    _check_rows(columns)
    made = dict(columns)
    for name, rows in columns.items():
        if isinstance(rows, list) and rows and all(isinstance(row, (list, tuple)) for row in rows):
            try:
                made[name] = tensor(rows)
            except (TypeError, ValueError) as error:
                raise ValueError(f"rows of {name!r} hold more than numbers: {error}.") from error
    return made


def _check_rows(columns: dict[str, Any]) -> None:
    for name, rows in columns.items():
        if not isinstance(rows, list) or not all(isinstance(row, (list, tuple, Tensor)) for row in rows):
            continue
        shapes = [list(row.shape) if isinstance(row, Tensor) else [len(row)] for row in rows]
        if any(shape != shapes[0] for shape in shapes):
            named = ", ".join(str(shape[0] if len(shape) == 1 else shape) for shape in shapes[:8])
            raise ValueError(
                f"rows of {name!r} have lengths {named}{', ...' if len(shapes) > 8 else ''}: all rows must have one. "
                "load_text_dataset makes such rows of text; otherwise cut or pad them."
            )
