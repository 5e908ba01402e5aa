"""The files of a blocked model on disk: one weight file per block, written atomically, verified when read.

Layout (beside ``config.json``)::

    shared.safetensors              what the blocks share (may be empty)
    block-00.safetensors, ...       one file per block
    model.safetensors.index.json    the standard transformers index; its metadata carries a SHA-256 per file

Every file is written beside its final name and renamed, the index last.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .retrying import NETWORK_ERRORS, Retries, one_line
from .strict_json import known, to_json

INDEX_NAME = "model.safetensors.index.json"
SHARED_NAME = "shared.safetensors"
_MAX_JSON_BYTES = 64 * 2**20
_BLOCK_NAME = re.compile(r"block-(\d{2,})\.safetensors")


def block_file(block: int) -> str:
    """Name of a block's weight file."""
    return f"block-{block:02d}.safetensors"


def file_of_key(key: str) -> str:
    """Weight file of a state-dict key: ``blocks.<b>.…`` lies in block b's file, everything else is shared."""
    parts = key.split(".")
    if parts[0] == "blocks" and len(parts) > 2 and parts[1].isdigit():
        return block_file(int(parts[1]))
    return SHARED_NAME


def describe_file(name: str) -> str:
    """A file's name with its block, for messages."""
    match = re.fullmatch(r"(?:block|ema|optimizer)-(\d{2,})\.\w+", name)
    return f"{name} (block {int(match.group(1))})" if match else name


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary name in the same directory, flush it to the disk and rename it to ``path``."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        # Directories and files are made with the permissions of the umask, as any other file is; mkstemp's are 0600.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def first_cause(error: BaseException) -> str:
    """What went wrong at the bottom of a chain of errors, without temporary paths: ``No space left on device``."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = re.sub(r"\s*\(os error \d+\)", "", str(error)).strip()
    # safetensors and torch wrap the system's words in their own
    known = re.search(r"No space left on device|Disk quota exceeded|Permission denied|Read-only file system", text)
    return known.group() if known else text.rstrip(".")


def remove_tree(path: Path) -> None:
    """Remove a directory so that a half-removed one is never taken for a whole one: rename first."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.removed-{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically.

    Raises:
        ValueError: naming a number in it that is NaN or infinite.
    """
    text = to_json(value, indent=2, sort_keys=True) + "\n"
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_figures(path: Path, figures: object) -> None:
    """Write figures as JSON, atomically; null stands for what is not known (NaN) or beyond a float."""
    write_json(path, known(figures))


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        ValueError: if the file is not one.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Save or download it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object. Save or download it again.")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is given twice")
    return value


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk arrives as this
            raise OSError(
                f"cannot write {path}: {first_cause(error)}. Free disk space or choose another directory."
            ) from error

    atomic_write(path, write)


def write_weights(
    directory: Path,
    state_dict: dict[str, Tensor] | Iterable[dict[str, Tensor]],
    beside: Path | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write a model's weights by block, then the index.

    Args:
        directory: where to, a directory without weights.
        state_dict: the weights; or parts of them, one after the other, each with all that goes into its files.
        beside: a saved model; the new index goes on listing its files of blocks that are not in ``state_dict``.
        max_shard_size: what a file may take, in bytes or as text such as ``5GB``.

    Raises:
        ValueError: for a file that would take more.
    """
    weight_map: dict[str, str] = {}
    digests: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for part in [state_dict] if isinstance(state_dict, dict) else state_dict:
        files: dict[str, dict[str, Tensor]] = {} if SHARED_NAME in digests else {SHARED_NAME: {}}
        for key, tensor in part.items():
            files.setdefault(file_of_key(key), {})[key] = tensor
        for name, tensors in sorted(files.items()):
            sizes[name] = sum(t.numel() * t.element_size() for t in tensors.values())
            if max_shard_size is not None:
                _check_shard_size(name, sizes[name], max_shard_size)
            write_tensors(directory / name, tensors)
            digests[name] = sha256(directory / name)
            weight_map.update(dict.fromkeys(tensors, name))
    if beside is not None and (beside / INDEX_NAME).is_file():
        old = read_index(beside / INDEX_NAME)
        keep = {f for f in set(old["weight_map"].values()) if f not in digests and (beside / f).is_file()}
        weight_map = {k: f for k, f in old["weight_map"].items() if f in keep} | weight_map
        digests = {f: v for f, v in old["metadata"].get("sha256", {}).items() if f in keep} | digests
        sizes = {f: v for f, v in old["metadata"].get("bytes", {}).items() if f in keep} | sizes
    metadata = {"sha256": digests, "bytes": sizes, "total_size": sum(sizes.values())}
    write_json(directory / INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})


def move_files(source: Path, target: Path) -> None:
    """Rename a saved model's files into a directory, the index last, over files of the same names.

    If a rename fails, those before it are undone. Block files that the new index does not list are removed.
    """
    names = sorted((p.name for p in source.iterdir()), key=lambda name: name == INDEX_NAME)
    listed = set(read_index(source / INDEX_NAME)["weight_map"].values()) | set(names)
    done = []
    try:
        for name in names:
            done.append(name)
            if (target / name).exists():
                os.replace(target / name, source / f"{name}.old")
            os.replace(source / name, target / name)
    except BaseException:
        for name in reversed(done):
            if (source / f"{name}.old").exists():
                os.replace(source / f"{name}.old", target / name)
            elif not (source / name).exists():
                (target / name).unlink(missing_ok=True)
        raise
    for path in target.iterdir():
        if _BLOCK_NAME.fullmatch(path.name) and path.name not in listed:
            path.unlink()


