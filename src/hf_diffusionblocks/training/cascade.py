"""Blocks that build on each other: which may train, and what the lower ones give, computed once and kept on disk."""

import errno
import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .. import serialization
from ..modeling import BlockedPreTrainedModel
from .arguments import DiffusionBlocksTrainingArguments
from .data_stream import data_fingerprint, fetch
from .parallel import sharded_launch

_ROWS = 16  # rows per forward pass
_ZEROS = 1 << 20  # bytes written at a time where a file's place cannot be reserved
_CANNOT_RESERVE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def with_gradient(
    model: BlockedPreTrainedModel, args: DiffusionBlocksTrainingArguments, distils: bool
) -> DiffusionBlocksTrainingArguments:
    """The settings with a gradient chosen.

    A local loss teaches the lower blocks of a trained base to be the end of a network that they are the beginning of
    (docs/experiments-smollm2.md), so such a base is trained by the exact gradient wherever that is possible.
    """
    if not isinstance(model, BlockedPreTrainedModel):
        raise ValueError(f"a {type(model).__name__} has no blocks: cut it with a blocked model's from_base() first.")
    if args.gradient is not None:
        return args
    config = model.config
    whole = set(model.resident_blocks) == set(range(config.num_blocks))
    chain = getattr(config, "context", "independent") == "cascade" and config.readout == "clean"
    plain = args.train_shared != "all" and args.lower_outputs == "recompute" and args.order != "sequential"
    trained = chain and config.pretrained and not config.auxiliary_layers
    exact = trained and config.num_blocks > 1 and whole and plain and not distils and not sharded_launch()
    return replace(args, gradient="exact" if exact else "local")


def check_job(
    model: BlockedPreTrainedModel, blocks: list[int], args: DiffusionBlocksTrainingArguments, sequential: bool
) -> None:
    """Raise a ``ValueError`` for a job that cannot train what it was given.

    A block of a cascade needs trained blocks below it, or ones that train at the same time; those of a pretrained base
    are trained as they come, so that each of its blocks may train before, after or beside the others. What all blocks
    share can only train where it does not change under other jobs.
    """
    config = model.config
    count = config.num_blocks
    if args.hand_over and not sequential:
        raise ValueError(
            "hand_over=True needs order='sequential': side by side, no block is finished before the next one starts. "
            "Set hand_over=False."
        )
    shared = next(model.shared_parameters(), None) is not None
    alone = set(blocks) != set(range(count))
    if shared and alone and args.train_shared == "all":
        raise ValueError(
            f"train_shared='all' in a job that trains blocks {blocks} of {count}: the token embeddings would change "
            "under the other jobs. Use train_shared='none', or 'first' with order='sequential'."
        )
    cascade = getattr(config, "context", "independent") == "cascade"
    if args.gradient == "exact" and count > 1:
        for name, value in (("train_shared", "all"), ("lower_outputs", "disk")):
            if getattr(args, name) == value:
                raise ValueError(f"gradient='exact' does not go with {name}={value!r}: leave {name} at its default.")
        missing = sorted(set(range(count)) - set(model.resident_blocks))
        if missing:
            raise ValueError(f"gradient='exact' runs all blocks; not loaded: {missing}. Load them with blocks=None.")
        return
    if shared and alone and not cascade and args.train_shared == "first" and 0 in blocks:
        raise ValueError(
            f"train_shared='first' in a job that trains blocks {blocks} of {count} with independent blocks: the token "
            "embeddings would change under the other jobs. Use train_shared='none'."
        )
    if not cascade:
        if args.lower_outputs == "disk":
            raise ValueError("lower_outputs='disk' is for a cascade: independent blocks have no blocks below them.")
        return
    changed = [name for name in ("horizontal_flip", "rand_augment") if getattr(args, name)]
    if args.lower_outputs == "disk" and changed:
        raise ValueError(
            f"lower_outputs='disk' with {changed[0]}=True: what is kept is that of the images as they are. Use "
            f"lower_outputs='recompute', or {changed[0]}=False."
        )
    if args.lower_outputs == "disk" and not sequential:
        raise ValueError("lower_outputs='disk' needs order='sequential': side by side, the lower blocks still change.")
    if config.pretrained:
        return
    ready = {*config.trained_blocks, *blocks}
    for block in blocks:
        missing = [b for b in range(block) if b not in ready]
        if missing:
            raise ValueError(
                f"block {block} of a cascade reads what blocks {list(range(block))} give, and {missing} have not been "
                f"trained. Train them first, or in the same run: blocks={missing + [block]}."
            )


