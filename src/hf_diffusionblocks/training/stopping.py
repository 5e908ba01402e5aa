"""Ctrl-C and SIGTERM end a run after the current update, with a checkpoint."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .checkpoint import find_checkpoints


class StopRequest:
    """Whether the run was asked to stop, and by what.

    Attributes:
        by: ``Ctrl-C``, ``SIGTERM``, or another process of the run; None if nobody asked.
    """

    by: str | None = None

    def interruption(self, updates: int, checkpoint: Path) -> KeyboardInterrupt:
        """What ends the run: it says who asked, which is then forgotten, and what was saved where."""
        by, self.by = self.by, None
        return KeyboardInterrupt(f"stopped by {by} after {updates} update{'s' * (updates != 1)}; saved in {checkpoint}")

    @contextlib.contextmanager
    def listening(self, output_dir: Path) -> Iterator[None]:
        """Take note of the first signal; a second one interrupts at once, and names the checkpoint that is left.

        Args:
            output_dir: the run's, where its checkpoints lie.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(number: int, _frame: Any) -> None:
            if self.by is not None:
                raise KeyboardInterrupt
            self.by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

        old = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(str(error) or _what_is_left(output_dir)) from error
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def _what_is_left(output_dir: Path) -> str:
    """What a run that was interrupted at once goes on from."""
    saved = find_checkpoints(output_dir)
    if not saved:
        return "No checkpoint was whole yet: all updates are made again."
    return f"The last whole checkpoint is {saved[-1]}; the updates since then are made again."