def read_index(path: Path) -> dict:
    """Read and check an index.

    Raises:
        ValueError: if it is not JSON, has no weight map, or names a file that is not one of a blocked model's.
    """
    try:
        index = read_json(path)
        weight_map, metadata = index["weight_map"], index["metadata"]
        well_formed = isinstance(weight_map, dict) and isinstance(metadata, dict)
        well_formed &= all(isinstance(metadata.get(kind, {}), dict) for kind in ("sha256", "bytes"))
        well_formed &= all(isinstance(digest, str) for digest in metadata.get("sha256", {}).values())
        well_formed &= all(isinstance(n, int) and 0 <= n < 2**63 for n in metadata.get("bytes", {}).values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors index ({error}). Save or download the model again.") from error
    if not well_formed:
        raise ValueError(f"{path} is not a safetensors index. Save or download the model again.")
    for key, name in weight_map.items():
        if not isinstance(name, str) or (name != SHARED_NAME and not _BLOCK_NAME.fullmatch(name)):
            raise ValueError(
                f"{path} maps {key!r} to {name!r}, which is not a file of a blocked model "
                f"({SHARED_NAME} or block-NN.safetensors)."
            )
        if name != file_of_key(key):
            raise ValueError(f"{path} maps {key!r} to {name!r}; it belongs in {file_of_key(key)!r}.")
    return index


def files_for(index: dict, blocks: Iterable[int] | None) -> list[str]:
    """The files that hold the given blocks (all, if None) and the shared parts.

    Raises:
        ValueError: if the index knows no weights of a block.
    """
    present = set(index["weight_map"].values())
    if blocks is None:
        return sorted(present)
    for block in blocks:
        if block_file(block) not in present:
            raise ValueError(
                f"the index has no weights of block {block}: it holds "
                f"{', '.join(describe_file(name) for name in sorted(present)) or 'nothing'}."
            )
    return sorted(({block_file(b) for b in blocks} | {SHARED_NAME}) & present)


class FileFinder:
    """Finds a file of a model in a directory or on the Hub."""

    def __init__(self, name_or_path: str | os.PathLike, hub_kwargs: dict):
        self.root, self.kwargs = Path(name_or_path), hub_kwargs
        self.name = str(name_or_path)

    def __call__(self, name: str) -> Path:
        if self.root.is_dir():
            path = self.root / self.kwargs.get("subfolder", "") / name
            if not path.is_file():
                if name == INDEX_NAME and (path.parent / "model.safetensors").is_file():
                    raise ValueError(
                        f"{path.parent} holds a model that is not cut into blocks: cut it with from_base(), or with "
                        "`diffusionblocks convert`."
                    )
                raise ValueError(
                    f"{describe_file(name)} is missing from {path.parent}. "
                    "Copy or download it again, or load other blocks with blocks=[…]."
                )
            return path
        if self.root.is_absolute() or self.name.startswith("."):
            raise ValueError(f"{self.name} is not a directory. Give a saved model's directory or a Hub id.")
        try:
            from transformers.utils import cached_file

            return Path(Retries(failures=3).call(cached_file, self.name, name, **self.kwargs))
        except NETWORK_ERRORS as error:
            raise OSError(f"cannot get {describe_file(name)} of {self.name}: {one_line(error)}") from error


def _check_shard_size(name: str, size: int, limit: int | str) -> None:
    """Raise a ``ValueError`` if a weight file is larger than ``limit``: bytes, or text such as ``5GB``."""
    from accelerate.utils.modeling import convert_file_size_to_int

    if size > convert_file_size_to_int(limit):
        raise ValueError(
            f"max_shard_size={limit!r}, and {describe_file(name)} takes {size:,} bytes: a block lies in "
            "one file. Leave max_shard_size out, or cut the model into more blocks."
        )


def verify_file(path: Path, index: dict) -> None:
    """Check that a weight file is there, whole, and has the content that the index promises.

    Raises:
        ValueError: naming the file and its block.
    """
    name = describe_file(path.name)
    if not path.is_file():
        raise ValueError(f"{name} is missing from {path.parent}. Copy or download it again.")
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} in {path.parent} is truncated or corrupted ({error}). Download it again.") from error
    wanted = {key for key, file_name in index["weight_map"].items() if file_name == path.name}
    if not wanted <= keys:
        raise ValueError(f"{name} in {path.parent} lacks {sorted(wanted - keys)[0]!r}, which the index promises.")
    digest = index["metadata"].get("sha256", {}).get(path.name)
    if digest is not None and sha256(path) != digest:
        raise ValueError(
            f"{name} in {path.parent} is corrupted: its SHA-256 is not the one in {INDEX_NAME}. Download it again."
        )


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file, with a clear error if it is missing or broken."""
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{describe_file(path.name)} in {path.parent} cannot be read ({error}).") from error


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors hold, each storage element counted once."""
    seen: dict[int, int] = {}
    for tensor in tensors:
        if tensor.device.type == "meta":
            seen[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            seen[tensor.data_ptr() if tensor.numel() else id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts are bitwise equal."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