def mark_trained(model: BlockedPreTrainedModel, trainers: Mapping[int, Any], num_updates: int) -> None:
    """Write the blocks that have made all their updates into ``model.config.trained_blocks``, if the family has it."""
    if hasattr(model.config, "trained_blocks"):
        done = [block for block, trainer in trainers.items() if trainer.updates >= num_updates]
        model.config.trained_blocks = sorted({*model.config.trained_blocks, *done})


class WithLowerOutputs(Dataset):
    """A data set whose batches also hold ``hidden_states``, read from a file."""

    def __init__(self, dataset: Any, path: Path, shape: tuple[int, int, int]):
        self.dataset, self.path, self.shape = dataset, path, shape
        self._rows = np.memmap(path, dtype=np.uint16, mode="r", shape=shape)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: list[int]) -> dict[str, Tensor]:
        values = torch.from_numpy(self._rows[indices].astype(np.int32)).to(torch.int16).view(torch.bfloat16)
        return fetch(self.dataset, indices) | {"hidden_states": values.float()}


@torch.no_grad()
def lower_outputs(
    model: BlockedPreTrainedModel, block: int, dataset: Any, folder: Path, quiet: bool = False
) -> WithLowerOutputs:
    """The data set with what the blocks below give, computed once (bfloat16, 2 x rows x positions x width bytes).

    The file is written beside its final name and renamed; it is used again as long as the weights below and the data
    are the same. Files of lower blocks are removed.

    Raises:
        OSError: if the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    positions = model.num_positions(fetch(dataset, [0])[model.main_input_name])
    shape = (len(dataset), positions, model.config.hidden_size)
    path, note = folder / f"block-{block:02d}.bin", folder / f"block-{block:02d}.json"
    identity = {"shape": list(shape), "weights": _digest(model, block), "data": data_fingerprint(dataset)}
    size = 2 * int(np.prod(shape))
    if _read(note) == identity and path.is_file() and path.stat().st_size == size:
        return WithLowerOutputs(dataset, path, shape)
    for left in folder.glob(".block-*"):  # by a kill
        left.unlink()
    device = next(model.parameters()).device
    temporary = folder / f".block-{block:02d}.writing"
    try:
        _reserve(temporary, size)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{size:,} bytes of lower blocks' outputs do not fit in {folder}: {error}. Free "
            "disk space, or use lower_outputs='recompute'."
        ) from error
    rows = np.memmap(temporary, dtype=np.uint16, mode="r+", shape=shape)
    starts = range(0, len(dataset), _ROWS)
    for start in tqdm(starts, desc=f"outputs below block {block}", unit="batch", disable=quiet):
        indices = list(range(start, min(start + _ROWS, len(dataset))))
        batch = {k: v.to(device) for k, v in fetch(dataset, indices).items()}
        hidden = model.context_of(block, batch[model.main_input_name], **model.places(batch))
        rows[indices] = hidden.to(torch.bfloat16).view(torch.int16).cpu().numpy().view(np.uint16)
    rows.flush()
    del rows
    note.unlink(missing_ok=True)  # a note never describes another file, whenever the process is killed
    os.replace(temporary, path)
    serialization.write_json(note, identity)
    for lower in range(block):
        for name in (f"block-{lower:02d}.json", f"block-{lower:02d}.bin"):
            (folder / name).unlink(missing_ok=True)
    return WithLowerOutputs(dataset, path, shape)


def _reserve(path: Path, size: int) -> None:
    """Make a file of so many bytes that has its place on the disk: writing to a map on a full one kills the process.

    Where the system (macOS, Windows) or the file system cannot reserve, zeros are written.

    Raises:
        OSError: if the disk is full.
    """
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
                return
            except OSError as error:
                if error.errno not in _CANNOT_RESERVE:
                    raise
        zeros = bytes(min(size, _ZEROS))
        for start in range(0, size, _ZEROS):
            file.write(zeros[: size - start])
        file.flush()
        os.fsync(file.fileno())  # some file systems find no room only then


def _read(note: Path) -> Any:
    """What a note says; None if there is none that can be read."""
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _digest(model: BlockedPreTrainedModel, block: int) -> str:
    """A hash of all weights that the outputs depend on."""
    digest = hashlib.sha256()
    lower = (model.block_parameters(b) for b in range(block))  # one at a time: they may be streamed
    for name, parameter in itertools.chain(model.shared_parameters(), itertools.chain.from_iterable(lower)):
        if ".auxiliary." in name:
            continue
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
