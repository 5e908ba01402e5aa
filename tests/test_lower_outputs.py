"""What lower blocks give, kept on disk: its exact values, when it is used again, full disks, kills."""

import errno
import os
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_diffusionblocks.objectives import NextTokenPrediction
from hf_diffusionblocks.serialization import same_tensors
from hf_diffusionblocks.training import cascade
from hf_diffusionblocks.training.cascade import lower_outputs
from runs import everything, reset_accelerate, updates
from test_cascade_training import text_trainer
from test_resume import assert_same_run, run_killing
from tiny_text import TokenRows, blocked_lm, left_padding, new_lm, packed_positions

ROWS = 40  # two and a half batches of the forward pass


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


def rounded(model: Any, block: int, data: TokenRows) -> Tensor:
    """What the blocks below a block give, in batches of 16, as bfloat16 holds it."""
    with torch.no_grad():
        parts = []
        for start in range(0, len(data), 16):
            batch = data[slice(start, start + 16)]
            places = {k: batch[k] for k in ("position_ids", "attention_mask") if k in batch}
            parts.append(model.context_of(block, batch["input_ids"], **places))
    return torch.cat(parts).to(torch.bfloat16).float()


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The first row of each forward pass of the lower blocks that fills a file."""
    starts, original = [], cascade.fetch

    def watched(dataset: Any, rows: list[int]) -> dict[str, Tensor]:
        if len(rows) >= 8:  # not a look at the first row, nor a training batch
            starts.append(rows[0])
        return original(dataset, rows)

    monkeypatch.setattr(cascade, "fetch", watched)
    return starts


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize(
    "columns",
    [{}, {"position_ids": packed_positions(12, 5, 9, batch=ROWS)}, left_padding(12, *([0, 3, 7, 2] * 10))],
    ids=["plain", "packed", "padded"],
)
def test_the_file_holds_the_lower_blocks_output_in_bfloat16(tmp_path, columns, block):
    model, data = blocked_lm(), TokenRows(ROWS, **columns)
    found = lower_outputs(model, block, data, tmp_path, quiet=True)
    assert len(found) == ROWS
    for rows in ([0, 1, 2], [39, 0, 17], [5]):
        batch = found[rows]
        assert batch.keys() == {"hidden_states", *data.columns}
        assert batch["hidden_states"].dtype == torch.float32
        assert torch.equal(batch["hidden_states"], rounded(model, block, data)[rows])
        assert torch.equal(batch["input_ids"], data.columns["input_ids"][rows])
    assert (tmp_path / f"block-{block:02d}.bin").stat().st_size == 2 * ROWS * 12 * 16
    # the rounding is bfloat16's: a relative error of at most 2^-8
    exact = model.context_of(block, data.columns["input_ids"], **columns)
    torch.testing.assert_close(found[list(range(ROWS))]["hidden_states"], exact, rtol=2**-8, atol=1e-6)


def test_training_from_the_file_is_training_on_these_values(tmp_path):
    """Bit for bit equal to a data set that holds the rounded outputs; near to recomputing them."""
    data = TokenRows(ROWS)
    model = new_lm()
    first = text_trainer(tmp_path / "first", model, dataset=data, blocks=[0])
    first.train()
    start = first.save_model()
    runs = {}
    for name in ("disk", "memory", "recompute"):
        model = type(model).from_pretrained(start)
        dataset = TokenRows(ROWS, hidden_states=rounded(model, 1, data)) if name == "memory" else data
        way = "recompute" if name == "memory" else name
        given = {"dataset": dataset, "blocks": [1], "lower_outputs": way, "learning_rate": 1e-3}
        trainer = text_trainer(tmp_path / name, model, **given)
        trainer.train()
        runs[name] = [row["loss"] for row in updates(tmp_path / name)], everything(trainer)[1]
    assert runs["disk"][0] == runs["memory"][0] and same_tensors(runs["disk"][1], runs["memory"][1])
    assert runs["disk"][0] != runs["recompute"][0]
    for mine, theirs in zip(runs["disk"][0], runs["recompute"][0], strict=True):
        assert mine == pytest.approx(theirs, rel=2**-8)


def test_the_file_is_used_again_while_weights_and_data_are_the_same(tmp_path, computed):
    model, data = blocked_lm(), TokenRows(ROWS)
    first = lower_outputs(model, 1, data, tmp_path, quiet=True)
    assert computed == [0, 16, 32]
    again = lower_outputs(model, 1, data, tmp_path, quiet=True)
    assert computed == [0, 16, 32]
    assert torch.equal(first[[3, 20]]["hidden_states"], again[[3, 20]]["hidden_states"])


@pytest.mark.parametrize("change", ["weights", "embeddings", "data", "padding", "length"])
def test_the_file_is_written_anew_when_something_changed(tmp_path, computed, change):
    model, data = blocked_lm(), TokenRows(ROWS)
    lower_outputs(model, 1, data, tmp_path, quiet=True)
    with torch.no_grad():
        if change == "weights":
            next(model.block(0).parameters())[0] += 1e-3
        elif change == "embeddings":
            model.embed_tokens.weight[5, 0] += 1e-3
    if change == "data":
        data = TokenRows(ROWS, seed=1)
    elif change == "padding":
        data = TokenRows(ROWS, **left_padding(12, *[4] * ROWS))
    elif change == "length":
        data = TokenRows(ROWS, length=11)
    computed.clear()
    found = lower_outputs(model, 1, data, tmp_path, quiet=True)
    assert computed == [0, 16, 32]
    assert torch.equal(found[[1, 33]]["hidden_states"], rounded(model, 1, data)[[1, 33]])


def test_what_the_outputs_do_not_depend_on_leaves_the_file(tmp_path, computed):
    model, data = blocked_lm(), TokenRows(ROWS)
    lower_outputs(model, 1, data, tmp_path, quiet=True)
    computed.clear()
    with torch.no_grad():
        for parameter in (*model.block(1).parameters(), *model.block(0).auxiliary.parameters()):
            parameter += 1
    lower_outputs(model, 1, data, tmp_path, quiet=True)
    assert computed == []


def test_one_file_lies_on_the_disk_at_a_time_and_the_run_reuses_it(tmp_path, computed):
    trainer = text_trainer(tmp_path, dataset=TokenRows(ROWS), lower_outputs="disk")
    trainer.train()
    assert sorted(p.name for p in (tmp_path / "lower-outputs").iterdir()) == ["block-02.bin", "block-02.json"]
    assert computed == [0, 16, 32] * 2
    again = text_trainer(tmp_path, dataset=TokenRows(ROWS), lower_outputs="disk")
    again.train(resume_from_checkpoint=True)
    assert computed == [0, 16, 32] * 2


def test_the_model_keeps_its_mode_and_gets_no_gradient(tmp_path):
    model = blocked_lm().train()
    lower_outputs(model, 2, TokenRows(ROWS), tmp_path, quiet=True)
    assert model.training and all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_full_disk_gives_one_clear_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    trainer = text_trainer(tmp_path, dataset=TokenRows(ROWS), lower_outputs="disk")
    message = r"15,360 bytes of lower blocks' outputs do not fit in .*lower-outputs.*No space left.*'recompute'"
    with pytest.raises(OSError, match=message) as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert list((tmp_path / "lower-outputs").iterdir()) == []
    # when the disk has room again, the same trainer goes on from there
    monkeypatch.undo()
    trainer.train()
    whole = text_trainer(tmp_path / "whole", dataset=TokenRows(ROWS), lower_outputs="disk")
    whole.train()
    assert all(same_tensors(everything(trainer)[b], everything(whole)[b]) for b in range(3))


@pytest.mark.parametrize("missing", ["the function", "the file system's support"])
def test_where_a_file_s_place_cannot_be_reserved_zeros_are_written(tmp_path, monkeypatch, missing):
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    if missing == "the function":  # macOS
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    monkeypatch.setattr(cascade, "_ZEROS", 1000)  # so that the last chunk is a part
    cascade._reserve(tmp_path / "reserved", 15_360)
    written = (tmp_path / "reserved").stat()
    assert written.st_size == 15_360 and written.st_blocks * 512 >= 15_360  # not a file with holes
    model, data = blocked_lm(), TokenRows(ROWS)
    found = lower_outputs(model, 1, data, tmp_path, quiet=True)
    assert torch.equal(found[list(range(ROWS))]["hidden_states"], rounded(model, 1, data))


def test_a_full_disk_is_found_before_the_file_is_mapped_without_reserving_too(tmp_path, monkeypatch):
    """A limit on the size of files stands for the full disk: the write fails in the same place."""
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(cascade, "_ZEROS", 1000)
    monkeypatch.setattr(np, "memmap", lambda *_, **__: pytest.fail("mapped"))
    model, data = blocked_lm(), TokenRows(ROWS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
        with pytest.raises(OSError, match="15,360 bytes .* do not fit in .*File too large.*'recompute'"):
            lower_outputs(model, 1, data, tmp_path, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


def test_lower_blocks_run_without_dropout_whether_recomputed_or_from_the_file(tmp_path, monkeypatch):
    model, data = blocked_lm(base={"attention_dropout": 0.5}), TokenRows(ROWS)
    found = lower_outputs(model, 2, data, tmp_path, quiet=True)
    rows = list(range(ROWS))
    batch = data[rows]
    model.train()
    dropped = [model.clean_block(model.embed_tokens(batch["input_ids"]), 0) for _ in range(2)]
    assert not torch.allclose(*dropped)  # the probe: in training mode the block's own layers do drop
    recomputed = model.context_of(2, batch["input_ids"])
    assert torch.equal(recomputed.to(torch.bfloat16).float(), found[rows]["hidden_states"])
    assert all(module.training for module in model.modules())
    modes, run = [], model.clean_block

    def watched(hidden: Tensor, block: int, **kwargs: Any) -> Tensor:
        layers = model.block(block).model.modules()
        modes.append((block, {module.training for module in layers}))
        return run(hidden, block, **kwargs)

    monkeypatch.setattr(model, "clean_block", watched)
    NextTokenPrediction()(model, 2, batch)
    assert modes == [(0, {False}), (1, {False}), (2, {True})]
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("left", ["half-written", "no note", "cut short", "broken note"])
def test_what_a_kill_left_behind_is_never_taken_for_the_outputs(tmp_path, computed, left):
    model, data = blocked_lm(), TokenRows(ROWS)
    lower_outputs(model, 1, data, tmp_path, quiet=True)
    computed.clear()
    path, note = tmp_path / "block-01.bin", tmp_path / "block-01.json"
    if left == "half-written":
        path.rename(tmp_path / ".block-01.writing")
    elif left == "no note":
        note.unlink()
    elif left == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        note.write_text(note.read_text()[:20])
    found = lower_outputs(model, 1, data, tmp_path, quiet=True)
    assert computed == [0, 16, 32]
    assert torch.equal(found[list(range(ROWS))]["hidden_states"], rounded(model, 1, data))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["block-01.bin", "block-01.json"]


# -- kills -------------------------------------------------------------------------------------------------------


def check_kills(directory: Path, report: dict[str, Any], kills: int) -> None:
    """Every run that was killed ended as the uninterrupted one, and left nothing but block 2's file."""
    assert report["whole"] == report["short"] == 0
    assert [row["block"] for row in updates(directory / "whole")] == [0] * 8 + [1] * 8 + [2] * 8
    for name in ("random", "stopped"):
        assert report[name]["final"] == 0
        assert_same_run(directory / name, directory / "whole")
    assert len(report["random"]["statuses"]) == kills
    assert len(report["outputs"]) >= 10
    for name, point in report["outputs"].items():
        assert point["status"] == -signal.SIGKILL and point["final"] == 0, name
        assert_same_run(directory / name, directory / "short")
        left = sorted(p.name for p in (directory / name / "lower-outputs").iterdir())
        assert left == ["block-02.bin", "block-02.json"], name
    # They did hit the writing: before there was a file, half-written, with its note missing, and whole.
    whole, note = "block-01.bin", "block-01.json"
    found = [point["found"] for point in report["outputs"].values()]
    assert [] in found and [".block-01.writing"] in found and [whole, note] in found
    assert any(whole in names and note not in names for names in found)


@pytest.mark.timeout(600)
def test_killed_sequential_runs_go_on_to_the_same_bits(tmp_path):
    report = run_killing(tmp_path, "--text", "--kills", "3", "--stops", "2")
    check_kills(tmp_path, report, kills=3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_kills_of_sequential_runs(tmp_path):
    report = run_killing(tmp_path, "--text", "--kills", "30", "--stops", "6", "--seed", "5")
    check_kills(tmp_path, report, kills=30)
