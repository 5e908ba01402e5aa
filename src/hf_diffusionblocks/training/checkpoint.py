"""Checkpoints of a run: written whole or not at all, checked before anything is loaded.

A checkpoint is a directory ``checkpoint-<iteration>``: the model by block (loadable with ``from_pretrained``), one
``ema-NN.safetensors`` and ``optimizer-NN.pt`` per block, and ``trainer_state.json`` with counters, the identity of the
run and a SHA-256 of every file and of itself. It is written under another name and renamed.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import serialization
from ..adapter_checks import adapter_settings
from ..agreement import HISTORY
from ..modeling import BlockedPreTrainedModel
from ..serialization import remove_tree
from .arguments import DiffusionBlocksTrainingArguments
from .block_trainer import BlockTrainer
from .data_stream import data_fingerprint
from .parallel import Group, as_sharded
from .residency import Residency

STATE_NAME = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_STAGING = re.compile(r"\.(checkpoint-\d+\.(writing|removed-\d+))")


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first. Half-written ones have other names."""
    if not output_dir.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in output_dir.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found) if (path / STATE_NAME).is_file()]


def chosen_checkpoint(output_dir: Path, resume: str | os.PathLike | bool | None) -> Path | None:
    """The checkpoint to go on from: the newest for True, a directory by its name, or None to start anew."""
    if resume is True:
        found = find_checkpoints(output_dir)
        return found[-1] if found else None
    return Path(resume) if resume else None


def clean_staging(output_dir: Path) -> None:
    """Remove what an interrupted write left behind."""
    if output_dir.is_dir():
        for path in output_dir.iterdir():
            if _STAGING.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def write_checkpoint(
    output_dir: Path,
    iteration: int,
    model: BlockedPreTrainedModel,
    trainers: dict[int, BlockTrainer],
    identity: dict[str, Any],
    keep: int | None,
    residency: Residency | None = None,
    group: Group | None = None,
    seconds: float = 0.0,
) -> Path:
    """Write a checkpoint, block by block, then remove the oldest beyond ``keep``.

    All processes of a group call it, and its leader writes. What is sharded is gathered first. ``seconds`` is how long
    the updates took that it holds.

    Raises:
        OSError: if it cannot be written (a full disk, say); earlier checkpoints stay.
    """
    group = group or Group(list(trainers))
    target = output_dir / f"checkpoint-{iteration}"
    weights = group.gathered(model)
    states = {b: (t.ema_tensors(), t.tensors()) for b, t in trainers.items()} if group.sharded else {}
    failure = None
    if group.is_leader:
        try:
            counters = {"iteration": iteration, "training_seconds": seconds, "identity": identity}
            _write(output_dir, target, counters, model, trainers, residency, weights, states)
        except OSError as error:
            failure = error
    failed = group.any(failure is not None)[0]
    if failure is not None:
        raise failure
    if failed:
        raise OSError(f"cannot write {target}: the process that writes it has said why.")
    if keep is not None and group.is_leader:
        for old in find_checkpoints(output_dir)[:-keep]:
            remove_tree(old)
    return target


