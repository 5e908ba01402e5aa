"""Image folders: what ``datasets`` makes of a directory of images, where that is not what was meant.

``datasets`` takes the folders that images lie in for their classes. It gives no labels where there is one class only,
takes ``train`` and ``test`` for classes where no class folders are below them, and reads a directory in which most
files are text as text.
"""

from pathlib import Path
from typing import Any

from PIL import Image

_SPLITS = {"train", "training", "test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev"}
_EXAMPLE = "give each class a folder, such as train/cat/1.png and train/dog/2.png, all at the same depth."


def load_directory(name: str, *, split: str, **loading: Any) -> Any:
    """A directory's data set as ``datasets.load_dataset`` makes it; of an image folder, with images and labels.

    Args:
        name: the directory.
        split: of the data set.
        **loading: other arguments of ``datasets.load_dataset``.

    Raises:
        ValueError: if the images are in no class folders, or at different depths; and as ``datasets.load_dataset``.
    """
    import datasets

    images = {"split": split, "data_dir": name, **loading}
    try:
        dataset = datasets.load_dataset(name, split=split, **loading)
    except ValueError as error:  # one split has more files of text than images
        if "data file format" not in str(error) or not _holds_images(name):
            raise
        dataset = datasets.load_dataset("imagefolder", **images)
    if dataset.info.builder_name in ("text", "json", "csv") and not _has_images(dataset) and _holds_images(name):
        dataset = datasets.load_dataset("imagefolder", **images)
    if dataset.info.builder_name != "imagefolder":
        return dataset
    if set(dataset.features) == {"image"}:
        dataset = datasets.load_dataset("imagefolder", drop_labels=False, **images)
        names = dataset.features["label"].names
        if len(names) > 1:
            raise ValueError(f"the images in {name} lie at different depths, in {_some(names)}: {_EXAMPLE}")
    names = getattr(dataset.features.get("label"), "names", None)
    if names and len(names) > 1 and set(names) <= _SPLITS:
        raise ValueError(f"the images in {name} lie in {_some(names)} themselves, which are no classes: {_EXAMPLE}")
    return dataset


def _has_images(dataset: Any) -> bool:
    import datasets

    return any(isinstance(feature, datasets.Image) for feature in (dataset.features or {}).values())


def _holds_images(name: str) -> bool:
    known = Image.registered_extensions()
    return any(file.suffix.lower() in known for file in Path(name).rglob("*"))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
