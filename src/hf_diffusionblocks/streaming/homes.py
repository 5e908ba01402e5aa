"""Where a block's tensors rest while they are not needed: in host memory, in scratch files, in a model's weight files.

Tensors of one block and kind (weights, moments, average) lie one after the other in one flat buffer, so that a block
moves with one copy per kind. Every tensor starts at a multiple of 256 bytes, as it would in memory of its own: kernels
may round differently on data that is aligned otherwise.
"""

import ctypes
import json
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 256
_POPULATE_READ, _POPULATE_WRITE = 22, 23  # Linux 5.14 and newer; elsewhere pages come when they are touched
_DTYPES = {  # as safetensors names them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Layout:
    """How tensors lie in a flat buffer.

    Attributes:
        specs: shape, strides (in elements), dtype and offset (in bytes) of each tensor.
        nbytes: size of the buffer.
    """

    specs: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, int], ...]
    nbytes: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Layout":
        """The layout of some tensors; their strides are kept."""
        specs, offset = [], 0
        for tensor in tensors:
            strides = torch.empty_like(tensor, device="meta").stride()  # those of an expanded tensor have no overlap
            specs.append((tuple(tensor.shape), tuple(strides), tensor.dtype, offset))
            offset += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        return cls(tuple(specs), offset)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors in a flat buffer of bytes."""
        with torch.inference_mode(False), torch.no_grad():
            return [
                flat[offset : offset + int(np.prod(shape)) * dtype.itemsize].view(dtype).as_strided(shape, strides)
                for shape, strides, dtype, offset in self.specs
            ]

    def holds(self, flat: Tensor, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors are the views of this buffer, so that it has their values already."""
        start = flat.data_ptr()
        places = [(start + offset, dtype) for _, _, dtype, offset in self.specs]
        return places == [(t.data_ptr(), t.dtype) for t in tensors]


class HostHome:
    """Host memory, page-locked where the device is a GPU, so that copies run beside its kernels."""

    def __init__(self, layout: Layout, device: torch.device):
        self.layout = layout
        self.flat = torch.zeros(layout.nbytes, dtype=torch.uint8)
        self._locked = device.type == "cuda" and layout.nbytes > 0
        if self._locked:
            # pin_memory() would round the size up to a power of two.
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.flat.data_ptr(), layout.nbytes, 0))

    def __del__(self) -> None:
        if getattr(self, "_locked", False):
            torch.cuda.cudart().cudaHostUnregister(self.flat.data_ptr())

    def fetch(self, device: torch.device, writable: bool, into: Tensor | None = None) -> Tensor:
        """A copy on the device, in the buffer ``into`` if there is one."""
        flat = torch.empty(self.layout.nbytes, dtype=torch.uint8, device=device) if into is None else into
        _copy(flat, self.flat)
        return flat

    def store(self, flat: Tensor | None, tensors: list[Tensor]) -> None:
        """Take values back: ``flat`` is what ``fetch`` gave, if it did, ``tensors`` what there is now."""
        if flat is not None and self.layout.holds(flat, tensors):
            _copy(self.flat, flat)
            return
        for view in self.layout.views(self.flat):
            view.copy_(tensors.pop(0), non_blocking=True)


