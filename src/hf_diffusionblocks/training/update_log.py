"""Losses of updates: kept on the device until they are written, checked then."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..strict_json import known, to_json

Row = dict[str, Any]


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient norm became NaN or infinite."""


def read_rows(records: list[Row], iteration: int, advice: str) -> list[Row]:
    """Numbers of the records of consecutive updates, the last of which was ``iteration``.

    Raises:
        NonFiniteLossError: naming block, update and noise range, and with ``advice``.
    """
    rows = []
    first = iteration - len(records)
    for offset, record in enumerate(records):
        sigma = record.pop("sigma")
        row = {k: (v.item() if isinstance(v, Tensor) else v) for k, v in record.items()}
        row["iteration"] = first + offset + 1
        if not all(torch.isfinite(torch.tensor(row[k])) for k in ("loss", "grad_norm")):
            levels = ""
            if sigma.numel():  # a clean readout draws none
                levels = f", with noise levels from {sigma.min().item():.4g} to {sigma.max().item():.4g}"
            raise NonFiniteLossError(
                f"the loss of block {row['block']} became {row['loss']} (gradient norm {row['grad_norm']}) in its "
                f"update {row['update']} (iteration {row['iteration']}){levels}. {advice} "
                "Lower the learning rate, clip the gradient, or check the data."
            )
        rows.append(row)
    return rows


def append_rows(path: Path, rows: list[Row]) -> None:
    """Write rows to a log, one JSON object per line; a held-out figure that is not known is null."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(to_json(known(row)) + "\n" for row in rows))


def block_means(rows: list[Row]) -> dict[str, float]:
    """Mean of each figure by block, as ``loss/block_0``."""
    means: dict[str, float] = {}
    for block in sorted({row["block"] for row in rows}):
        mine = [row for row in rows if row["block"] == block]
        for name in mine[0].keys() - {"block", "update", "iteration"}:
            means[f"{name}/block_{block}"] = sum(row[name] for row in mine) / len(mine)
    return means


def by_block(name: str, values: Sequence[float]) -> dict[str, float]:
    """Figures of blocks as a log has them, ``name/block_0`` and so on."""
    return {f"{name}/block_{block}": value for block, value in enumerate(values)}


def last_losses(path: Path, count: int = 50) -> dict[int, float]:
    """Mean loss of each block's last updates in a log, which may not exist."""
    losses: dict[int, list[float]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            losses.setdefault(row["block"], []).append(row["loss"])
    return {b: sum(v[-count:]) / len(v[-count:]) for b, v in sorted(losses.items())}
