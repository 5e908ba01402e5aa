"""Files by block: a model, or some of its blocks, written to a directory and read from one or from the Hub."""

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils.hub import extract_commit_hash

from . import serialization
from .adapter_checks import blocks_of_keys, check_no_adapter
from .agreement import SAME_MODEL, first_difference
from .configuration import DiffusionBlocksConfig
from .loading_checks import check_files, checked_blocks
from .mixins import MixinBase
from .streaming import StreamingRequest, requested_streaming

# Keywords of loading that say where on the Hub, and how it is asked.
_HUB = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


class BlockFiles(MixinBase):
    """Of a ``BlockedPreTrainedModel``: ``save_pretrained`` and ``from_pretrained`` by block."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write ``config.json``, one weight file per resident block, the shared file and the index.

        A new directory appears complete or not at all. In an existing one all files are written beside the old ones
        and then renamed, the index last; if anything fails, the old ones stay. A model that holds some blocks only
        leaves the others' files as they are; a whole model removes block files that are not its own.

        Args:
            save_directory: where to.
            is_main_process: write only if true.
            push_to_hub: upload afterwards, as in transformers (``repo_id``, ``token``, … in ``kwargs``).
            **kwargs: ``max_shard_size`` is held to: a block lies in one file, which must not be larger.

        Raises:
            NotADirectoryError: if the path is a file.
            ValueError: if this model holds some blocks only and the directory holds another model, a block is
                larger than ``max_shard_size``, or holds an adapter that is not merged.
            OSError: if the disk is full; nothing half written stays.
        """
        target = Path(save_directory)
        if target.is_file():
            raise NotADirectoryError(f"{target} is a file; give a directory to save the model in.")
        state_dict, limit = kwargs.pop("state_dict", None), kwargs.pop("max_shard_size", None)
        among = blocks_of_keys(state_dict) if isinstance(state_dict, Mapping) else None
        check_no_adapter(self.blocks, f"save the model in {target}", among)
        if is_main_process:
            self.save_files(target, state_dict, limit)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", target.name), **kwargs)

    def save_files(
        self,
        target: Path,
        state_dict: dict[str, Tensor] | Iterator[dict[str, Tensor]] | None = None,
        limit: int | str | None = None,
    ) -> None:
        """What ``save_pretrained`` writes, with the names that adapters give to weights: a checkpoint keeps them.

        Args:
            target: directory.
            state_dict: the weights, by default the model's own.
            limit: ``max_shard_size``.
        """
        self.config.architectures = [type(self).__name__]
        self.config.dtype = self.dtype
        state_dict = state_dict or self._own_state_dict()
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target if target.exists() else target.parent
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=beside) as temporary:
            staging = Path(temporary) / "model"
            staging.mkdir()
            self._write_files(staging, state_dict, target, limit)
            if target.exists():
                serialization.move_files(staging, target)
            else:
                os.replace(staging, target)

    def _own_state_dict(self) -> dict[str, Tensor] | Iterator[dict[str, Tensor]]:
        if self.streamer is not None:
            return self._state_dict_parts()
        if "disk" in (getattr(self, "hf_device_map", None) or {}).values():
            from accelerate.utils.modeling import get_state_dict_offloaded_model

            return get_state_dict_offloaded_model(self)
        return self.state_dict()

    def _write_files(
        self,
        staging: Path,
        state_dict: dict[str, Tensor] | Iterator[dict[str, Tensor]],
        target: Path,
        limit: int | str | None,
    ) -> None:
        """Write the files of a save to ``target`` into an empty directory."""
        partial = len(self.resident_blocks) < self.partition.num_blocks
        config = self.config.to_dict()
        config.pop("_name_or_path", None)  # where it was loaded from is nobody else's business
        if partial and (target / "config.json").is_file():
            old = type(self.config).from_pretrained(target).to_dict()
            difference = first_difference(old, config, SAME_MODEL)
            if difference is not None:
                name, theirs, ours = difference
                raise ValueError(
                    f"{target} holds another model: its {name} is {theirs!r}, this one's {ours!r}. "
                    "Save these blocks in a directory of their own."
                )
        serialization.write_json(staging / "config.json", config)
        if self.can_generate():
            self.generation_config.save_pretrained(staging)
        serialization.write_weights(staging, state_dict, target if partial else None, limit)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        blocks: Sequence[int] | None = None,
        block_streaming: str | None = None,
        **kwargs: Any,
    ):
        """Load a model, or only some of its blocks.

        Args:
            pretrained_model_name_or_path: a directory or a Hub id.
            blocks: read and allocate these blocks and the shared parts only; the other files need not exist.
            block_streaming: ``host`` or ``disk``: load block by block, and keep one on the device while the others rest
                in host memory or in their files; see ``enable_block_streaming``.
            **kwargs: as in transformers: ``dtype``, ``device_map``, ``revision``, ``token``, …

        Raises:
            ValueError: for a missing, truncated or corrupted file, named with its block.
        """
        request = StreamingRequest(block_streaming) if block_streaming else requested_streaming()
        if request is not None:
            name = pretrained_model_name_or_path
            return cls._from_pretrained_streamed(request, name, *model_args, blocks=blocks, **kwargs)
        output_loading_info = kwargs.pop("output_loading_info", False)
        hub_kwargs = {name: kwargs[name] for name in _HUB if name in kwargs}
        find = serialization.FileFinder(pretrained_model_name_or_path, hub_kwargs)
        index_path = find(serialization.INDEX_NAME)
        if (commit := extract_commit_hash(str(index_path), None)) is not None:
            # All files of one commit, whatever is pushed meanwhile.
            find.kwargs["revision"] = kwargs["revision"] = commit
        index = serialization.read_index(index_path)
        if not isinstance(kwargs.get("config"), DiffusionBlocksConfig):
            find("config.json")  # transformers then finds it in the cache
        if blocks is not None:
            config, kwargs = cls._config_of(pretrained_model_name_or_path, kwargs)
            blocks = checked_blocks(config.make_partition(), blocks)
            kwargs |= {"config": config, "blocks": blocks}
        paths = [find(name) for name in serialization.files_for(index, blocks)]
        for path in paths:
            serialization.verify_file(path, index)
        if not kwargs.get("ignore_mismatched_sizes"):
            check_files(cls, find, kwargs.get("config"), blocks, paths)
        if blocks is None:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        else:
            # transformers resolves every file of an index: hand it a directory whose index names only these files.
            view, kept = Path(tempfile.mkdtemp(prefix="diffusionblocks-")), False
            try:
                _fill_view(view, paths, index, config if cls.can_generate() else None, find)
                kwargs = {name: value for name, value in kwargs.items() if name not in _HUB}
                model, info = super().from_pretrained(view, *model_args, output_loading_info=True, **kwargs)
                if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
                    weakref.finalize(model, shutil.rmtree, view, ignore_errors=True)  # it reads from there
                    kept = True
            finally:
                if not kept:
                    shutil.rmtree(view, ignore_errors=True)
            model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        missing = sorted(info["missing_keys"])
        if missing:
            file = serialization.describe_file(serialization.file_of_key(missing[0]))
            raise ValueError(f"{file} lacks {len(missing)} weights of the model, {missing[0]!r} first.")
        return (model, info) if output_loading_info else model

    @classmethod
    def _config_of(
        cls, name: str | os.PathLike, kwargs: dict[str, Any]
    ) -> tuple[DiffusionBlocksConfig, dict[str, Any]]:
        """The config of a model that is loaded in part, and the other keywords."""
        config: Any = kwargs.pop("config", None) or name
        if isinstance(config, DiffusionBlocksConfig):
            return config, kwargs
        dtype: dict[str, Any] = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
        config, kwargs = cls.config_class.from_pretrained(config, return_unused_kwargs=True, **kwargs)
        return config, kwargs | dtype


def _fill_view(
    view: Path,
    paths: Sequence[Path],
    index: dict[str, Any],
    config: DiffusionBlocksConfig | None,
    find: serialization.FileFinder,
) -> None:
    """Make a directory a view of some weight files: links to them, and an index that names only these.

    Args:
        view: an empty directory.
        paths: of the weight files.
        index: of all weight files.
        config: of a model that generates, whose settings come from it if they have no file of their own.
        find: finds the model's other files.
    """
    for path in paths:
        os.symlink(path.resolve(), view / path.name)
    part = {k: f for k, f in index["weight_map"].items() if f in {p.name for p in paths}}
    serialization.write_json(view / serialization.INDEX_NAME, {"metadata": index["metadata"], "weight_map": part})
    if config is not None:
        config.save_pretrained(view)
        with contextlib.suppress(OSError, ValueError):
            os.symlink(find("generation_config.json").resolve(), view / "generation_config.json")
