"""Names that lead to no model: what is said of them is what is known, whether the Hub answered or not."""

import httpx
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from hf_diffusionblocks.cli import main
from hf_diffusionblocks.jobs import common, family_of
from hub_server import HubServer, Repository
from test_hub_push import TOKEN, connected

COMMANDS = [
    ["sample", "user/model", "--prompt", "x"],
    ["sample", "user/model"],
    ["evaluate", "user/model", "--recipe", "pydoc-md4"],
    ["evaluate", "user/model"],
    ["convert", "user/model", "--output-dir", "cut"],
    ["convert", "user/model", "--output-dir", "cut", "--family", "recurrent"],
]


@pytest.mark.parametrize("command", COMMANDS)
def test_offline_nothing_is_said_of_a_family(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "there is no directory user/model" in error and "family" not in error and "DiT" not in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != ["evaluate", "user/model"]])
def test_without_a_connection_a_command_fails_for_that(command, capsys, tmp_path, monkeypatch):
    def lost(name, **hub):
        try:
            raise httpx.ConnectError("Name or service not known")
        except httpx.ConnectError as error:
            raise OSError("We couldn't connect") from LocalEntryNotFoundError(str(error))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "read_config", lost)
    monkeypatch.setattr(common, "is_offline_mode", lambda: False)
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "there is no directory user/model, and the Hub cannot be reached" in error and error.count("\n") == 1


def test_what_the_hub_answers_decides(tmp_path):
    with HubServer(token=TOKEN).running() as hub, connected(hub, tmp_path / "cache"):
        with pytest.raises(ValueError, match="no directory user/model, and no model of that name on the Hub"):
            family_of("user/model")
        hub.repositories["user/pipeline"] = repository = Repository()
        repository.commit("main", {"transformer/config.json": b'{"_class_name": "SD3Transformer2DModel"}'}, set(), "")
        assert family_of("user/pipeline") == "dit"


def test_a_directory_without_a_model_is_no_dit(tmp_path, capsys):
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert main(["sample", str(tmp_path / "run"), "--prompt", "x"]) == 2
    assert f"did you mean {tmp_path / 'run' / 'model'}?" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run" / "model"), "--recipe", "pydoc-md4"]) == 2
    assert "holds no model" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--recipe", "digits-dit"]])
def test_scoring_what_is_not_there_says_so(more, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "runs/nope/model", *more]) == 2
    assert "there is no directory runs/nope/model" in capsys.readouterr().err
