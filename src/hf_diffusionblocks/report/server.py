"""``diffusionblocks watch``: a run as a live page, served on the loopback address from the run's own files."""

import os
import sys
import threading
import webbrowser
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..run_names import REPORT_NAME
from ..strict_json import known, to_json
from .page import TEMPLATES, announcement, live_page, page_title, sections, served_at
from .run_state import RunReader

HOST = "127.0.0.1"
_HOSTS = {"127.0.0.1", "localhost"}  # what a browser may call it: another name is another site's, led here
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_CLOSED = "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class RunServer(ThreadingHTTPServer):
    """Serves one run's page to this machine. Known paths only; no path of a request is ever joined to a directory.

    Args:
        directory: of the run, which need not be there yet.
        port: 0 takes a free one.

    Raises:
        ValueError: if ``directory`` is a file.
        OSError: if the port is taken.
    """

    daemon_threads = True

    def __init__(self, directory: Path, port: int = 0):
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"{directory} is a file: give a run's directory, such as runs/digits-dit.")
        self.reader, self.lock = RunReader(directory), threading.Lock()
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def answer(self, path: str) -> tuple[bytes, str, str] | None:
        """What lies at a path: content, its type and its security policy; None for what is not known."""
        if path in ("/", "/state.json"):
            with self.lock:
                run = self.reader.read()
                if path == "/":
                    return live_page(run, served_at).encode(), "text/html; charset=utf-8", _POLICY
                state = {
                    "name": run.name,
                    "state": run.state,
                    "title": page_title(run, live=True),
                    "announcement": announcement(run),
                    "sections": sections(run, served_at, live=True),
                }
            return to_json(known(state)).encode(), "application/json", _POLICY
        if path in ("/style.css", "/watch.js"):
            kind = "text/css" if path == "/style.css" else "text/javascript"
            return (TEMPLATES / path[1:]).read_bytes(), f"{kind}; charset=utf-8", _POLICY
        if path == f"/{REPORT_NAME}":
            report = self.reader.directory / REPORT_NAME
            inside = report.resolve().is_relative_to(self.reader.directory.resolve())
            return (report.read_bytes(), "text/html; charset=utf-8", _REPORT_POLICY) if inside else None
        if path.startswith("/file/"):
            picture = self.reader.pictures().get(unquote(path.removeprefix("/file/")))
            return None if picture is None else (picture.path.read_bytes(), "image/png", _POLICY)
        return None


class _Handler(BaseHTTPRequestHandler):
    server: RunServer
    server_version, sys_version = "diffusionblocks", ""

    def do_GET(self) -> None:
        if self.headers.get("Host", "").split(":")[0].lower() not in _HOSTS:
            self.send_error(HTTPStatus.FORBIDDEN, "This page is for this machine only")
            return
        try:
            found = self.server.answer(urlsplit(self.path).path)
        except FileNotFoundError:
            found = None
        except OSError:  # a file of the run is being replaced, or may not be read
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE)
            return
        if found is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        content, kind, policy = found
        self.send_response(HTTPStatus.OK)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **_HEADERS}.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", policy + _CLOSED)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing: a page that asks every two seconds would fill the terminal."""

    def handle(self) -> None:
        """A browser that went away in the middle of an answer is no error."""
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True


def watch(
    directory: Path, port: int | None = None, open_browser: bool = True, say: Callable[[str], None] = print
) -> None:
    """Serve a run's page until Ctrl-C.

    Args:
        directory: of the run, which need not be there yet.
        port: of the page; None takes a free one.
        open_browser: also open the page, where there is a screen.
        say: prints.

    Raises:
        ValueError: if ``directory`` is a file.
        OSError: if the port is taken.
    """
    try:
        server = RunServer(directory, port or 0)
    except OSError as error:
        raise OSError(f"cannot serve on port {port}: {error.strerror}. Give another --port, or none.") from error
    with server:
        say(f"watching {directory} on {server.url} (Ctrl-C ends the page, not the run)")
        sys.stdout.flush()
        has_screen = sys.platform in ("darwin", "win32") or any(n in os.environ for n in ("DISPLAY", "WAYLAND_DISPLAY"))
        if open_browser and has_screen:
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("\nthe page is closed; a run that goes on is not touched.")
