"""Which recipe fits the data that a user has: a folder of images, or text."""

import codecs
import json
import re
from collections import Counter
from pathlib import Path

from PIL import Image

_TEXT = (".txt", ".md", ".text", ".rst", ".tex")
LEAST_SCORED = 4  # fewer images are not compared with others
SCORED_ON_TRAINING = "data.test_split=train"  # where so few images are there that none are held out
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
        return "austen-llama", [named, *_text_settings(place, [place])]
    images = Image.registered_extensions()
    files = [f for f in place.rglob("*") if f.is_file() and not f.name.startswith(".")]
    pictures = [f for f in files if f.suffix.lower() in images]
    if pictures and len(pictures) >= sum(f.suffix.lower() in _TEXT for f in files):
        return "folder-dit", [named, _run_of(place), *_folder_settings(place, pictures)]
    if texts := sorted(f for f in files if f.suffix.lower() in _TEXT):
        return "austen-llama", [named, *_text_settings(place, texts)]
    raise ValueError(
        f"--data {path} holds {len(files)} files, none of which is an image or text ({', '.join(_TEXT)}): give images "
        "in a folder per class, or text in UTF-8."
    )


def _run_of(place: Path) -> str:
    """A run directory named after the data, so that two data sets do not share one."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", place.resolve().stem).strip("-.")
    return f"training.output_dir=runs/{name or 'own-data'}"


def _text_settings(place: Path, files: list[Path]) -> list[str]:
    """The run directory; and how the text begins, as the prompt of samples: a tokenizer of it knows the characters."""
    with files[0].open("rb") as file:
        begin = _beginning(file.read(400)).split()
    prompt = " ".join(begin[:3])[:40]
    return [_run_of(place), *([f"sampling.prompts={json.dumps([prompt + ' '])}"] if prompt else [])]


def _beginning(data: bytes) -> str:
    """The text that a file begins with; none if it is not UTF-8, or binary."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data)  # the last character may be cut
    except UnicodeDecodeError:
        return ""
    return "" if "\0" in text else text.removeprefix("\ufeff")


def _folder_settings(place: Path, pictures: list[Path]) -> list[str]:
    """Number of classes, and what to score on where there is no folder of it: a share of each class."""
    splits = {f.relative_to(place).parts[0].lower() for f in pictures if len(f.relative_to(place).parts) > 2}
    root = next((place / f for f in sorted(p.name for p in place.iterdir()) if f.lower() in _TRAIN), place)
    below = [f.relative_to(root).parts for f in pictures if root in f.parents]
    counts = Counter(parts[0] for parts in below if len(parts) > 1)
    classes = set(counts)
    settings = [f"model.num_embeds_ada_norm={max(1, len(classes))}"]
    if not splits & set(_TEST):
        sizes = list(counts.values()) or [len(below)]
        held = {share: sum(max(int(n * share), n >= 5) for n in sizes) for share in (0.1, 0.25)}
        shares = [share for share, count in held.items() if count >= LEAST_SCORED]
        if len(sizes) == 1 and held[0.25]:  # of one class no samples are compared: any image held out will do
            shares.append(0.25)
        share = shares[0] if shares else None
        settings.append(SCORED_ON_TRAINING if share is None else f"data.test_fraction={share}")
    return settings
