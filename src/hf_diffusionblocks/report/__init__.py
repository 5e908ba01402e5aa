"""A run as a page: a report in one file at its end, and a live page while it goes on."""

from .page import write_report
from .run_state import RunReader, RunState
from .server import RunServer, watch

__all__ = ["RunReader", "RunServer", "RunState", "watch", "write_report"]
