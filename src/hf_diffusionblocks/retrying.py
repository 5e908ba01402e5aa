"""Talking to a server that may be slow, busy or gone: what to try again, for how long, and one line when it ends."""

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

try:  # the client of huggingface_hub 2 and later, then that of 1
    import httpx2 as httpx
except ImportError:
    import httpx  # type: ignore[no-redef]

NETWORK_ERRORS = (OSError, httpx.HTTPError)

# Another commit came first: made again on top of it, this one has to win some time.
_CONFLICT = (409, 412)
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_MAX_CONFLICTS = 60
_MAX_FAILURES = 6
_SECONDS = 0.5
_MAX_SECONDS = 20.0


class Retries:
    """Counts what went wrong in one task, waits before it is tried again, and gives up in time.

    Args:
        failures: how many dropped connections, timeouts and busy servers to put up with.
    """

    def __init__(self, failures: int = _MAX_FAILURES):
        self.max_failures = failures
        self.conflicts = self.failures = 0

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function until it works or trying again is of no use."""
        while True:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self.pause(error)

    def pause(self, error: Exception) -> None:
        """Wait before the next try, or raise the error again."""
        if _status(error) in _CONFLICT:
            self.conflicts += 1
            if self.conflicts > _MAX_CONFLICTS:
                raise error
            time.sleep(random.uniform(0, _SECONDS * min(self.conflicts, 8)))
            return
        if not is_transient(error):
            raise error
        self.failures += 1
        if self.failures > self.max_failures:
            raise error
        time.sleep(min(_MAX_SECONDS, _SECONDS * 2**self.failures) * random.uniform(0.5, 1))


def is_transient(error: BaseException) -> bool:
    """Whether an error may be gone the next time: a dropped connection, a timeout, a busy server."""
    if _status(error) is not None:
        return _status(error) in _BUSY
    return any(
        isinstance(e, (httpx.TransportError, ConnectionError, TimeoutError)) and not isinstance(e, OfflineModeIsEnabled)
        for e in chain(error)
    )


def why_unreachable(error: BaseException) -> str | None:
    """In words, why no answer came from a server at all; None if one did, or if something else went wrong."""
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain(error)):
        return "HF_HUB_OFFLINE is set"
    return "no connection" if _status(error) is None and is_transient(error) else None


@contextlib.contextmanager
def in_one_line(task: str, token: str | bool | None = None) -> Iterator[None]:
    """What goes wrong on the way to the Hub ends as one ``OSError`` of one line, without the token.

    Args:
        task: what is done, such as ``push to user/model``.
        token: to be left out; that of the environment or the log-in is, too.
    """
    try:
        yield
    except (HfHubHTTPError, httpx.HTTPError, RuntimeError, OSError) as error:
        cause = next((e for e in chain(error) if isinstance(e, (HfHubHTTPError, httpx.HTTPError))), error)
        status = _status(error)
        if isinstance(cause, OfflineModeIsEnabled):
            advice = "Unset HF_HUB_OFFLINE."
        elif status in (401, 403):
            advice = "Log in with `hf auth login` or set HF_TOKEN, with a token that may write there."
        elif is_transient(error) or status in _CONFLICT:
            advice = "The same command goes on where this one stopped."
        elif status is not None:
            advice = "Check the name and the branch."
        else:
            advice = ""
        text = one_line(cause)
        for secret in {token if isinstance(token, str) else None, get_token()} - {None}:
            text = text.replace(secret, "***")
        raise OSError(f"cannot {task}: {text} {advice}".rstrip()) from error


def one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    return " ".join((str(error) or type(error).__name__).split())


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what caused it, what caused that, and so on."""
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status of the answer that caused an error."""
    for e in chain(error):
        if isinstance(e, HfHubHTTPError) and getattr(e, "response", None) is not None:
            return e.response.status_code
    return None
