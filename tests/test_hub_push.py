"""Pushes to a stand-in for the Hub, over the real client: what they send, what they keep, and what they download."""

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants, repocard
from transformers import AutoModel

from hf_diffusionblocks import BlockedDiTModel
from hf_diffusionblocks import retrying as retrying_module
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.families.causal_lm import BlockedForCausalLM
from hf_diffusionblocks.hub import model_card, write_model_card
from hf_diffusionblocks.repository import complete_card, push_directory
from hf_diffusionblocks.serialization import INDEX_NAME, SHARED_NAME, block_file, same_tensors
from hf_diffusionblocks.units import human_bytes
from hub_server import HubServer, Request
from tiny import tiny_dit
from tiny_text import base_config, blocked_lm

REPO = "someone/tiny"
TOKEN = "hf_a_secret_of_these_tests"
PUSHED = {block_file(b) for b in range(3)} | {SHARED_NAME, INDEX_NAME, "config.json", "README.md"}


@contextlib.contextmanager
def connected(hub: HubServer, cache: Path) -> Iterator[None]:
    """The client of this process talks to a stand-in, as HF_ENDPOINT makes it do in a new one."""
    constants = huggingface_hub.constants
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(retrying_module, "_SECONDS", 0.01)
        patch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.close_session()
        try:
            yield
        finally:
            huggingface_hub.close_session()


