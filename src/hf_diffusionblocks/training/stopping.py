"""Ctrl-C and SIGTERM end a run after the current update, with a checkpoint."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class StopRequest:
    """Whether the run was asked to stop, and by what.

    Attributes:
        by: ``signal 15``, or another process of the run; None if nobody asked.
    """

    by: str | None = None

    def take(self) -> str | None:
        """Who asked, and forget it."""
        by, self.by = self.by, None
        return by

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of the first signal; a second one interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(number: int, _frame: Any) -> None:
            if self.by is not None:
                raise KeyboardInterrupt
            self.by = f"signal {number}"

        old = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
