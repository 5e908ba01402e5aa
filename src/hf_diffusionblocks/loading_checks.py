"""Checks of a model's files against each other, before its weights are allocated: config, index and headers."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from .partition import BlockPartition
from .serialization import block_file, describe_file, file_of_key
from .weight_headers import check_shapes, read_shapes


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
