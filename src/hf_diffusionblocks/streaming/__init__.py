"""Blocks that rest in host memory or on disk while another one computes: ``Streamer`` and a model's part of it."""

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..mixins import MixinBase
from ..serialization import FileFinder, block_file
from .homes import ALIGNMENT, FileHome, HostHome, Layout, WeightFileHome
from .streamer import WEIGHTS, Streamer, Transfer

HOMES = ("host", "disk")


@dataclass(frozen=True)
class StreamingRequest:
    """How models made inside ``stream_blocks`` stream their blocks; fields as there."""

    home: str = "host"
    device: torch.device | str | None = None
    folder: str | os.PathLike | None = None
    prefetch: bool = True

    def __post_init__(self) -> None:
        if self.home not in HOMES:
            raise ValueError(f"blocks can rest in {' or '.join(map(repr, HOMES))}, not in {self.home!r}.")

    def make(self, blocks: nn.ModuleDict, device: torch.device) -> Streamer:
        """The streamer of a model's blocks, which compute on the requested device, or on this one."""
        device = torch.device(device if self.device is None else self.device)
        return Streamer(blocks, device, to_disk=self.home == "disk", folder=self.folder, prefetch=self.prefetch)


_requested: contextvars.ContextVar[StreamingRequest | None] = contextvars.ContextVar("stream_blocks", default=None)


@contextlib.contextmanager
def stream_blocks(
    home: str = "host",
    *,
    device: torch.device | str | None = None,
    folder: str | os.PathLike | None = None,
    prefetch: bool = True,
) -> Iterator[None]:
    """Models that are made from a config inside this context are made block by block, and never whole on the device.

    Args:
        home: where blocks rest: ``host`` (memory) or ``disk`` (scratch files).
        device: where they compute; default: the CPU.
        folder: for the scratch files; default: the system's folder for temporary files.
        prefetch: fetch the next block while one computes.

    Raises:
        ValueError: for an unknown home.
        OSError: if the disk is full.

    Example:
        >>> from hf_diffusionblocks import BlockedDiTConfig, BlockedDiTModel
        >>> with stream_blocks("disk"):
        ...     model = BlockedDiTModel(BlockedDiTConfig(base_config={"num_layers": 6}))
    """
    token = _requested.set(StreamingRequest(home, device, folder, prefetch))
    try:
        yield
    finally:
        _requested.reset(token)


def requested_streaming() -> StreamingRequest | None:
    """What ``stream_blocks`` asks of models made now."""
    return _requested.get()


