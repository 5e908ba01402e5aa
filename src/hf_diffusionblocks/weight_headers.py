"""What a weight file says of itself in its header: names and shapes, read and checked before anything is allocated."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .serialization import describe_file


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, by name.

    Raises:
        ValueError: if the file is truncated or not one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{describe_file(path.name)} in {path.parent} is truncated or corrupted ({error}). Download it again."
        ) from error


def payload_bytes(path: Path) -> int:
    """Bytes of all tensors in a safetensors file: its size less the header's and the 8 that tell the header's."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def check_shapes(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that a weight file holds these tensors in these shapes.

    Args:
        path: the file.
        shapes: what the model expects of it, by name.

    Raises:
        ValueError: naming the file, its block and the first tensor that is missing or has another shape.
    """
    found = read_shapes(path)
    name = f"{describe_file(path.name)} in {path.parent}"
    missing = sorted(key for key in shapes if key not in found)
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights of the model, {missing[0]!r} first.")
    for key, shape in sorted(shapes.items()):
        if found[key] != tuple(shape):
            raise ValueError(
                f"{name} holds {key!r} in shape {list(found[key])}, but config.json describes a model in which it has "
                f"shape {list(shape)}. Config and weights belong to different models: download both again."
            )
