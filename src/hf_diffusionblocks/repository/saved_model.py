"""A saved model as its files: config, index, weights, and what lies beside them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import serialization
from ..run_names import RECIPE_NAME
from ..serialization import INDEX_NAME, SHARED_NAME
from .block_table import CARD_NAME


@dataclass(frozen=True)
class SavedModel:
    """A saved model of some blocks.

    Attributes:
        directory: where it lies.
        config: its config as it is written.
        index: its index, checked.
        blocks: numbers of the blocks that are meant.
    """

    directory: Path
    config: dict[str, Any]
    index: dict[str, Any]
    blocks: tuple[int, ...]

    def digest(self, name: str) -> str:
        """SHA-256 of one of its weight files."""
        known = self.index["metadata"].get("sha256", {}).get(name)
        return known or serialization.sha256(self.directory / name)

    def companions(self) -> Iterator[tuple[str, Path]]:
        """Names and paths of the files beside weights, config, index, card and the recipe of a merged model."""
        own = {*self.index["weight_map"].values(), SHARED_NAME, INDEX_NAME, "config.json", CARD_NAME, RECIPE_NAME}
        for path in sorted(self.directory.rglob("*")):
            pieces = path.relative_to(self.directory).parts
            hidden = any(piece.startswith(".") for piece in pieces)
            if path.is_file() and not path.is_symlink() and not hidden and "/".join(pieces) not in own:
                yield "/".join(pieces), path
