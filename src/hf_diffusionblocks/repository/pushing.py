"""A model's repository on the Hub: what a push of some blocks or of all sends, as one commit on top of a known one.

Many people push blocks of one model at the same time. Every commit names the commit that it was made on
(``parent_commit``); if another one came first, the Hub refuses it, and the index and the card are made again on top of
what is there by then. So no push takes back another's.
"""

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .. import serialization
from ..agreement import SAME_MODEL, first_difference
from ..retrying import Retries, in_one_line, why_unreachable
from ..serialization import INDEX_NAME, SHARED_NAME, block_file
from ..strict_json import to_json
from ..units import human_bytes
from .block_table import CARD_NAME, LIBRARY_NAME, complete_card, name_repository
from .saved_model import SavedModel

_WEIGHT_FILE = re.compile(r"shared\.safetensors|block-\d{2,}\.safetensors")


@dataclass(frozen=True)
class SentFile:
    """A file of a commit.

    Attributes:
        name: in the repository.
        size: in bytes; 0 if it is removed.
        action: ``add``, ``change`` or ``remove``; ``send`` if it is not known what is there.
    """

    name: str
    size: int
    action: str


@dataclass(frozen=True)
class Push:
    """What was sent, or with ``dry_run`` would be.

    Attributes:
        repo_id: of the repository.
        revision: the branch; None for the main one.
        parent: the commit that it was made on; None for a repository that does not exist yet.
        files: what the commit touches; empty if the repository holds everything already.
        commit: the new commit; None if there is none.
        url: of the commit or of the pull request.
        unreached: why the Hub could not be asked, in a dry run; ``files`` are then those for an empty repository, the
            most that a push can send.
    """

    repo_id: str
    revision: str | None
    parent: str | None
    files: tuple[SentFile, ...]
    commit: str | None = None
    url: str | None = None
    unreached: str | None = None

    def __str__(self) -> str:
        where = self.repo_id + (f" ({self.revision})" if self.revision else "")
        if self.unreached is not None:
            size = sum(f.size for f in self.files)
            head = f"would be sent to {where}, at most ({len(self.files)} files, {human_bytes(size)}):"
            end = _NOT_KNOWN.format(where=where, reason=self.unreached)
            return "\n".join([head, *map(_line, self.files), end])
        if not self.files:
            return f"{where} holds these blocks already: nothing to send"
        head = f"sent to {where}: {self.url}" if self.url else f"would be sent to {where}:"
        return "\n".join([head, *map(_line, self.files)])


def _line(file: SentFile) -> str:
    return f"  {file.action:<7}{human_bytes(file.size):>10}  {file.name}"


# What a dry run says if the Hub cannot be asked.
_NOT_KNOWN = """\
The Hub was not asked ({reason}), so these are not known:
  whether {where} exists, and whether the token may write there
  which files it holds already: those that are the same are not sent again
  the sizes of config.json, the index and README.md, if they are made on top of those there
  whether it holds another model, or other shared parts, which a push refuses
  which block files of a former model a push of all blocks removes"""


@dataclass(frozen=True)
class LocalModel(SavedModel):
    """A saved model, and which of its blocks are to be sent.

    Attributes:
        whole: whether these are all blocks of the model, so that everything else in the repository is replaced.
    """

    whole: bool

    @property
    def weight_files(self) -> list[str]:
        """Names of the weight files to be sent, what the blocks share among them."""
        return [SHARED_NAME, *(block_file(b) for b in self.blocks)]


@dataclass(frozen=True)
class RemoteModel:
    """What a repository holds at one commit. ``texts`` are those of the config, the index and the card."""

    commit: str | None = None
    digests: dict[str, str | None] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any] | None:
        """The config, None if the repository holds no model."""
        return json.loads(self.texts["config.json"]) if "config.json" in self.texts else None


def read_local(directory: Path, blocks: Sequence[int] | None = None) -> LocalModel:
    """Read a saved model and check the files of the blocks that are to be sent.

    Raises:
        ValueError: if there is no model, a block is not in it, or a file is broken.
    """
    for name in ("config.json", INDEX_NAME):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} holds no saved model: it has no {name}.")
    config = serialization.read_json(directory / "config.json")
    index = serialization.read_index(directory / INDEX_NAME)
    held = sorted(b for b in range(config.get("num_blocks") or 0) if block_file(b) in index["weight_map"].values())
    chosen = held if blocks is None else sorted(set(blocks))
    absent = [b for b in chosen if b not in held]
    if absent or not chosen:
        raise ValueError(f"{directory} holds blocks {held}; there are no blocks {absent} to send.")
    local = LocalModel(directory, config, index, tuple(chosen), blocks is None and len(held) == config["num_blocks"])
    for name in local.weight_files:
        if name != SHARED_NAME or (directory / name).is_file() or name in index["weight_map"].values():
            serialization.verify_file(directory / name, index)
    return local


