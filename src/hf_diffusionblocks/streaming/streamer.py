"""One block on the device at a time: the others rest at home, the next one is fetched while the current one computes.

Parameters, moments and averages keep their identity, as optimizers hold on to them: only what lies behind a tensor
(``tensor.data``) is exchanged. A tensor of a block that is away has its shape and NaN in every place, so that using it
by mistake shows.

Two places on the device: the *pinned* block is there for training, with all its state, and what changes is kept; a
*visitor* is there for a forward pass, with its weights only, on a copy of its own. Each may have a successor, which a
thread fetches.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from .homes import FileHome, Home, HostHome, Layout

WEIGHTS = "weights"
Cells = dict[str, list[Tensor]]  # the tensors of a block, by kind


@dataclass
class Arrival:
    """A block's state on the device, by kind, and when its copy is done there."""

    flats: dict[str, Tensor]
    ready: Any = None
    versions: tuple[int, ...] = ()


@dataclass(frozen=True)
class Transfer:
    """One move of a block, for a trace: seconds as of ``time.perf_counter``.

    Attributes:
        what: ``fetch`` or ``store``, by the thread; ``wait``, by the computing thread for a fetch.
        block: which.
        start: when it began.
        end: when it ended; on a GPU, when it was handed to the copying stream.
        nbytes: bytes.
    """

    what: str
    block: int
    start: float
    end: float
    nbytes: int