class StreamedBlocks(MixinBase):
    """The part of a blocked model that streams its blocks. The model has ``blocks``, and asks ``block`` for one.

    Attributes:
        streamer: the ``Streamer``; None while all blocks are on the device.
    """

    streamer: Streamer | None = None

    def enable_block_streaming(
        self,
        onload_device: torch.device | str | None = None,
        *,
        offload_to_disk_path: str | os.PathLike | None = None,
        prefetch: bool = True,
    ) -> None:
        """Keep one block on the device and the others in host memory, or on disk; the counterpart of diffusers'
        ``enable_group_offload``. Results are the same, bit for bit.

        Args:
            onload_device: where blocks compute; default: where the model is.
            offload_to_disk_path: a folder for scratch files, to rest on disk instead of in host memory.
            prefetch: fetch the next block while one computes: two blocks' weights instead of one at a time.

        Raises:
            ValueError: if blocks are streamed already.
            OSError: if the disk is full.
        """
        if self.streamer is not None:
            raise ValueError("this model's blocks are streamed already: call disable_block_streaming() first.")
        home = "host" if offload_to_disk_path is None else "disk"
        streamer = StreamingRequest(home, onload_device, offload_to_disk_path, prefetch).make(self.blocks, self.device)
        for block in self.resident_blocks:
            streamer.adopt(block)
        self._begin_streaming(streamer)

    def _begin_streaming(self, streamer: Streamer) -> None:
        for child in self._shared_children():
            child.to(streamer.device)
        self.streamer = streamer

    def disable_block_streaming(self) -> None:
        """Bring all blocks back to the device, for good."""
        if self.streamer is not None:
            self.streamer.restore()
            self.streamer = None

    def expect_blocks(self, order: Sequence[int]) -> contextlib.AbstractContextManager:
        """Say in which order blocks will be used, over and over, so that the next one is fetched in time."""
        if self.streamer is None or not order:
            return contextlib.nullcontext()
        return self.streamer.expect(order)

    @classmethod
    def _from_pretrained_streamed(
        cls, request: StreamingRequest, name: str | os.PathLike, *args: Any, blocks: Sequence[int] | None, **kwargs: Any
    ) -> Any:
        """``from_pretrained``, block by block, each sent home before the next one is read."""
        if kwargs.pop("output_loading_info", False):
            raise ValueError("output_loading_info=True is not known when blocks are streamed: leave it out.")
        token = _requested.set(None)
        try:
            model: Any = None
            streamer: Any = None
            while model is None or blocks:
                block = 0 if blocks is None else blocks[0]
                one = cls.from_pretrained(name, *args, blocks=[block], **kwargs)
                if model is None:
                    model, blocks = one, list(blocks or range(one.partition.num_blocks))
                    streamer = request.make(model.blocks, model.device)
                model.blocks[str(block)] = one.blocks[str(block)]
                del one
                streamer.adopt(block, _weight_file(name, block, model, kwargs) if request.home == "disk" else None)
                blocks = list(blocks or ())[1:]
        finally:
            _requested.reset(token)
        model._begin_streaming(streamer)
        return model

    def _state_dict_parts(self) -> Iterator[dict[str, torch.Tensor]]:
        """The state dict in parts: what is shared, then block by block, each on the device while it is looked at."""
        parts: dict[str, torch.Tensor] = {}
        for name, child in self.named_children():
            if name != "blocks":
                parts |= child.state_dict(prefix=f"{name}.")
        yield parts
        for block in self.resident_blocks:
            yield self.block(block).state_dict(prefix=f"blocks.{block}.")

    def _shared_children(self) -> list[nn.Module]:
        return [module for name, module in self.named_children() if name != "blocks"]

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        if self.streamer is None:
            return super()._apply(fn, recurse)
        probe = torch.empty(0, dtype=self.dtype, device=self.streamer.device)
        if (moved := fn(probe)).device != probe.device or moved.dtype != probe.dtype:
            raise ValueError(
                f"a model whose blocks are streamed cannot go from {probe.device}, {probe.dtype} to {moved.device}, "
                f"{moved.dtype}: call disable_block_streaming() first, or name the device when streaming is enabled."
            )
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The weights, as of any module.

        Raises:
            ValueError: if blocks are streamed, and so not all there.
        """
        if self.streamer is not None:
            raise ValueError(
                "the weights of a model whose blocks are streamed are not all in memory: save it with "
                "save_pretrained(), take model.block(b).state_dict(), or call disable_block_streaming() first."
            )
        return super().state_dict(*args, **kwargs)


def _weight_file(name: str | os.PathLike, block: int, model: Any, kwargs: dict[str, Any]) -> WeightFileHome:
    """The weight file of a block as its home."""
    hub = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
    path = FileFinder(name, {k: kwargs[k] for k in hub if k in kwargs})(block_file(block))
    named = dict(model.blocks[str(block)].named_parameters(prefix=f"blocks.{block}"))
    return WeightFileHome(Layout.of(list(named.values())), path, list(named))


__all__ = [
    "ALIGNMENT",
    "HOMES",
    "WEIGHTS",
    "FileHome",
    "HostHome",
    "Layout",
    "StreamedBlocks",
    "Streamer",
    "StreamingRequest",
    "Transfer",
    "WeightFileHome",
    "requested_streaming",
    "stream_blocks",
]
