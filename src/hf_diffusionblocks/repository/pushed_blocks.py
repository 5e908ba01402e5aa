"""The part of a blocked model that sends itself, or some of its blocks, to the Hub."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from ..mixins import MixinBase
from ..serialization import SHARED_NAME, block_file, file_of_key
from .pushing import Push, push_directory


class PushedBlocks(MixinBase):
    """Adds ``push_to_hub`` to a model with ``save_pretrained``, ``block`` and ``_own_state_dict``."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        blocks: Sequence[int] | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        dry_run: bool = False,
    ) -> Push:
        """Send the model, or some of its blocks, to the Hub as one commit; pushes of different blocks may meet.

        Args:
            repo_id: ``user/model``; made if it does not exist.
            blocks: send these only: the commit touches their files, the index and the card. By default all that are
                resident.
            commit_message: one is made up by default.
            commit_description: of the commit.
            private: whether a new repository is private.
            token: as in transformers. Never logged or written.
            revision: a branch.
            create_pr: open a pull request instead.
            dry_run: only tell what would be sent.

        Returns:
            What was sent; ``str()`` of it is a table.

        Raises:
            ValueError: if the repository holds another model, or a block is not loaded.
            OSError: if the Hub cannot be reached or refuses; what was sent is used when the push is repeated.
        """
        for block in blocks or ():
            self.block(block)
        with tempfile.TemporaryDirectory(prefix="diffusionblocks-") as temporary:
            directory = Path(temporary) / "model"
            self.save_pretrained(directory, state_dict=None if blocks is None else self._state_dict_of(blocks))
            return push_directory(
                directory,
                repo_id,
                blocks=blocks,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                dry_run=dry_run,
            )

    def _state_dict_of(self, blocks: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """The state dict of some blocks and the shared parts, in parts."""
        names = {SHARED_NAME, *map(block_file, blocks)}
        parts = self._own_state_dict()
        for part in [parts] if isinstance(parts, dict) else parts:
            yield {key: tensor for key, tensor in part.items() if file_of_key(key) in names}