class Streamer:
    """Moves blocks between the device and their homes.

    Args:
        blocks: the blocks by number.
        device: where they compute.
        to_disk: rest in scratch files, else in host memory.
        folder: where the scratch files go; by default the system's folder for temporary files.
        prefetch: fetch the next block beside the computation; else when it is needed, which saves its memory.

    Attributes:
        sources: functions that give further tensors of a block by kind, such as an optimizer's moments.
        visit_kinds: what a visitor brings.
        on_visit: called when a visitor has arrived.
        trace: the latest transfers.
    """

    def __init__(
        self,
        blocks: nn.ModuleDict,
        device: torch.device | str,
        *,
        to_disk: bool = False,
        folder: str | os.PathLike | None = None,
        prefetch: bool = True,
    ):
        self.blocks, self.device, self.to_disk, self.folder = blocks, torch.device(device), to_disk, folder
        self.prefetch = prefetch
        self.sources: list[Callable[[int], Cells]] = []
        self.visit_kinds: tuple[str, ...] = (WEIGHTS,)
        self.on_visit: Callable[[int], None] | None = None
        self.trace: deque[Transfer] = deque(maxlen=100_000)
        self.pinned: int | None = None
        self.visitor: int | None = None
        self._homes: dict[tuple[int, str], Home] = {}
        self._here: dict[int, Arrival] = {}
        self._coming: dict[str, tuple[int, Future[Arrival]]] = {}
        self._spare: list[Tensor] = []
        self._order: list[int] = []
        self._place = 0  # in the order, from the first
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="block-streaming")
        self._stores: list[Future] = []
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._absent: dict[torch.dtype, Tensor] = {}

    # -- what the model and the trainer ask ------------------------------------------------------------------------

    def adopt(self, block: int, home: Home | None = None) -> None:
        """Send a block that is in memory home; with a ``home`` that has its weights already, let them go."""
        if home is not None:
            self._homes[block, WEIGHTS] = home
        for name, buffer in self.blocks[str(block)].named_buffers():
            owner = self.blocks[str(block)].get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], buffer.to(self.device))  # small, and not state: they stay
        self._here[block] = Arrival({})
        self._leave(block, keep=home is None)
        self._finish_stores()

    def pin(self, block: int | None, following: int | None = None) -> None:
        """Have a block with all its state on the device, to train it; the one pinned before goes home, changed.

        Args:
            block: which; None for none.
            following: the block to fetch meanwhile.
        """
        if block != self.pinned:
            self._dismiss()
            previous, self.pinned = self.pinned, None
            if previous is not None:
                self._leave(previous, keep=True)
            if self._coming.get("pin", (block,))[0] != block:
                self._forget("pin")
            if self._coming.get("visit", (None,))[0] == block:
                self._forget("visit")  # it will change
            if block is not None:
                self._arrive(block, self._take("pin", block) or self._fetch(block, None, True))
                self.pinned = block
        if self.prefetch and following not in (None, block) and "pin" not in self._coming:
            self._coming["pin"] = (following, self._fetch(following, None, True))

    def visit(self, block: int) -> None:
        """Have a block's weights on the device, for a forward pass; the visitor before it goes."""
        if block not in (self.pinned, self.visitor):
            self._dismiss()
            if self._coming.get("visit", (block,))[0] != block:
                self._forget("visit")
            self._arrive(block, self._take("visit", block) or self._fetch(block, self.visit_kinds, False))
            self.visitor = block
            if self.on_visit is not None:
                self.on_visit(block)
        if self.prefetch and (block != self.pinned or self.visitor is not None):  # else others may not be needed
            following = self._following(block)
            if following not in (None, self.pinned, self.visitor) and "visit" not in self._coming:
                self._coming["visit"] = (following, self._fetch(following, self.visit_kinds, False))

    @contextlib.contextmanager
    def expect(self, order: Sequence[int]) -> Iterator[None]:
        """For as long as it lasts, visits come in this order, over and over."""
        before = self._order, self._place
        self._order, self._place = [block for block, _ in groupby(order)], 0
        if self._coming.get("visit", (order[0],))[0] not in (order[0], self.visitor):
            self._forget("visit")
        try:
            yield
        finally:
            self._order, self._place = before

    def release(self) -> None:
        """Send every block home, and wait until it is there."""
        self._forget("pin")
        self.pin(None)
        self._dismiss()
        self._forget("visit")
        self._finish_stores()
        self._spare.clear()

    def drop(self, *kinds: str) -> None:
        """Forget what homes hold of some kinds."""
        self._homes = {key: home for key, home in self._homes.items() if key[1] not in kinds}

    def restore(self) -> None:
        """Bring all weights back into memory of their own, on the device, for good."""
        self.release()
        for block in map(int, self.blocks):
            self._arrive(block, self._fetch(block, (WEIGHTS,), False))
            for parameter in self.blocks[str(block)].parameters():
                parameter.data = parameter.data.clone()
        self._here.clear()
        self._thread.shutdown()

    def held_bytes(self) -> dict[str, int]:
        """Bytes on the device: ``pinned``, ``visitor`` and what is being fetched for each of these places."""
        sizes = {}
        for name, block in (("pinned", self.pinned), ("visitor", self.visitor)):
            sizes[name] = sum(flat.numel() for flat in self._here[block].flats.values()) if block is not None else 0
        for name, place in (("next pinned", "pin"), ("next visitor", "visit")):
            coming = self._coming.get(place)
            sizes[name] = sum(flat.numel() for flat in coming[1].result().flats.values()) if coming else 0
        return sizes | {"spare": sum(flat.numel() for flat in self._spare)}

    def cells(self, block: int) -> Cells:
        """The tensors of a block that move, by kind."""
        found: Cells = {WEIGHTS: list(self.blocks[str(block)].parameters())}
        for source in self.sources:
            found |= source(block)
        return found

    # -- coming and going --------------------------------------------------------------------------------------------

    def _fetch(self, block: int, kinds: Sequence[str] | None, writable: bool) -> Future[Arrival]:
        homes = {k: h for (b, k), h in self._homes.items() if b == block and (kinds is None or k in kinds)}
        return self._thread.submit(self._bring, block, homes, writable)

    def _bring(self, block: int, homes: dict[str, Home], writable: bool) -> Arrival:
        start, flats = time.perf_counter(), {}
        with self._copying():
            for kind, home in homes.items():
                flats[kind] = home.fetch(self.device, writable, self._spare_buffer(home))
            ready = self._copies.record_event() if self._copies is not None else None
        nbytes = sum(flat.numel() for flat in flats.values())
        self.trace.append(Transfer("fetch", block, start, time.perf_counter(), nbytes))
        return Arrival(flats, ready)

    def _take(self, place: str, block: int) -> Future[Arrival] | None:
        coming = self._coming.pop(place, None)
        return coming[1] if coming is not None and coming[0] == block else None

    def _forget(self, place: str) -> None:
        coming = self._coming.pop(place, None)
        if coming is not None:
            self._reuse(coming[1].result().flats)

    def _arrive(self, block: int, future: Future[Arrival]) -> None:
        start = time.perf_counter()
        arrival = future.result()  # raises what went wrong
        self.trace.append(Transfer("wait", block, start, time.perf_counter(), 0))
        if arrival.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(arrival.ready)
        cells = self.cells(block)
        for kind, flat in arrival.flats.items():
            for cell, view in zip(cells.get(kind, []), self._homes[block, kind].layout.views(flat), strict=False):
                cell.data = view
        arrival.versions = self._versions(block)
        self._here[block] = arrival

    def _versions(self, block: int) -> tuple[int, ...]:
        return tuple(p._version for p in self.blocks[str(block)].parameters())

    def _dismiss(self) -> None:
        """Let the visitor go. If its weights were changed, they are kept, unless averages stand in for them."""
        block, self.visitor = self.visitor, None
        if block is not None:
            changed = self._here[block].versions != self._versions(block) and self.on_visit is None
            if changed and self._coming.get("pin", (None,))[0] == block:
                self._forget("pin")
            self._leave(block, keep=changed)

    def _leave(self, block: int, keep: bool) -> None:
        arrival = self._here.pop(block)
        if self._copies is not None:  # what the copying stream does next comes after all that was computed so far
            self._copies.wait_event(torch.cuda.current_stream(self.device).record_event())
        for kind, cells in self.cells(block).items():
            values = [cell.data for cell in cells]
            if not values or all(self._is_nothing(value) for value in values):
                continue  # not there, such as a visitor's moments
            flat = arrival.flats.pop(kind, None)
            if keep:
                home = self._home_for(block, kind, values, flat)
            for cell in cells:
                cell.data = self._nothing(cell)
            if keep:
                self._stores.append(self._thread.submit(self._store, block, home, flat, values))
            elif flat is not None:
                self._reuse({kind: flat})
            del values, flat
        self._stores = [future for future in self._stores if not (future.done() and future.result() is None)]

    def _home_for(self, block: int, kind: str, values: list[Tensor], flat: Tensor | None) -> Home:
        home = self._homes.get((block, kind))
        if home is not None and flat is not None and home.layout.holds(flat, values) and hasattr(home, "store"):
            return home
        layout = Layout.of(values)
        if home is None or home.layout != layout or not hasattr(home, "store"):
            home = FileHome(layout, self.folder) if self.to_disk else HostHome(layout, self.device)
            self._homes[block, kind] = home
        return home

    def _store(self, block: int, home: Home, flat: Tensor | None, values: list[Tensor]) -> None:
        start = time.perf_counter()
        with self._copying():
            for value in values:
                if value.is_cuda:  # made on another stream, and let go before this one has read it
                    value.record_stream(self._copies)
            home.store(flat, values)  # type: ignore[union-attr]  # see _home_for: not a weight file
        self.trace.append(Transfer("store", block, start, time.perf_counter(), home.layout.nbytes))
        values.clear()
        if flat is not None:
            self._reuse({"": flat})

    def _finish_stores(self) -> None:
        for future in self._stores:
            future.result()  # raises what went wrong
        self._stores.clear()
        if self._copies is not None:
            self._copies.synchronize()

    def _copying(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._copies is None else torch.cuda.stream(self._copies)

    def _reuse(self, flats: dict[str, Tensor]) -> None:
        """Keep buffers for the next block. Mapped files are let go, and a GPU has an allocator that does this."""
        if self.device.type == "cpu":
            self._spare.extend(flat for flat in flats.values() if not hasattr(flat, "is_file"))

    def _spare_buffer(self, home: Home) -> Tensor | None:
        for i, flat in enumerate(self._spare):
            if flat.numel() == home.layout.nbytes:
                return self._spare.pop(i)
        self._spare.clear()  # blocks of another size
        return None

    def _nothing(self, like: Tensor) -> Tensor:
        if like.dtype not in self._absent:
            value = float("nan") if like.dtype.is_floating_point or like.dtype.is_complex else 0
            with torch.inference_mode(False):
                self._absent[like.dtype] = torch.full((), value, dtype=like.dtype, device=self.device)
        return self._absent[like.dtype].expand(like.shape)

    def _is_nothing(self, tensor: Tensor) -> bool:
        absent = self._absent.get(tensor.dtype)
        return absent is not None and absent.data_ptr() == tensor.data_ptr()

    def _following(self, block: int) -> int | None:
        """The next other block in the expected order, from where the last visit stood; by default by number."""
        order = self._order or sorted(map(int, self.blocks))
        if block not in order:
            return None
        count = len(order)
        start = max(self._place, 0)
        self._place = next(i % count for i in range(start, start + count) if order[i % count] == block)
        ring = (order[(self._place + i) % count] for i in range(1, count))
        return next((b for b in ring if b not in (block, self.pinned)), None)

    def __reduce__(self) -> Any:
        raise ValueError("a model whose blocks are streamed cannot be copied: call disable_block_streaming() first.")
