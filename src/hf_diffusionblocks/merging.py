"""One checkpoint out of jobs that trained one block each.

Blocks are trained independently (arXiv 2506.14202, section 3), so a job of its own may train each: it saves its block,
what the blocks share and the same config. Put together, they are, bit for bit, what one
process that trained all blocks with the same seed would have saved: a block's initial weights, its data and its noise
follow from the seed and the block's number alone.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

from . import serialization
from .agreement import first_difference
from .auto_classes import CONFIGS
from .config_checks import check_model_type
from .configuration import DiffusionBlocksConfig
from .repository.block_table import CARD_NAME
from .repository.saved_model import SavedModel
from .serialization import INDEX_NAME, SHARED_NAME, block_file
from .units import human_bytes
from .weight_headers import check_shapes, payload_bytes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # the check of platforms is by hand

_POLL_SECONDS = 2.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Part(SavedModel):
    """A saved model of some blocks, to be merged with others."""

    def files(self) -> list[str]:
        """Names of its weight files; that of the shared parts may hold nothing, and the index then not name it."""
        present = [SHARED_NAME] if (self.directory / SHARED_NAME).is_file() else []
        return sorted({*present, *self.index["weight_map"].values()})


class BlocksMissingError(ValueError):
    """Blocks that no directory holds, or a directory without a model yet: waiting may help."""


def merge_blocks(
    directories: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    *,
    wait: float | int = 0,
    dry_run: bool = False,
    say: Say = lambda line: None,
    finish: Callable[[Path, list[Part]], None] = lambda directory, parts: None,
) -> Path:
    """Make one checkpoint of all blocks out of directories that hold some each.

    Every file is checked against its SHA-256. The directory appears complete or not at all; the sources stay as they
    are. A block may lie in several directories (a job of a cascade also holds the blocks below its own) if its files
    are the same. Files beside the weights are taken over; they too must agree, except for the model cards: that of a
    part with all blocks is kept.

    Args:
        directories: what ``save_pretrained`` or ``diffusionblocks train --block b`` wrote; a run's directory stands for
            the ``model`` in it.
        output_dir: a new or empty directory.
        wait: seconds to wait for directories or blocks that are not there yet.
        dry_run: check everything, say what would be written, and write nothing.
        say: gets a line for each block, and for what is waited for.
        finish: is called with the directory before it appears, and the parts: it may write more beside the weights.

    Returns:
        The output directory.

    Raises:
        BlocksMissingError: a ``ValueError`` that names the blocks that nobody holds, or the directory without a model.
        ValueError: if configs, edges, the base's weights, shared parts or copies of a block differ, or a file is
            broken; says what differs and where.
        OSError: if the disk is full; nothing half written stays.
    """
    places = [Path(d) for d in directories]
    if not places:
        raise ValueError("no directory to merge: give those that the jobs saved their blocks in.")
    target = Path(output_dir)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{target} is not an empty directory: give a new one for the merged model.")
    parts, owners = _wait_for(places, wait, say)
    first = parts[0]
    _check_shared(parts)
    for part in parts:
        for name in part.files():
            serialization.verify_file(part.directory / name, part.index)
    sources = {block_file(b): part for b, part in owners.items()}
    holder = next((part for part in parts if (part.directory / SHARED_NAME).is_file()), None)
    if holder is not None:
        sources[SHARED_NAME] = holder
    _check_complete(first, sources)
    companions = _companions(parts)
    for block, part in sorted(owners.items()):
        say(f"block {block}: {part.directory} (sha256 {part.digest(block_file(block))[:12]})")
    if dry_run:
        files = [part.directory / name for name, part in sources.items()] + list(companions.values())
        size = human_bytes(sum(path.stat().st_size for path in files))
        say(f"dry run: would write {len(files)} files of {size} to {target}; nothing was written.")
        return target

    staging = target.with_name(f".{target.name}.merging")
    shutil.rmtree(staging, ignore_errors=True)  # of a merge that was killed
    try:
        staging.mkdir(parents=True)
        for name, source in companions.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(source, staging / name)
        for name, part in sources.items():
            _copy(part.directory / name, staging / name)
        serialization.write_json(staging / "config.json", _merged_config(parts))
        index = _merged_index(sources)
        for name in sources:
            serialization.verify_file(staging / name, index)
        serialization.write_json(staging / INDEX_NAME, index)
        finish(staging, parts)
        if target.is_dir():
            target.rmdir()
        os.replace(staging, target)
    except OSError as error:
        raise OSError(f"cannot write {target}: {error}. The directories to merge are untouched.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def merge_run(output_dir: Path, say: Say = lambda line: None) -> Path | None:
    """Merge what the processes of a run have saved, in ``model`` beside them, if all blocks are there.

    Every process calls it when it has saved its own; one at a time, so that the last one finds all of them. A model
    that is there was merged by another process of the same run: the trainer removes an earlier one when it starts.

    Returns:
        The merged model's directory if this process made it; None, and ``say`` gets to know why, otherwise.
    """
    jobs = [path for path in sorted(output_dir.glob("blocks-[0-9]*")) if path.is_dir()]
    target = output_dir / "model"
    staging = output_dir / ".model.merged"
    with _locked(output_dir / ".merge.lock"):
        shutil.rmtree(staging, ignore_errors=True)  # of a merge that was killed
        if target.exists():
            say(f"another process merged the blocks in {target}.")
            return None
        try:
            merge_blocks(jobs, staging)
        except BlocksMissingError as error:
            say(f"not merged yet: {error} The last job to end merges them; or: diffusionblocks merge.")
            return None
        os.replace(staging, target)
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. The lock ends with the process that has it."""
    with open(path, "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- reading ------------------------------------------------------------------------------------------------------


def _wait_for(directories: list[Path], wait: float | int, say: Say) -> tuple[list[Part], dict[int, Part]]:
    """The parts, and who holds each block, as soon as all blocks are there."""
    if not wait >= 0:
        raise ValueError(f"wait={wait} must be a number of seconds that is not negative.")
    deadline, told = time.monotonic() + wait, None
    while True:
        try:
            parts = [read_part(directory) for directory in directories]
            return parts, _owners(parts)
        except BlocksMissingError as error:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            if str(error) != told:
                told = str(error)
                say(f"waiting: {told}")
            time.sleep(min(_POLL_SECONDS, left))


def read_part(directory: Path) -> Part:
    """Read the config and index of a saved model, or of the ``model`` in a run's directory.

    Raises:
        BlocksMissingError: if there is none.
        ValueError: if they are broken or not a blocked model's.
    """
    for place in (directory, directory / "model"):
        if (place / INDEX_NAME).is_file() and (place / "config.json").is_file():
            break
    else:
        raise BlocksMissingError(
            f"{directory} holds no saved model (config.json and {INDEX_NAME}): its job has not finished, or it is "
            "another directory."
        )
    config = serialization.read_json(place / "config.json")
    index = serialization.read_index(place / INDEX_NAME)
    count = _config_of(config, place).num_blocks
    present = {block_file(b): b for b in range(count)}
    blocks = []
    for name in sorted(set(index["weight_map"].values()) - {SHARED_NAME}):
        if name not in present:
            raise ValueError(f"{place} has {name}, but its config has blocks 0 to {count - 1} only.")
        blocks.append(present[name])
    return Part(place, config, index, tuple(blocks))


def _config_of(values: dict[str, Any], place: Path) -> DiffusionBlocksConfig:
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        check_model_type(kind, place / "config.json", CONFIGS)
    try:
        # auto_map names code of a repository, which is never run
        config = AutoConfig.for_model(**{k: v for k, v in values.items() if k != "auto_map"})
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{place / 'config.json'} is not a blocked model's: {error}") from error
    if not isinstance(config, DiffusionBlocksConfig):
        raise ValueError(
            f"{place / 'config.json'} describes a model of type {config.model_type!r}, which has no blocks to merge."
        )
    return config


# -- checks -------------------------------------------------------------------------------------------------------


def _owners(parts: list[Part]) -> dict[int, Part]:
    """Who holds each block; configs and copies of a block agree."""
    first = parts[0]
    owners: dict[int, Part] = {}
    for part in parts:
        difference = first_difference(first.config, part.config)
        if difference is not None:
            name, theirs, ours = difference
            raise ValueError(
                f"{first.directory} and {part.directory} hold blocks of different models: {name} is {theirs!r} in the "
                f"first and {ours!r} in the second. Train all blocks with the same settings and base."
            )
        for block in part.blocks:
            other = owners.setdefault(block, part)
            name = block_file(block)
            if other.digest(name) != part.digest(name):
                raise ValueError(
                    f"block {block} is given twice and differs: {other.directory / name} and {part.directory / name}. "
                    "Leave one of them out."
                )
    count = first.config["num_blocks"]
    missing = [b for b in range(count) if b not in owners]
    if missing:
        held = "; ".join(f"{part.directory}: {list(part.blocks)}" for part in parts)
        raise BlocksMissingError(f"blocks {missing} of {count} are missing. Given: {held}.")
    return owners


def _check_shared(parts: list[Part]) -> None:
    """What the blocks share must be the same everywhere."""
    holders = [part for part in parts if (part.directory / SHARED_NAME).is_file()]
    for part in holders[1:]:
        first = holders[0]
        if first.digest(SHARED_NAME) == part.digest(SHARED_NAME):
            continue
        a, b = (serialization.read_tensors(p.directory / SHARED_NAME) for p in (first, part))
        names = [k for k in sorted(a.keys() | b.keys()) if k not in a or k not in b or not torch.equal(a[k], b[k])]
        what = f"their {names[0]!r} differs" if names else "their bytes differ"
        raise ValueError(
            f"{first.directory / SHARED_NAME} and {part.directory / SHARED_NAME} do not agree: {what}. Blocks of one "
            "model need the same shared parts: start all jobs from the same base or seed, with train_shared='none' "
            "(in a cascade, start each job from the blocks below it)."
        )


def _check_complete(part: Part, sources: dict[str, Part]) -> None:
    """Names and shapes in the files are those of the model that the config describes."""
    with torch.device("meta"):
        model = AutoModel.from_config(_config_of(part.config, part.directory))
    for name, source in sources.items():
        shapes = {
            key: tuple(t.shape) for key, t in model.state_dict().items() if serialization.file_of_key(key) == name
        }
        check_shapes(source.directory / name, shapes)


def _companions(parts: list[Part]) -> dict[str, Path]:
    """Files beside the weights, by relative name."""
    found: dict[str, Path] = {}
    for part in parts:
        for name, path in part.companions():
            other = found.setdefault(name, path)
            if serialization.sha256(other) != serialization.sha256(path):
                raise ValueError(
                    f"{other} and {path} differ. Make them the same, or remove those that do not belong to the model."
                )
    whole = whole_part(parts)
    if whole is not None and (whole.directory / CARD_NAME).is_file():
        found[CARD_NAME] = whole.directory / CARD_NAME
    return found


def whole_part(parts: list[Part]) -> Part | None:
    """A part that holds all blocks, if there is one: the merged model is the same, bit for bit."""
    return next((part for part in parts if len(part.blocks) == part.config["num_blocks"]), None)


# -- writing ------------------------------------------------------------------------------------------------------


def _copy(source: Path, target: Path) -> None:
    serialization.atomic_write(target, lambda temporary: shutil.copyfile(source, temporary))


def _merged_config(parts: list[Part]) -> dict[str, Any]:
    config = dict(parts[0].config)
    if "trained_blocks" in config:
        config["trained_blocks"] = sorted({b for part in parts for b in part.config.get("trained_blocks") or []})
    return config


def _merged_index(sources: dict[str, Part]) -> dict[str, Any]:
    index: dict[str, Any] = {"metadata": {"sha256": {}, "bytes": {}}, "weight_map": {}}
    for name, part in sources.items():
        index["weight_map"] |= {k: f for k, f in part.index["weight_map"].items() if f == name}
        index["metadata"]["sha256"][name] = part.digest(name)
        index["metadata"]["bytes"][name] = payload_bytes(part.directory / name)
    index["metadata"]["total_size"] = sum(index["metadata"]["bytes"].values())
    return index