def read_remote(api: HfApi, repo_id: str, revision: str | None) -> RemoteModel:
    """What a repository holds; nothing if it does not exist."""
    try:
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    except RepositoryNotFoundError:
        return RemoteModel()
    digests = {s.rfilename: s.lfs.sha256 if s.lfs is not None else None for s in info.siblings or []}
    texts = {}
    with tempfile.TemporaryDirectory(prefix="diffusionblocks-") as cache:
        for name in ("config.json", INDEX_NAME, CARD_NAME):
            if name in digests:
                path = Path(api.hf_hub_download(repo_id, name, revision=info.sha, cache_dir=cache))
                if name == INDEX_NAME:
                    serialization.read_index(path)
                elif name == "config.json":
                    serialization.read_json(path)
                texts[name] = path.read_text(encoding="utf-8")
    return RemoteModel(info.sha, digests, texts)


def compose(local: LocalModel, remote: RemoteModel, repo_id: str) -> dict[str, bytes | Path | None]:
    """The files that a commit on top of ``remote`` has to touch: their content or path, or None to remove them.

    Raises:
        ValueError: if the repository holds another model, or other shared parts.
    """
    their_config = remote.config
    joins = not local.whole and their_config is not None
    if joins and their_config is not None:
        difference = first_difference(their_config, local.config, SAME_MODEL)
        if difference is not None:
            name, theirs, ours = difference
            raise ValueError(
                f"{repo_id} holds another model: its {name} is {theirs!r}, this one's {ours!r}. "
                "Push these blocks to a repository of their own."
            )
    index = _merged_index(local, remote if joins else RemoteModel())
    shared_there = joins and SHARED_NAME in remote.digests
    if shared_there and (local.directory / SHARED_NAME).is_file():
        theirs = remote.digests[SHARED_NAME] or _recorded(remote, SHARED_NAME)
        if theirs != local.digest(SHARED_NAME):
            raise ValueError(
                f"what the blocks share differs: {SHARED_NAME} of {repo_id} is not that of {local.directory}. Blocks "
                "of one model need the same shared parts: start all jobs from the same base or seed."
            )
    files: dict[str, bytes | Path | None] = {}
    for name in local.weight_files:
        path = local.directory / name
        if not path.is_file() or (name == SHARED_NAME and shared_there):
            continue
        if name not in remote.digests or remote.digests[name] != local.digest(name):
            files[name] = path
    config = dict(their_config if joins and their_config is not None else local.config)
    if "trained_blocks" in config:
        done = [*(config["trained_blocks"] or []), *(local.config.get("trained_blocks") or [])]
        config["trained_blocks"] = sorted(set(done))
    if not joins:
        files |= dict(local.companions())
        if local.whole:  # a former model's blocks
            keep = {*index["weight_map"].values(), SHARED_NAME}
            files |= {n: None for n in remote.digests if _WEIGHT_FILE.fullmatch(n) and n not in keep}
    card = local.directory / CARD_NAME
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    old = remote.texts.get(CARD_NAME)
    text = name_repository(text, repo_id) if text is not None else None
    text = complete_card((old or text) if joins else (text or old), config, index)
    for name, content in (
        ("config.json", _json(config)),
        (INDEX_NAME, _json(index)),
        (CARD_NAME, text),
    ):
        before = remote.texts.get(name)
        unchanged = before == content or (
            name.endswith(".json") and before is not None and json.loads(before) == json.loads(content)
        )
        if not unchanged:
            files[name] = content.encode()
    return files


