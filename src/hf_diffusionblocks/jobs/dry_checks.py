"""What a dry run looks at: small data on this machine, loaded as ``train`` loads them; of a large folder, a part.

Data on the Hub, and large files, are left to the run: a dry run takes seconds.
"""

import glob
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..modeling import BlockedPreTrainedModel
from ..recipes import Recipe
from .run import Run

SMALL_TEXT = 4 << 20  # bytes
SMALL_IMAGES = 32 << 20  # bytes, of compressed files
_FOLDERS = 200  # of a large folder of images


def check_data(run: Run, model: BlockedPreTrainedModel) -> list[str]:
    """Refuse what a run would refuse of its data, where that is quickly seen.

    Args:
        run: that is planned; small data are loaded into it.
        model: of the run, without values.

    Returns:
        The lines that the run says of its data; none if they were not loaded.

    Raises:
        ValueError: for data that the run refuses.
    """
    recipe = run.recipe
    files = _local_files(recipe)
    if files is None or getattr(recipe.sampling, "vae", None):
        return []
    left = SMALL_TEXT if recipe.kind.has_text else SMALL_IMAGES
    for file in files:
        left -= file.stat().st_size
        if left < 0:
            if not recipe.kind.has_text:
                _open_some(Path(os.path.expanduser(recipe.data.name)))
            return []
    run.recipe = replace(recipe, training=recipe.training | {"disable_tqdm": True})
    run.load()
    run.check(model)
    return run.data_lines(model)


def _local_files(recipe: Recipe) -> Iterator[Path] | None:
    """The files on this machine that a recipe's data are read from; None if they are elsewhere, or built in."""
    data: Any = recipe.data
    if getattr(data, "data_files", None) or getattr(data, "train_files", None):
        return None
    names = data.name if isinstance(data.name, (list, tuple)) else [data.name]
    named = [os.path.expanduser(name) for name in names if isinstance(name, str)]
    places = [Path(p) for name in named for p in ([name] if os.path.exists(name) else glob.glob(name, recursive=True))]
    return (file for place in places for file in _files(place)) if places else None


def _files(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
    for folder, _, names in os.walk(place):
        yield from (Path(folder, name) for name in names if os.path.isfile(os.path.join(folder, name)))


def _open_some(place: Path) -> None:
    """Open the first image of each folder; ValueError for one that cannot be read."""
    known, opened = Image.registered_extensions(), 0
    for folder, _, names in os.walk(place):
        first = min((name for name in names if Path(name).suffix.lower() in known), default=None)
        if first is None:
            continue
        file, opened = Path(folder, first), opened + 1
        try:
            with Image.open(file) as image:
                image.load()
        except Exception as error:  # each of PIL's codecs has errors of its own
            raise ValueError(f"the image {file} cannot be read: {error}. Remove or replace it.") from error
        if opened == _FOLDERS:
            return
