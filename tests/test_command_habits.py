"""Every subcommand has the same habits: help, JSON, quiet, dry runs, exit codes, Ctrl-C; the docs page names them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from hf_diffusionblocks.base_names import CUT_FROM
from hf_diffusionblocks.cli import build_parser, commands, main
from hf_diffusionblocks.serialization import block_file
from hf_diffusionblocks.units import human_bytes, human_seconds
from tiny import tiny_dit

COMMANDS = next(a for a in build_parser()._actions if a.dest == "command").choices
PAGE = (Path(__file__).parents[1] / "docs" / "how-to" / "command-line.md").read_text(encoding="utf-8")
NO_FIGURES = {"watch", "demo", "completion"}
DRY = {"train", "convert", "merge", "push"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model of two blocks, and a directory of each block."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_dit(num_blocks=2)
    model.save_pretrained(folder / "model")
    for b in range(2):
        type(model).from_pretrained(folder / "model", blocks=[b]).save_pretrained(folder / f"block-{b}")
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_habits(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "\x1b" not in text
    assert f"examples:\n  diffusionblocks {name}" in text or f'"$(diffusionblocks {name}' in text
    options = {option for action in COMMANDS[name]._actions for option in action.option_strings}
    assert {"--quiet", "--verbose", "--debug"} <= options
    assert ("--json" in options) == (name not in NO_FIGURES)
    assert ("--dry-run" in options) == (name in DRY)
    assert f"`{name}`" in PAGE
    for action in COMMANDS[name]._actions:
        assert action.help or action.dest in ("seed", "batch_size", "shell"), f"{name} {action.dest} has no help"


def test_the_page_names_families_and_exit_codes_as_the_help_does():
    for family, bases in CUT_FROM.items():
        assert f"| `{family}` | {bases} |" in PAGE
    text = build_parser().format_help()
    codes = re.findall(r"(\d+) ([a-z]+)", text.partition("exit codes:")[2])
    assert (
        [code for code, _ in codes] == re.findall(r"^\| (\d+) \|", PAGE, flags=re.MULTILINE) == ["0", "1", "2", "130"]
    )
    listed = re.search(r"`--dry-run` \(([^)]*)\)", PAGE).group(1)
    assert set(re.findall(r"`(\w+)`", listed)) == DRY


def test_a_dry_merge_checks_and_writes_nothing(saved, tmp_path, capsys):
    parts = [str(saved / f"block-{b}") for b in range(2)]
    command = ["merge", *parts, "--output-dir", str(tmp_path / "out")]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "nothing was written" in said and re.search(r"would write \d+ files of [\d.]+ [KM]iB", said)
    assert list(tmp_path.iterdir()) == []
    assert main([*command, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": str(tmp_path / "out"), "dry_run": True}
    assert main(["merge", parts[0], "--output-dir", str(tmp_path / "out"), "--dry-run"]) == 2
    assert "block" in capsys.readouterr().err
    assert main(command) == 0
    assert f"next: diffusionblocks sample {tmp_path / 'out'}" in capsys.readouterr().out
    assert (tmp_path / "out" / block_file(1)).read_bytes() == (saved / "model" / block_file(1)).read_bytes()


def test_sampling_says_where_and_what_next_and_draws_the_same_again(saved, tmp_path, capsys):
    command = ["sample", str(saved / "model"), "--classes", "1", "--per-class", "3", "--steps", "2", "--output-dir"]
    assert main([*command, str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert "3 images in" in said and f"next: diffusionblocks evaluate {saved / 'model'}" in said
    assert main([*command, str(tmp_path / "b"), "-q"]) == 0
    assert capsys.readouterr().out == ""
    for path in sorted((tmp_path / "a").glob("0*.png")):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("command", "says"), [("sample", "draws the same samples"), ("evaluate", "model is as it was")]
)
def test_ctrl_c_says_what_is_kept(command, says, monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt("50 of 52 images are in samples.")

    monkeypatch.setattr("hf_diffusionblocks.cli.commands.run", stop)
    assert main([command, "runs/x/model"]) == 130
    error = capsys.readouterr().err
    assert "interrupted. 50 of 52 images are in samples." in error and says in error and "again" in error


def test_images_drawn_before_ctrl_c_are_kept(saved, tmp_path, monkeypatch, capsys):
    from hf_diffusionblocks.jobs import sample, sample_files

    real, calls = sample_files.sample_images, []

    def second_fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sample_files, "sample_images", second_fails)

    def stop_at_once(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"50 of 60 images are in"):
        sample(str(saved / "model"), str(tmp_path), class_labels=[1], per_class=60, num_inference_steps=2)
    assert len(list(tmp_path.glob("0*.png"))) == 50
    monkeypatch.setattr(sample_files, "sample_images", stop_at_once)
    assert main(["sample", str(saved / "model"), "--output-dir", str(tmp_path / "none")]) == 130
    error = capsys.readouterr().err
    assert "No image was drawn yet." in error and "kept" not in error


def test_a_real_ctrl_c_ends_training_with_a_checkpoint_and_130(tmp_path):
    small = ["model.num_layers=3", "model.num_attention_heads=2", "model.attention_head_dim=8", "training.save_steps=0"]
    command = [sys.executable, "-m", "hf_diffusionblocks", "train", "digits-dit", *small, "training.max_steps=100000"]
    command += ["--no-report", "--output-dir", str(tmp_path / "run"), "training.logging_steps=5", "training.cpu=true"]
    with open(tmp_path / "err", "w") as err:
        run = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=err, text=True, env=os.environ | {"NO_COLOR": "1"}
        )
        log = tmp_path / "run" / "updates.jsonl"
        deadline = time.monotonic() + 120
        while not log.is_file() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        out, _ = run.communicate(timeout=60)
    said = (tmp_path / "err").read_text()
    assert run.returncode == 130, said
    assert "saved in" in said and "Run the same command again to go on." in said and "Traceback" not in said
    assert list((tmp_path / "run").glob("checkpoint-*")) and "\x1b" not in out + said


def test_bytes_and_times_for_people():
    assert [human_bytes(n) for n in (0, 999, 1024, 5 * 2**30)] == ["0 B", "999 B", "1 KiB", "5 GiB"]
    assert [human_seconds(s) for s in (0.04, 59.4, 60, 3600, 90_061)] == ["0.0 s", "59 s", "1 min", "1 h", "1 d 1 h"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["digits-vit", "--block", "7"], "block 7 does not exist"),
        (["digits-dit", "training.lower_outputs=disk"], "lower_outputs='disk' is for a cascade"),
        (["digits-dit", "--lower", "x"], "--lower x is for a cascade"),
        (["digits-vit", "--block", "1"], "have not been trained"),
        (["digits-vit", "--block", "1", "--lower", "./nowhere"], "there is no directory ./nowhere"),
    ],
)
def test_a_dry_run_refuses_the_blocks_that_training_refuses(options, words, tmp_path, capsys):
    assert main(["train", *options, "--dry-run", "--output-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.out == "" and not list(tmp_path.iterdir())


def test_a_warning_is_one_line_without_its_place_in_the_source(monkeypatch, capsys):
    def warn(args, say):
        warnings.warn("few samples:\n  use more", UserWarning, stacklevel=1)

    monkeypatch.setitem(commands.COMMANDS, "recipes", warn)
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        inside = warnings.showwarning
        assert main(["recipes"]) == 0
        assert warnings.showwarning is inside
    assert capsys.readouterr().err == "warning: few samples: use more\n"
    with pytest.warns(UserWarning, match="few samples"):  # what a developer wants to see
        assert main(["recipes", "--debug"]) == 0
    assert warnings.showwarning is shown