class FileHome:
    """A scratch file without a name: it is gone when the process is, however that ends.

    On a CPU the file is mapped and the block computes in the mapping, so that fetching copies nothing; what was changed
    is written back by the operating system, when it likes or needs the memory. Let go, the mapping takes no memory
    that other things could not have.

    Raises:
        OSError: if the disk is full.
    """

    def __init__(self, layout: Layout, folder: str | os.PathLike | None):
        self.layout = layout
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        self.file: Any = tempfile.TemporaryFile(
            prefix="diffusionblocks-", dir=None if folder is None else os.fspath(folder), buffering=0
        )
        if layout.nbytes:
            try:  # writing to a mapping on a full disk would kill the process
                _reserve(self.file.fileno(), layout.nbytes)
            except OSError as error:
                self.file.close()
                place = folder or tempfile.gettempdir()
                raise OSError(
                    f"{layout.nbytes:,} bytes of a block's state do not fit in {place}: {error}. Free disk space, or "
                    "name another folder."
                ) from error

    def fetch(self, device: torch.device, writable: bool, into: Tensor | None = None) -> Tensor:
        """The content on the device; on a CPU a mapping: shared if ``writable``, else changes to it are private."""
        if not self.layout.nbytes:
            return torch.empty(0, dtype=torch.uint8, device=device)
        access = mmap.ACCESS_WRITE if writable and device.type == "cpu" else mmap.ACCESS_COPY
        mapped = torch.frombuffer(mmap.mmap(self.file.fileno(), self.layout.nbytes, access=access), dtype=torch.uint8)
        if device.type == "cpu":
            _populate(mapped, _POPULATE_WRITE if writable else _POPULATE_READ)
            mapped.is_file = "shared" if writable else "private"
            return mapped
        flat = torch.empty(self.layout.nbytes, dtype=torch.uint8, device=device) if into is None else into
        return flat.copy_(mapped)

    def store(self, flat: Tensor | None, tensors: list[Tensor]) -> None:
        """Take values back, as ``HostHome.store``. Each of ``tensors`` is let go when it is written."""
        if getattr(flat, "is_file", None) == "shared" and self.layout.holds(flat, tensors):
            return
        for shape, strides, dtype, offset in self.layout.specs:
            tensor = tensors.pop(0).detach().cpu()
            if tensor.stride() != strides:
                tensor = torch.empty_strided(shape, strides, dtype=dtype).copy_(tensor)
            if tensor.numel():
                _write(self.file.fileno(), tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy(), offset)


class WeightFileHome:
    """A block's weights in the safetensors file of a saved model: read when they are needed, never written.

    Args:
        layout: of the weights, in the model's dtype.
        path: the file.
        keys: the names in the file, in the layout's order.
    """

    def __init__(self, layout: Layout, path: Path, keys: Sequence[str]):
        self.layout, self.path, self.keys = layout, path, list(keys)

    def fetch(self, device: torch.device, writable: bool, into: Tensor | None = None) -> Tensor:
        """The weights on the device, converted to the layout's dtypes."""
        flat = torch.empty(self.layout.nbytes, dtype=torch.uint8, device=device) if into is None else into
        with open(self.path, "rb") as file:  # not mapped: that would take the block's size once more
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
            for view, key in zip(self.layout.views(flat), self.keys, strict=True):
                dtype = _DTYPES[header[key]["dtype"]]
                direct = view.dtype == dtype and view.device.type == "cpu" and view.is_contiguous()
                values = view if direct else torch.empty(view.shape, dtype=dtype)
                file.seek(start + header[key]["data_offsets"][0])
                if file.readinto(values.view(-1).view(torch.uint8).numpy()) != values.nbytes:
                    raise ValueError(f"{self.path} is truncated: {key!r} is not all there. Copy or download it again.")
                if not direct:
                    view.copy_(values)
        return flat


Home = HostHome | FileHome | WeightFileHome


def _copy(target: Tensor, source: Tensor) -> None:
    if target.device.type == source.device.type == "cpu":
        # In this thread alone: torch would start a second team of threads beside the computing one.
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source, non_blocking=True)


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def _write(descriptor: int, data: np.ndarray, offset: int) -> None:
    rest = memoryview(data)  # type: ignore[arg-type]  # an array has a buffer
    while len(rest):
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _populate(flat: Tensor, advice: int) -> None:
    """Make a mapping's pages present before they are needed. ctypes lets other threads run meanwhile."""
    try:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(flat.data_ptr()), ctypes.c_size_t(flat.numel()), advice)
    except (OSError, AttributeError):  # not on this system
        pass
