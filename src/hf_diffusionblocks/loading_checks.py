"""Checks of a model's files against each other, before its weights are allocated: config, index and headers."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .configuration import DiffusionBlocksConfig
from .partition import BlockPartition
from .serialization import FileFinder, block_file, describe_file, file_of_key
from .weight_headers import check_shapes, read_shapes


def check_files(
    model_class: Any, find: FileFinder, config: Any, blocks: Sequence[int] | None, paths: Sequence[Path]
) -> None:
    """Check that a model's config and the headers of its weight files agree; nothing is allocated for that.

    Args:
        model_class: of the model.
        find: finds its files.
        config: the config, if it has been read already.
        blocks: those that are to be loaded; None for all.
        paths: their weight files.

    Raises:
        ValueError: naming what does not fit.
    """
    if not isinstance(config, DiffusionBlocksConfig):
        config = model_class.config_class.from_pretrained(find("config.json").parent)
    held = range(config.num_blocks) if blocks is None else blocks
    check_number_of_weights(config.make_partition(), held, paths)
    check_weights(lambda: model_class(config, blocks=blocks), paths)


def check_number_of_weights(partition: BlockPartition, blocks: Iterable[int], paths: Sequence[Path]) -> None:
    """Check that blocks have no more layers than their files have tensors, so that building them is cheap.

    Raises:
        ValueError: naming the block and its file.
    """
    by_name = {path.name: path for path in paths}
    for block in blocks:
        name, layers = block_file(block), len(partition.layers(block))
        if name in by_name and layers > (count := len(read_shapes(by_name[name]))):
            raise ValueError(
                f"config.json gives block {block} {layers} layers, but {describe_file(name)} in "
                f"{by_name[name].parent} holds {count} tensors. Config and weights belong to different models: "
                "download both again."
            )


def check_weights(build: Callable[[], nn.Module], paths: Sequence[Path]) -> None:
    """Check that the tensors in weight files have the shapes that the model expects of them.

    Args:
        build: builds the model; called under the meta device.
        paths: the weight files.

    Raises:
        ValueError: naming the file and the tensor, or what keeps the model from being built.
    """
    try:
        with torch.device("meta"):
            expected = build().state_dict()
    except ValueError:
        raise
    except Exception as error:  # anything: the values are a stranger's, and the modules' code is not ours
        raise ValueError(f"config.json does not describe a model that can be built: {error!r}.") from error
    for path in paths:
        found = read_shapes(path)
        wanted = {k: t.shape for k, t in expected.items() if file_of_key(k) == path.name and k in found}
        check_shapes(path, wanted)


def checked_blocks(partition: BlockPartition, blocks: Sequence[int]) -> list[int]:
    """Numbers of existing blocks, ascending; otherwise a ``ValueError``."""
    if not isinstance(blocks, Sequence) or isinstance(blocks, str) or not blocks:
        raise ValueError(f"blocks={blocks!r} must list at least one block, such as [0]; None stands for all.")
    for block in blocks:
        partition.check_block(block)
    return sorted(set(blocks))