@pytest.fixture
def hub(tmp_path) -> Iterator[HubServer]:
    with HubServer(token=TOKEN).running() as server, connected(server, tmp_path / "hub-cache"):
        yield server


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Folders `whole` and `job-0` to `job-2`, each of one block; not to be changed."""
    root = tmp_path_factory.mktemp("saved")
    tiny_dit(3).save_pretrained(root / "whole")
    for b in range(3):
        tiny_dit(3, blocks=[b]).save_pretrained(root / f"job-{b}")
    return root


def changed(hub: HubServer, number: int = 0) -> set[str]:
    """Files that a commit touched; 0 is the newest."""
    history = hub.repositories[REPO].history()
    after, before = history[number].files, history[number + 1].files
    return {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)}


def index_of(hub: HubServer) -> dict[str, Any]:
    return json.loads(hub.files(REPO)[INDEX_NAME])


# -- what a push sends -------------------------------------------------------------------------------------------


def test_a_whole_model_goes_as_one_commit_and_comes_back(hub, original, tmp_path):
    push = tiny_dit(3).push_to_hub(REPO)
    assert set(hub.files(REPO)) == PUSHED | {".gitattributes"}
    assert [c.summary for c in hub.repositories[REPO].history()] == ["Model of 3 blocks", "initial commit"]
    assert push.commit == hub.repositories[REPO].branches["main"] and {f.action for f in push.files} == {"add"}
    for name in PUSHED - {"README.md"}:
        assert hub.files(REPO)[name] == (original / "whole" / name).read_bytes(), name
    loaded = AutoModel.from_pretrained(REPO)
    assert same_tensors(loaded.state_dict(), tiny_dit(3).state_dict())


def test_a_block_touches_its_file_the_index_and_the_card_only(hub, original):
    push_directory(original / "whole", REPO)
    push = tiny_dit(3, seed=5).push_to_hub(REPO, blocks=[1])
    assert changed(hub) == {block_file(1), INDEX_NAME, "README.md"} == {f.name for f in push.files}
    expected = {k: v for k, v in tiny_dit(3).state_dict().items() if not k.startswith("blocks.1.")} | {
        k: v for k, v in tiny_dit(3, seed=5).state_dict().items() if k.startswith("blocks.1.")
    }
    assert same_tensors(BlockedDiTModel.from_pretrained(REPO).state_dict(), expected)
    assert hub.repositories[REPO].history()[0].summary == "Blocks 1"


def test_blocks_pushed_one_by_one_make_the_whole_model(hub, original):
    for b in (2, 0, 1):
        push_directory(original / f"job-{b}", REPO)
        if b != 2:
            assert changed(hub) == {block_file(b), INDEX_NAME, "README.md"}
    for name in PUSHED - {"README.md"}:
        assert hub.files(REPO)[name] == (original / "whole" / name).read_bytes(), name
    assert "not here yet" not in hub.files(REPO)["README.md"].decode()


def test_a_push_of_what_is_there_sends_nothing(hub, original):
    push_directory(original / "whole", REPO)
    count = len(hub.repositories[REPO].commits)
    for blocks in (None, [0], [1, 2]):
        push = push_directory(original / "whole", REPO, blocks=blocks)
        assert push.files == () and push.commit is None and "nothing to send" in str(push)
    assert len(hub.repositories[REPO].commits) == count


def test_a_smaller_model_takes_the_other_blocks_away(hub, original):
    push_directory(original / "whole", REPO)
    model = tiny_dit(2, 4, seed=3)
    push = model.push_to_hub(REPO)
    assert {f.name: f.action for f in push.files}[block_file(2)] == "remove"
    assert set(hub.files(REPO)) == PUSHED - {block_file(2)} | {".gitattributes"}
    assert same_tensors(BlockedDiTModel.from_pretrained(REPO).state_dict(), model.state_dict())


def test_a_branch_and_a_private_repository(hub, original):
    push_directory(original / "job-0", REPO, private=True)
    push_directory(original / "job-1", REPO, revision="trial")
    assert hub.repositories[REPO].private
    assert block_file(1) not in hub.files(REPO) and block_file(1) in hub.files(REPO, "trial")
    for name, blocks in (("main", [0]), ("trial", [0, 1])):
        assert BlockedDiTModel.from_pretrained(REPO, blocks=blocks, revision=name).resident_blocks == tuple(blocks)
    with pytest.raises(OSError, match="nowhere is not a valid git identifier"):
        AutoModel.from_pretrained(REPO, revision="nowhere")


def test_a_language_model_lists_the_blocks_that_were_trained(hub):
    for b in (0, 1):
        torch.manual_seed(4)
        model = BlockedForCausalLM(BlockedForCausalLM.config_from(base_config(), 2, context="independent"), blocks=[b])
        model.config.trained_blocks = [b]
        model.push_to_hub(REPO)
    assert changed(hub) == {block_file(1), INDEX_NAME, "README.md", "config.json"}
    loaded = BlockedForCausalLM.from_pretrained(REPO)
    assert loaded.config.trained_blocks == [0, 1]
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.pipeline_tag == "text-generation"


def test_another_model_or_other_shared_parts_are_refused(hub, original):
    push_directory(original / "whole", REPO)
    before = hub.files(REPO)
    with pytest.raises(ValueError, match=f"{REPO} holds another model: its overlap is 0.05, this one's 0.1"):
        tiny_dit(3, blocks=[1], overlap=0.1).push_to_hub(REPO)
    lm = blocked_lm(num_blocks=2, context="independent")
    lm.push_to_hub("someone/lm")
    with torch.no_grad():
        lm.embed_tokens.weight.add_(1)
    with pytest.raises(ValueError, match="what the blocks share differs: shared.safetensors of someone/lm"):
        lm.push_to_hub("someone/lm", blocks=[1])
    assert hub.files(REPO) == before


def test_a_broken_or_missing_file_is_not_sent(hub, original, tmp_path):
    saved = Path(shutil.copytree(original / "whole", tmp_path / "model"))
    with pytest.raises(ValueError, match=r"holds blocks \[0, 1, 2\]; there are no blocks \[7\]"):
        push_directory(saved, REPO, blocks=[7])
    with pytest.raises(ValueError, match="block 1 is not loaded"):
        tiny_dit(3, blocks=[0]).push_to_hub(REPO, blocks=[1])
    content = bytearray((saved / block_file(1)).read_bytes())
    content[-1] ^= 1
    (saved / block_file(1)).write_bytes(content)
    with pytest.raises(ValueError, match=r"block-01.safetensors \(block 1\) .* is corrupted"):
        push_directory(saved, REPO)
    with pytest.raises(ValueError, match="holds no saved model"):
        push_directory(tmp_path, REPO)
    assert hub.repositories == {}


# -- dry runs ----------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_what_would_be_sent_and_changes_nothing(hub, original):
    push = push_directory(original / "whole", REPO, dry_run=True)
    assert hub.repositories == {} and {r.method for r in hub.requests} == {"GET"}
    assert {f.name for f in push.files} == PUSHED and push.parent is None
    push_directory(original / "job-0", REPO)
    seen = len(hub.requests)
    planned = push_directory(original / "job-1", REPO, dry_run=True)
    assert {r.method for r in hub.requests[seen:]} <= {"GET", "HEAD"}
    sent = push_directory(original / "job-1", REPO)
    assert planned.files == sent.files and planned.parent == sent.parent
    size = (original / "job-1" / block_file(1)).stat().st_size
    assert f"add    {human_bytes(size):>10}  {block_file(1)}" in str(planned)


@pytest.mark.parametrize("how", ["no connection", "HF_HUB_OFFLINE is set"])
def test_a_dry_run_without_the_hub_shows_the_most_that_would_be_sent(hub, original, monkeypatch, capsys, how):
    with monkeypatch.context() as patch:
        if how == "no connection":
            patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
        else:
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        huggingface_hub.close_session()
        planned = push_directory(original / "job-1", REPO, dry_run=True)
        assert main(["push", str(original / "job-1"), REPO, "--dry-run"]) == 0
        with pytest.raises(OSError, match="cannot push to someone/tiny"):
            push_directory(original / "job-1", REPO)
    told = capsys.readouterr().out
    assert told.strip() == str(planned) and TOKEN not in told and hub.requests == []
    assert f"The Hub was not asked ({how})" in told and "whether someone/tiny exists" in told
    size = (original / "job-1" / block_file(1)).stat().st_size
    assert f"send   {human_bytes(size):>10}  {block_file(1)}" in told
    huggingface_hub.close_session()
    sent = push_directory(original / "job-1", REPO)  # to an empty repository: just that
    assert [(f.name, f.size) for f in planned.files] == [(f.name, f.size) for f in sent.files]


def test_a_name_without_a_user_is_that_of_the_one_who_is_logged_in(hub, original, capsys, monkeypatch):
    push_directory(original / "job-0", REPO)
    for dry in (["--dry-run"], []):
        assert main(["push", str(original / "job-1"), REPO.partition("/")[2], *dry]) == 0
        told = capsys.readouterr().out
        assert f"sent to {REPO}:" in told and SHARED_NAME not in told
    assert f"next: diffusionblocks sample {REPO}" in told and set(hub.repositories) == {REPO}
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("hf_diffusionblocks.repository.pushing.get_token", lambda: None)
    seen = len(hub.requests)
    for name, says in (("badname", "write user/badname, or log in"), ("bad name", "Repo id must")):
        for dry in (["--dry-run"], []):
            assert main(["push", str(original / "job-1"), name, *dry]) == 2
            assert says in capsys.readouterr().err
    assert len(hub.requests) == seen


# -- pushes that meet --------------------------------------------------------------------------------------------


def test_concurrent_pushes_of_all_blocks_lose_nothing(hub, original):
    errors: list[BaseException] = []
    start = threading.Barrier(3)

    def push(block: int) -> None:
        try:
            start.wait()
            push_directory(original / f"job-{block}", REPO)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=push, args=(b,)) for b in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for name in PUSHED - {"README.md"}:
        assert hub.files(REPO)[name] == (original / "whole" / name).read_bytes(), name
    assert "not here yet" not in hub.files(REPO)["README.md"].decode()
    assert len(hub.repositories[REPO].history()) == 4


def test_a_push_that_comes_second_is_made_again_on_top(hub, original):
    push_directory(original / "job-0", REPO)
    meeting = [lambda: push_directory(original / "job-2", REPO)]

    def meet(request: Request) -> None:
        if meeting and request.method == "POST" and "/commit/" in request.path:
            other = meeting.pop()
            thread = threading.Thread(target=other)
            hub.lock.release()  # the handler asks its faults under the lock
            try:
                thread.start()
                thread.join()
            finally:
                hub.lock.acquire()

    hub.faults.append(meet)
    push_directory(original / "job-1", REPO)
    assert [c.summary for c in hub.repositories[REPO].history()][:3] == ["Blocks 1", "Blocks 2", "Blocks 0"]
    assert {block_file(b) for b in range(3)} <= set(index_of(hub)["weight_map"].values())
    assert len(hub.asked("PUT", "/lfs/")) == 4  # three blocks and what they share, none twice


def test_a_push_gives_up_after_too_many_conflicts(hub, original, monkeypatch):
    monkeypatch.setattr(retrying_module, "_MAX_CONFLICTS", 3)
    monkeypatch.setattr(retrying_module, "_SECONDS", 0.0)
    hub.drop("POST", "/commit/", times=100, how=412)
    with pytest.raises(OSError, match=f"cannot push to {REPO}: .*The same command goes on"):
        push_directory(original / "job-1", REPO)
    assert len(hub.asked("POST", "/commit/")) == 4


# -- connections that fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, pattern", [("POST", "create"), ("GET", "/api/models"), ("POST", "preupload"), ("POST", "batch")]
)
@pytest.mark.parametrize("how", ["drop", 503])
def test_a_push_survives_a_dropped_request(hub, original, method, pattern, how, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's own waits
    hub.drop(method, pattern, times=1, how=how)
    push_directory(original / "job-1", REPO)
    assert hub.files(REPO)[block_file(1)] == (original / "job-1" / block_file(1)).read_bytes()


@pytest.mark.parametrize("how", ["half", "drop", "after"])
@pytest.mark.parametrize("pattern", ["/lfs/", "/commit/"])
def test_a_connection_dropped_in_the_middle_of_a_push(hub, original, pattern, how, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    push_directory(original / "job-0", REPO)
    hub.drop("PUT" if pattern == "/lfs/" else "POST", pattern, times=2, how=how)
    push_directory(original / "job-1", REPO)
    assert changed(hub) == {block_file(1), INDEX_NAME, "README.md"}
    assert len(hub.repositories[REPO].history()) == 3  # one commit, even if its answer was lost
    assert BlockedDiTModel.from_pretrained(REPO, blocks=[0, 1]).resident_blocks == (0, 1)


def test_a_hub_that_stays_away_ends_in_one_line_and_the_push_can_be_repeated(hub, original, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    push_directory(original / "job-0", REPO)
    before = hub.files(REPO)
    hub.drop("POST", "/commit/", times=10**6)
    with pytest.raises(OSError, match=f"cannot push to {REPO}: .* The same command goes on where") as caught:
        push_directory(original / "job-1", REPO)
    assert "\n" not in str(caught.value)
    assert hub.files(REPO) == before
    hub.faults.clear()
    uploads = len(hub.asked("PUT", "/lfs/"))
    push_directory(original / "job-1", REPO)
    assert len(hub.asked("PUT", "/lfs/")) == uploads  # what had been sent is used


@pytest.mark.parametrize("how", ["drop", "half"])
def test_a_download_that_is_dropped_is_taken_up_again(hub, original, how, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    push_directory(original / "whole", REPO)
    hub.drop("GET", block_file(1), times=2, how=how)
    loaded = BlockedDiTModel.from_pretrained(REPO, blocks=[1])
    assert same_tensors(loaded.state_dict(), tiny_dit(3, blocks=[1]).state_dict())
    assert len(hub.asked("GET", block_file(1))) == 3


def test_a_file_that_cannot_be_fetched_is_named_with_its_block(hub, original, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    push_directory(original / "whole", REPO)
    hub.drop("GET", block_file(1), times=10**6)
    with pytest.raises(OSError, match=rf"cannot get block-01.safetensors \(block 1\) of {REPO}"):
        BlockedDiTModel.from_pretrained(REPO, blocks=[1])
    assert BlockedDiTModel.from_pretrained(REPO, blocks=[0]).resident_blocks == (0,)


# -- downloads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [BlockedDiTModel, AutoModel])
def test_one_block_downloads_its_own_files_only(hub, original, load):
    push_directory(original / "whole", REPO)
    hub.requests.clear()
    loaded = load.from_pretrained(REPO, blocks=[1])
    assert same_tensors(loaded.state_dict(), tiny_dit(3, blocks=[1]).state_dict())
    fetched = {path.split("/")[-1] for path in hub.asked("GET", "/resolve/")}
    assert fetched == {"config.json", INDEX_NAME, block_file(1)}
    assert not [r.path for r in hub.requests if re.search("block-0[02]", r.path)]


def test_a_revision_is_loaded_as_it_was(hub, original):
    first = push_directory(original / "whole", REPO)
    second = tiny_dit(3, seed=5).push_to_hub(REPO, blocks=[1])
    for push, seed in ((first, 0), (second, 5)):
        loaded = BlockedDiTModel.from_pretrained(REPO, blocks=[1], revision=push.commit)
        assert same_tensors(loaded.state_dict(), tiny_dit(3, blocks=[1], seed=seed).state_dict())


def test_a_push_in_the_middle_of_a_download_does_not_mix_revisions(hub, original):
    push_directory(original / "whole", REPO)
    meeting: list[Callable] = [lambda: tiny_dit(3, seed=5).push_to_hub(REPO)]

    def meet(request: Request) -> None:
        if meeting and request.method == "HEAD" and request.path.endswith(block_file(0)):
            thread = threading.Thread(target=meeting.pop())
            hub.lock.release()
            try:
                thread.start()
                thread.join()
            finally:
                hub.lock.acquire()

    hub.faults.append(meet)
    loaded = BlockedDiTModel.from_pretrained(REPO)
    assert not meeting
    assert same_tensors(loaded.state_dict(), tiny_dit(3).state_dict())
    assert same_tensors(BlockedDiTModel.from_pretrained(REPO).state_dict(), tiny_dit(3, seed=5).state_dict())


# -- cards -------------------------------------------------------------------------------------------------------


def validate(card: ModelCard) -> None:
    """``card.validate()`` of the stand-in: huggingface_hub 1 asks huggingface.co itself, whatever the endpoint is."""
    ask = repocard.get_session().post
    here = SimpleNamespace(post=lambda url, **k: ask(url.replace("https://huggingface.co", constants.ENDPOINT), **k))
    with mock.patch.object(repocard, "get_session", lambda: here):
        card.validate()


def test_a_measured_card_is_valid_and_is_kept_when_blocks_follow(hub, original, tmp_path):
    saved = Path(shutil.copytree(original / "whole", tmp_path / "model"))
    card = model_card(
        tiny_dit(3),
        title="tiny",
        usage="pass",
        figures={"held_out_loss": 0.25},
        dataset="uoft-cs/cifar10",
    )
    write_model_card(saved, card)
    push_directory(saved, REPO)
    tiny_dit(3, seed=5).push_to_hub(REPO, blocks=[1])
    pushed = ModelCard(hub.files(REPO)["README.md"].decode())
    validate(pushed)
    assert "/api/validate-yaml" in hub.asked("POST")
    assert pushed.data.eval_results[0].metric_value == 0.25 and pushed.data.datasets == ["uoft-cs/cifar10"]
    assert "held out loss | 0.25" in pushed.text
    digests = index_of(hub)["metadata"]["sha256"]
    for b in range(3):
        assert f"`{digests[block_file(b)][:16]}`" in pushed.text
    assert pushed.text.count("| block | bytes | sha256 |") == 1


def test_a_new_card_has_the_metadata_that_the_hub_knows(hub):
    config = tiny_dit(3).config.to_dict() | {"base_model": "facebook/DiT-XL-2-256"}
    index = {"metadata": {"sha256": {}, "bytes": {}}, "weight_map": {"blocks.1.w": block_file(1)}}
    card = ModelCard(complete_card(None, config, index))
    validate(card)
    assert card.data.to_dict()["library_name"] == "hf-diffusionblocks"
    assert card.data.base_model == "facebook/DiT-XL-2-256"
    assert card.data.pipeline_tag == "unconditional-image-generation" and "arxiv:2506.14202" in card.data.tags
    assert card.text.count("not here yet") == 2
    assert complete_card(str(card), config, index) == str(card)
    written = complete_card("---\nlicense: mit\n---\nmine\n", config, index)
    assert ModelCard(written).data.license == "mit" and "mine" in written
    with pytest.raises(ValueError, match="valid id"):
        validate(ModelCard(complete_card("---\nbase_model: a b\n---\n", config, index)))


# -- tokens, the command -----------------------------------------------------------------------------------------


def test_the_token_is_sent_and_never_told(hub, original, tmp_path, caplog, capfd):
    saved = Path(shutil.copytree(original / "whole", tmp_path / "model"))
    with caplog.at_level(logging.DEBUG):
        push_directory(saved, REPO, token=TOKEN)
        hub.drop("POST", "/commit/", times=1, how=403)
        with pytest.raises(OSError, match="Log in with `hf auth login` or set HF_TOKEN") as caught:
            tiny_dit(3, seed=5).push_to_hub(REPO, blocks=[1])
    assert any(TOKEN in r.headers.get("authorization", "") for r in hub.requests)
    told = str(caught.value) + caplog.text + "".join(capfd.readouterr())
    stored = b"".join(hub.files(REPO).values()) + b"".join(p.read_bytes() for p in saved.rglob("*") if p.is_file())
    assert TOKEN not in told and TOKEN.encode() not in stored


def test_without_a_token_it_says_how_to_log_in(hub, original, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="cannot push to someone/tiny: .* Log in with `hf auth login`"):
        push_directory(original / "job-0", REPO)


def test_the_command_shows_and_sends(hub, original, capsys):
    command = ["push", str(original / "whole"), REPO]
    assert main([*command, "--dry-run"]) == 0
    assert block_file(2) in capsys.readouterr().out and hub.repositories == {}
    assert main([*command, "--block", "1", "--message", "mine"]) == 0
    assert f"sent to {REPO}: {hub.url}/{REPO}/commit/" in capsys.readouterr().out
    assert hub.repositories[REPO].history()[0].summary == "mine" and block_file(0) not in hub.files(REPO)
    assert main([*command, "--block", "5"]) == 2
    assert "no blocks [5]" in capsys.readouterr().err
    hub.drop("POST", "/commit/", times=1, how=403)
    assert main(command) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"diffusionblocks push: cannot push to {REPO}: ") and "403" in last


def test_a_new_process_finds_the_hub_by_its_environment(original, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "PYTHONWARNINGS": "ignore",
    }
    script = (
        "import sys\n"
        "from hf_diffusionblocks.cli import main\n"
        f"code = main(['push', {str(original / 'job-1')!r}, {REPO!r}])\n"
        "from hf_diffusionblocks import BlockedDiTModel\n"
        f"print(BlockedDiTModel.from_pretrained({REPO!r}, blocks=[1]).resident_blocks)\n"
        "sys.exit(code)\n"
    )
    with HubServer(token=TOKEN).running() as hub:
        environment["HF_ENDPOINT"] = hub.url
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "(1,)" in done.stdout and block_file(1) in hub.files(REPO)
    assert TOKEN not in done.stdout + done.stderr
    stored = [p for p in (tmp_path / "home").rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert stored == []
