"""A stand-in for the Hub on 127.0.0.1: the endpoints that `huggingface_hub` asks, over real HTTP.

Repositories are lists of commits in memory. A commit that names a parent other than the branch's head is refused with
412, as the Hub does. Faults can be set: a connection that is dropped before, in the middle of or after a request, or a
status. `python tests/hub_server.py` serves until it is stopped and prints its address.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_LFS_SUFFIXES = (".safetensors", ".bin", ".pt")


@dataclass(frozen=True)
class Request:
    """What was asked: method, path without its query, headers in lower case, bytes of the body."""

    method: str
    path: str
    headers: dict[str, str]
    size: int


@dataclass
class Commit:
    """A state of a repository; what was large is named in `large`."""

    oid: str
    parent: str | None
    summary: str
    files: dict[str, bytes]
    large: set[str]


@dataclass
class Repository:
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    private: bool = False

    def commit(self, branch: str, files: dict[str, bytes], large: set[str], summary: str) -> Commit:
        parent = self.branches.get(branch)
        text = f"{parent} {summary} {len(self.commits)} {sorted(files)}"
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, summary, files, large)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))

    def history(self, branch: str = "main") -> list[Commit]:
        """Commits of a branch, the newest first."""
        found, oid = [], self.branches[branch]
        while oid is not None:
            found.append(self.commits[oid])
            oid = self.commits[oid].parent
        return found


# What a fault does to a request: "drop" before it is read, "half" while its body is sent or its answer is read,
# "after" it took effect; or the status that is answered. None lets it pass.
Fault = Callable[[Request], str | int | None]


class HubServer:
    """The state behind the handler.

    Attributes:
        repositories: by id.
        requests: what was asked, in order.
        faults: each is asked about each request; the first that answers decides.
        token: what writing needs, if not None.
    """

    def __init__(self, token: str | None = None):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.token = token
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @contextmanager
    def running(self) -> Iterator["HubServer"]:
        self.thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        return self.repositories[repo_id].at(revision).files

    def asked(self, method: str, pattern: str = "") -> list[str]:
        """Paths of the requests of a method that match."""
        return [r.path for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def drop(self, method: str, pattern: str, times: int = 1, how: str | int = "drop") -> None:
        """Let the next requests of a kind fail."""
        left = [times]

        def fault(request: Request) -> str | int | None:
            if left[0] and request.method == method and re.search(pattern, request.path):
                left[0] -= 1
                return how
            return None

        self.faults.append(fault)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        path = unquote(split.path)
        size = int(self.headers.get("Content-Length") or 0)
        request = Request(self.command, path, {k.lower(): v for k, v in self.headers.items()}, size)
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = next((f for f in (fault(request) for fault in self.hub.faults) if f is not None), None)
        self.fault = fault
        if fault == "drop" or (fault == "half" and self.command in ("POST", "PUT")):
            self.rfile.read(size // 2 if fault == "half" else 0)
            self._cut()
            return
        self.body = self._read_body(size)
        if isinstance(fault, int):
            self._answer(fault, {"error": "a fault"})
            return
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                writes = method in ("POST", "PUT") and not path.startswith("/lfs/") and "validate-yaml" not in path
                if writes and self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
                    self._answer(401, {"error": "Invalid credentials in Authorization header"})
                else:
                    action(self, *match.groups())
                return
        self._answer(404, {"error": f"no such endpoint: {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read_body(self, size: int) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(size)
        parts = []
        while length := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _cut(self) -> None:
        """Drop the connection at once, with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _answer(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        if self.fault == "after":
            self._cut()
            return
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
        if status >= 400 and isinstance(value, dict) and "error" in value:
            headers["X-Error-Message"] = value["error"]
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "half":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self._cut()
            return
        self.wfile.write(content)

    def _missing(self, code: str, message: str) -> None:
        self._answer(404, {"error": message}, {"X-Error-Code": code})

    # -- endpoints ------------------------------------------------------------------------------------------------

    def create(self) -> None:
        values = json.loads(self.body)
        repo_id = f"{values.get('organization') or 'someone'}/{values['name']}"
        with self.hub.lock:
            if repo_id in self.hub.repositories:
                self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"})
                return
            repository = self.hub.repositories[repo_id] = Repository(private=values.get("visibility") == "private")
            text = b"".join(b"*%s filter=lfs\n" % s.encode() for s in _LFS_SUFFIXES)
            repository.commit("main", {".gitattributes": text}, set(), "initial commit")
        self._answer(200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def whoami(self) -> None:
        self._answer(200, {"type": "user", "name": "someone"})

    def branch(self, repo_id: str, name: str) -> None:
        repository = self.hub.repositories[repo_id]
        with self.hub.lock:
            if name in repository.branches:
                self._answer(409, {"error": "Reference already exists"})
                return
            repository.branches[name] = repository.branches["main"]
        self._answer(200, {})

    def info(self, repo_id: str, revision: str | None = None) -> None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None:
            return self._missing("RepoNotFound", "Repository not found")
        commit = repository.at(revision or "main")
        if commit is None:
            return self._missing("RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = []
        for name, content in sorted(commit.files.items()):
            sibling: dict[str, Any] = {"rfilename": name}
            if "blobs" in self.query:
                sibling |= {"size": len(content), "blobId": _blob_id(content)}
                if name in commit.large:
                    digest = hashlib.sha256(content).hexdigest()
                    sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
        values = {"id": repo_id, "sha": commit.oid, "siblings": siblings, "private": repository.private}
        self._answer(200, values | {"tags": [], "downloads": 0, "likes": 0})

    def preupload(self, repo_id: str, revision: str) -> None:
        commit = self.hub.repositories[repo_id].at(revision)
        files = []
        for item in json.loads(self.body)["files"]:
            name = item["path"]
            large = name.endswith(_LFS_SUFFIXES)
            entry = {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if commit is not None and name in commit.files:
                content = commit.files[name]
                entry["oid"] = hashlib.sha256(content).hexdigest() if name in commit.large else _blob_id(content)
            files.append(entry)
        self._answer(200, {"files": files})

    def batch(self, repo_id: str) -> None:
        objects = []
        for item in json.loads(self.body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"},
                    "verify": {"href": f"{self.hub.url}/{repo_id}.git/info/lfs/verify"},
                }
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._answer(400, {"error": "the content does not match the oid"})
            return
        self.hub.objects[oid] = self.body
        self._answer(200, {})

    def verify(self, repo_id: str) -> None:
        values = json.loads(self.body)
        whole = len(self.hub.objects.get(values["oid"], b"")) == values["size"]
        self._answer(200 if whole else 404, {} if whole else {"error": "no such object"})

    def commit(self, repo_id: str, branch: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        repository = self.hub.repositories[repo_id]
        with self.hub.lock:
            head = repository.at(branch)
            if head is None:
                return self._missing("RevisionNotFound", f"Invalid rev id: {branch}")
            if header.get("parentCommit") not in (None, head.oid):
                message = "A commit has happened since. Please refresh and try again."
                return self._answer(412, {"error": message})
            files, large = dict(head.files), set(head.large)
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        return self._answer(400, {"error": f"LFS object {value['oid']} was not uploaded"})
                    files[value["path"]] = self.hub.objects[value["oid"]]
                    large.add(value["path"])
                elif line["key"] == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        return self._missing("EntryNotFound", "A file with this name doesn't exist")
            made = repository.commit(branch, files, large & files.keys(), header["summary"])
        values = {"success": True, "commitOid": made.oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{made.oid}"}
        self._answer(200, values)

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None:
            return self._missing("RepoNotFound", "Repository not found")
        commit = repository.at(revision)
        if commit is None:
            return self._missing("RevisionNotFound", f"Invalid rev id: {revision}")
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if name not in commit.files:
            self._answer(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
            return
        content = commit.files[name]
        if name in commit.large:
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
        headers["ETag"] = f'"{_blob_id(content)}"'
        status, span = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span:
            start, end = int(span[1]), int(span[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            status, content = 206, content[start : end + 1]
        self._answer(status, content, headers)

    def validate(self) -> None:
        """The parts of the Hub's check of a card that its documentation states."""
        content = json.loads(self.body)["content"]
        match = re.match(r"^---\n(.*?)\n---", content, re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            return self._answer(400, str(error).encode())
        problems = []
        for name, kinds in (("library_name", str), ("pipeline_tag", str), ("tags", list), ("model-index", list)):
            if name in data and not isinstance(data[name], kinds):
                problems.append(f'"{name}" must be a {kinds.__name__}')
        for name in ("base_model", "datasets"):
            values = data.get(name) or []
            for value in values if isinstance(values, list) else [values]:
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(value)):
                    problems.append(f'"{name}" {value!r} is not a valid id')
        for model in data.get("model-index") or []:
            for result in model.get("results", []):
                for metric in result.get("metrics", []):
                    if "type" not in metric or "value" not in metric:
                        problems.append('"model-index": a metric needs a type and a value')
        if problems:
            self._answer(400, "; ".join(problems).encode())
        else:
            self._answer(200, {"errors": [], "warnings": []})


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_ID}/branch/(.+)", _Handler.branch),
    ("GET", rf"/api/models/{_ID}", _Handler.info),
    ("GET", rf"/api/models/{_ID}/revision/(.+)", _Handler.info),
    ("POST", rf"/api/models/{_ID}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_ID}/commit/(.+)", _Handler.commit),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.batch),
    ("POST", rf"/{_ID}\.git/info/lfs/verify", _Handler.verify),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Handler.upload),
    ("HEAD", rf"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", rf"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


if __name__ == "__main__":
    hub = HubServer()
    print(hub.url, flush=True)
    with hub.running():
        hub.thread.join()