def _write(
    output_dir: Path,
    target: Path,
    counters: dict[str, Any],
    model: BlockedPreTrainedModel,
    trainers: dict[int, BlockTrainer],
    residency: Residency | None,
    weights: dict[str, Tensor] | None,
    states: dict[int, tuple[dict[str, Tensor], dict[str, Any]]],
) -> None:
    """Write a checkpoint; ``weights`` and ``states`` are those of the model and of blocks where they were gathered."""
    staging = output_dir / f".{target.name}.writing"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        with contextlib.nullcontext(_nothing) if residency is None else residency.reading() as have:
            model.save_files(staging, weights)
            for block, trainer in trainers.items():
                have(block)
                ema, optimizer = states.get(block) or (trainer.ema_tensors(), trainer.tensors())
                serialization.write_tensors(staging / f"ema-{block:02d}.safetensors", ema)
                path = staging / f"optimizer-{block:02d}.pt"
                with open(path, "wb") as file:
                    torch.save(optimizer, file)
                    file.flush()
                    os.fsync(file.fileno())
                del ema, optimizer
        files = {p.name: serialization.sha256(p) for p in sorted(staging.iterdir())}
        state = {
            **counters,
            "blocks": {str(block): trainer.scalars() for block, trainer in trainers.items()},
            "files": files,
        }
        serialization.write_json(staging / STATE_NAME, state | {"sha256": _digest(state)})
        remove_tree(target)
        os.replace(staging, target)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(staging, ignore_errors=True)
        raise OSError(
            f"cannot write {target}: {serialization.first_cause(error)}. Earlier checkpoints are untouched; free disk "
            "space and start the same command again to go on from the last one."
        ) from error


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's counters and identity, after checking that every file is there and whole.

    Raises:
        ValueError: naming the file, with its block.
    """
    path = checkpoint / STATE_NAME
    if not path.is_file():
        raise ValueError(f"{checkpoint} is not a checkpoint: it has no {STATE_NAME}.")
    advice = f"Remove {checkpoint} and {_older(checkpoint)}"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        digest = state.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is corrupted ({error!r}). {advice}") from error
    if digest != _digest(state):
        raise ValueError(f"{path} is corrupted: its SHA-256 is not the recorded one. {advice}")
    well_formed = all(isinstance(state.get(k), dict) for k in ("files", "blocks", "identity"))
    state.setdefault("training_seconds", 0.0)  # checkpoints of earlier versions do not say
    if not well_formed or not isinstance(state.get("iteration"), int):
        raise ValueError(f"{path} is corrupted: it lacks files, blocks, identity or iteration. {advice}")
    for name, digest in state["files"].items():
        file = checkpoint / Path(name).name
        problem = None
        if not file.is_file():
            problem = "is missing"
        elif serialization.sha256(file) != digest:
            problem = "is truncated or corrupted: its SHA-256 is not the recorded one"
        if problem:
            named = serialization.describe_file(name)
            raise ValueError(f"{named} in {checkpoint} {problem}. {advice}")
    return state


def _older(checkpoint: Path) -> str:
    """What to do without a checkpoint that is broken: the newest whole one before it."""
    for other in reversed(find_checkpoints(checkpoint.parent)):
        if other.name != checkpoint.name and int(other.name.split("-")[1]) < int(checkpoint.name.split("-")[1]):
            try:
                read_state(other)
            except ValueError:
                continue
            return f"resume from the newest whole one before it, {other}."
    return "start anew: no older one is whole."


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(json.loads(json.dumps(state)), sort_keys=True).encode()).hexdigest()


def last_good(directory: Path, save_steps: int) -> str:
    """A sentence on the last checkpoint of a run, for the error that ends it."""
    found = find_checkpoints(directory)
    if found:
        return f"The last good checkpoint is {found[-1]}."
    return f"No checkpoint had been written (save_steps={save_steps}; give a smaller one to have some)."


def run_identity(
    model: BlockedPreTrainedModel, args: DiffusionBlocksTrainingArguments, dataset: Any, processes: int
) -> dict[str, Any]:
    """What a checkpoint must agree on to be resumed: model and its adapters, settings, data.

    Args:
        model: to train.
        args: of the run.
        dataset: to train on.
        processes: that share a block.
    """
    changing = (*HISTORY, "architectures", "dtype")
    config = {k: v for k, v in model.config.to_dict().items() if k not in changing}
    settings = args.identity()
    data = {"num_samples": len(dataset), "fingerprint": data_fingerprint(dataset)}
    if processes > 1:
        settings["processes_per_block"] = processes
    adapters = adapter_settings(model.blocks)
    config = json.loads(json.dumps(config, default=str))
    return {"model": config, "adapters": adapters, "settings": settings, "data set": data}


def check_identity(saved: dict[str, Any], current: dict[str, Any], checkpoint: Path) -> None:
    """Raise a ``ValueError`` naming what differs between a checkpoint's run and the current one."""
    for group, values in current.items():
        differing = _differences(json.loads(json.dumps(saved.get(group, {}))), json.loads(json.dumps(values)))
        if differing:
            old, new = (", ".join(f"{name}={pair[i]!r}" for name, pair in differing.items()) for i in (0, 1))
            raise ValueError(
                f"{checkpoint} belongs to another run: its {group} has {old}, this one {new}. "
                "Use the same settings to resume, or another output_dir (or --overwrite) to start anew."
            )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Entries that differ, with both values; of dicts within, only their own entries that differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted(old.keys() | new.keys()):
        theirs, ours = old.get(name), new.get(name)
        if isinstance(theirs, dict) and isinstance(ours, dict):
            found |= {f"{name}.{key}": pair for key, pair in _differences(theirs, ours).items()}
        elif theirs != ours:
            found[name] = (theirs, ours)
    return found


def load_checkpoint(
    checkpoint: Path,
    state: dict[str, Any],
    model: BlockedPreTrainedModel,
    trainers: dict[int, BlockTrainer],
    residency: Residency | None = None,
) -> None:
    """Load weights, averages, moments and counters into a model and its block trainers."""
    device = next(model.parameters()).device
    saved = sorted(int(block) for block in state["blocks"])
    if saved != sorted(trainers):
        raise ValueError(
            f"{checkpoint} belongs to a run that trains blocks {saved}; this one trains {sorted(trainers)}. "
            "Train the same blocks to resume, or use another output_dir."
        )
    streamed = model.streamer is not None
    shared = serialization.read_tensors(checkpoint / serialization.SHARED_NAME)
    model.load_state_dict(shared, strict=False)
    for block, trainer in trainers.items():
        if residency is not None:
            residency.pin(block)
        weights = serialization.read_tensors(checkpoint / serialization.block_file(block))
        prefix = f"blocks.{block}."
        now = model.block(block).state_dict()
        weights = {k.removeprefix(prefix): v for k, v in weights.items()}
        _check_same_weights(weights, now, checkpoint, block)
        model.block(block).load_state_dict({k: as_sharded(v, now.get(k, v)) for k, v in weights.items()})
        del weights, now
        path = checkpoint / f"optimizer-{block:02d}.pt"
        try:
            optimizer = torch.load(path, map_location=device, weights_only=True, mmap=streamed)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            named = serialization.describe_file(path.name)
            raise ValueError(
                f"{named} in {checkpoint} cannot be read: it is broken, or holds more than tensors and numbers. "
                f"Remove {checkpoint} and {_older(checkpoint)}"
            ) from error
        ema = serialization.read_tensors(checkpoint / f"ema-{block:02d}.safetensors")
        trainer.load(optimizer, state["blocks"][str(block)], ema)
        del optimizer, ema
    if residency is not None:
        residency.release()


def _check_same_weights(saved: dict[str, Tensor], now: dict[str, Tensor], checkpoint: Path, block: int) -> None:
    """Raise a ``ValueError`` if a block's weights have other names or shapes than in a checkpoint."""
    theirs, ours = ({k: list(t.shape) for k, t in part.items()} for part in (saved, now))
    if theirs != ours:
        odd = next(k for k in sorted(theirs.keys() | ours.keys()) if theirs.get(k) != ours.get(k))
        raise ValueError(
            f"{checkpoint} belongs to another run: block {block} has {odd!r} of shape {theirs.get(odd)} there and "
            f"{ours.get(odd)} here. Put the same adapters on the blocks to resume, or use another output_dir."
        )


def _nothing(block: int) -> None:
    """Everything is there already."""
