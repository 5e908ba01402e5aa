"""Which recipe fits the data that a user has: a folder of images, or text."""

import json
from pathlib import Path

from PIL import Image

_TEXT = (".txt", ".md", ".text", ".rst", ".tex")
_TRAIN = ("train", "training")
_TEST = ("test", "testing", "eval", "validation", "valid", "val", "dev")


def recipe_for(path: str) -> tuple[str, list[str]]:
    """A recipe's name and the overrides that make it one for a path.

    Args:
        path: a directory with a folder of images per class, perhaps below ``train`` and ``test``; a file of text, or a
            directory of such files.

    Raises:
        ValueError: if there is nothing there, or nothing that can be told to be images or text.
    """
    place = Path(path)
    if not place.exists():
        raise ValueError(f"--data {path}: there is no such file or directory.")
    named = f"data.name={json.dumps(path)}"
    if place.is_file():
        if place.suffix.lower() in (".parquet", ".json", ".jsonl", ".csv", ".arrow"):
            raise ValueError(
                f"--data {path} may hold images or text: name the recipe, such as `train folder-dit --data {path}` or "
                f"`train austen-llama --data {path}`."
            )
        return "austen-llama", [named]
    images = Image.registered_extensions()
    files = [f for f in place.rglob("*") if f.is_file() and not f.name.startswith(".")]
    pictures = [f for f in files if f.suffix.lower() in images]
    if pictures and len(pictures) >= sum(f.suffix.lower() in _TEXT for f in files):
        return "folder-dit", [named, *_folder_settings(place, pictures)]
    if any(f.suffix.lower() in _TEXT for f in files):
        return "austen-llama", [named]
    raise ValueError(
        f"--data {path} holds {len(files)} files, none of which is an image or text ({', '.join(_TEXT)}): give images "
        "in a folder per class, or text in UTF-8."
    )


def _folder_settings(place: Path, pictures: list[Path]) -> list[str]:
    """Number of classes, and what to score on where nothing is held out."""
    splits = {f.relative_to(place).parts[0].lower() for f in pictures if len(f.relative_to(place).parts) > 2}
    root = next((place / f for f in sorted(p.name for p in place.iterdir()) if f.lower() in _TRAIN), place)
    below = [f.relative_to(root).parts for f in pictures if root in f.parents]
    classes = {parts[0] for parts in below if len(parts) > 1}
    settings = [f"model.num_embeds_ada_norm={max(1, len(classes))}"]
    if not splits & set(_TEST):
        settings.append("data.test_split=train")
    return settings