def push_directory(
    directory: str | Path,
    repo_id: str,
    *,
    blocks: Sequence[int] | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
) -> Push:
    """Send a saved model, or some of its blocks, to the Hub as one commit.

    A push of some blocks touches their files, the index and the card only; on the first one, and where the config's
    list of trained blocks grows, the config too. A push that meets another one is made again on top of it.

    Args:
        directory: of a saved model.
        repo_id: ``user/model``, or ``model`` alone for the user who is logged in; made if it does not exist.
        blocks: to send; all that the directory holds by default. If these are all blocks of the model, the repository
            then holds this model and no other block files.
        revision: a branch; made if it does not exist.
        private: whether a new repository is private.
        token: as in ``huggingface_hub``; by default the one of ``hf auth login``. Never logged or written.
        commit_message: one is made up by default.
        commit_description: of the commit.
        create_pr: open a pull request instead.
        dry_run: send nothing, make nothing. Without a connection, or with ``HF_HUB_OFFLINE``, it tells the most that
            would be sent, and what only the Hub knows.

    Returns:
        What was sent, or would be.

    Raises:
        ValueError: if the repository holds another model, the directory none, or the name is none of a repository.
        OSError: if the Hub cannot be reached or refuses; what was sent so far is used when the push is repeated.
    """
    _check_name(repo_id, token)
    local = read_local(Path(directory), blocks)
    if dry_run:
        return _dry_run(local, repo_id, revision, token)
    if commit_message is None:
        numbers = ", ".join(map(str, local.blocks))
        commit_message = f"Model of {len(local.blocks)} blocks" if local.whole else f"Blocks {numbers}"
    api = HfApi(token=token, library_name=LIBRARY_NAME)
    retries = Retries()
    with in_one_line(f"push to {repo_id}", token):
        repo_id = retries.call(api.create_repo, repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            retries.call(api.create_branch, repo_id, branch=revision, exist_ok=True)
        while True:
            remote = retries.call(read_remote, api, repo_id, revision)
            files = compose(local, remote, repo_id)
            push = Push(repo_id, revision, remote.commit, _all_sent(files, remote))
            if not files:
                return push
            try:
                info = api.create_commit(
                    repo_id,
                    [_operation(name, content) for name, content in sorted(files.items())],
                    commit_message=commit_message,
                    commit_description=commit_description,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=remote.commit,
                )
            except Exception as error:
                retries.pause(error)  # raises it again if trying again is of no use
            else:
                return replace(push, commit=info.oid, url=info.pr_url or info.commit_url)


def _dry_run(local: LocalModel, repo_id: str, revision: str | None, token: str | bool | None) -> Push:
    """What a push would send; if the Hub cannot be asked, what it would send to an empty repository."""
    api = HfApi(token=token, library_name=LIBRARY_NAME)
    try:
        with in_one_line(f"push to {repo_id}", token):
            once = Retries(failures=1)
            if "/" not in repo_id:  # as create_repo does; without it, another's repository of that name would be read
                repo_id = f"{once.call(api.whoami)['name']}/{repo_id}"
            remote = once.call(read_remote, api, repo_id, revision)
    except OSError as error:
        reason = why_unreachable(error)
        if reason is None:
            raise
        files = _all_sent(compose(local, RemoteModel(), repo_id), RemoteModel())
        return Push(repo_id, revision, None, tuple(replace(f, action="send") for f in files), unreached=reason)
    return Push(repo_id, revision, remote.commit, _all_sent(compose(local, remote, repo_id), remote))


def _check_name(repo_id: str, token: str | bool | None) -> None:
    """A name without a user belongs to the one who is logged in, so there has to be one."""
    validate_repo_id(repo_id)
    if "/" not in repo_id and (token is False or not (isinstance(token, str) or get_token())):
        raise ValueError(
            f"{repo_id!r} names no user, and nobody is logged in: write user/{repo_id}, or log in with `hf auth login`."
        )


# -- pieces -------------------------------------------------------------------------------------------------------


def _recorded(remote: RemoteModel, name: str) -> str | None:
    """The SHA-256 that a repository's index gives for a file."""
    if INDEX_NAME not in remote.texts:
        return None
    return json.loads(remote.texts[INDEX_NAME])["metadata"].get("sha256", {}).get(name)


def _merged_index(local: LocalModel, remote: RemoteModel) -> dict[str, Any]:
    """The local entries of what is sent, and the remote ones of the other files that are there."""
    ours = set(local.weight_files)
    theirs = json.loads(remote.texts[INDEX_NAME]) if INDEX_NAME in remote.texts else {"weight_map": {}, "metadata": {}}
    kept = {name for name in remote.digests if _WEIGHT_FILE.fullmatch(name)} - ours
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for source, names in ((theirs, kept), (local.index, ours)):
        index["weight_map"] |= {k: f for k, f in source["weight_map"].items() if f in names}
        for kind in ("sha256", "bytes"):
            values = source["metadata"].get(kind, {})
            index["metadata"].setdefault(kind, {}).update({f: v for f, v in values.items() if f in names})
    index["metadata"]["total_size"] = sum(index["metadata"]["bytes"].values())
    return index


def _json(value: dict[str, Any]) -> str:
    return to_json(value, indent=2, sort_keys=True) + "\n"


def _operation(name: str, content: bytes | Path | None) -> CommitOperationAdd | CommitOperationDelete:
    return CommitOperationDelete(name) if content is None else CommitOperationAdd(name, content)


def _all_sent(files: dict[str, bytes | Path | None], remote: RemoteModel) -> tuple[SentFile, ...]:
    return tuple(_sent(name, content, remote) for name, content in sorted(files.items()))


def _sent(name: str, content: bytes | Path | None, remote: RemoteModel) -> SentFile:
    if content is None:
        return SentFile(name, 0, "remove")
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    return SentFile(name, size, "change" if name in remote.digests else "add")
