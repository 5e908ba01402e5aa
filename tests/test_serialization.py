"""Files on disk: atomic writes, broken files, saves over what is there, saves that fail half-way."""

import errno
import json
import os
import re
import resource
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from hf_diffusionblocks import serialization
from hf_diffusionblocks.families.dit import BlockedDiTModel
from hf_diffusionblocks.serialization import INDEX_NAME, SHARED_NAME, file_of_key, same_tensors
from tiny import tiny_dit

FILES = ["block-00.safetensors", "block-01.safetensors", "block-02.safetensors", "config.json", INDEX_NAME, SHARED_NAME]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A saved tiny DiT of 3 blocks, not to be changed."""
    path = tmp_path_factory.mktemp("original") / "model"
    tiny_dit(3).save_pretrained(path)
    return path


@pytest.fixture
def saved(original, tmp_path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def edit_index(directory: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((directory / INDEX_NAME).read_text())
    change(index)
    (directory / INDEX_NAME).write_text(json.dumps(index))


# -- names and single files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, name",
    [
        ("blocks.0.proj_out_1.weight", "block-00.safetensors"),
        ("blocks.11.pos_embed.proj.bias", "block-11.safetensors"),
        ("blocks.123.w", "block-123.safetensors"),
        ("embedding.weight", SHARED_NAME),
        ("blocks.w", SHARED_NAME),
        ("blocks.x.w", SHARED_NAME),
        ("shared.blocks.0.w", SHARED_NAME),
    ],
)
def test_a_weight_belongs_to_the_file_of_its_block_or_the_shared_one(key, name):
    assert file_of_key(key) == name


def test_an_atomic_write_replaces_the_content_or_leaves_it(tmp_path):
    path = tmp_path / "file"
    serialization.atomic_write(path, lambda p: p.write_text("old"))

    def write_half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        serialization.atomic_write(path, write_half)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    serialization.atomic_write(path, lambda p: p.write_text("new"))
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_and_directories_have_the_permissions_of_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        tiny_dit(1, 1).save_pretrained(tmp_path / "model")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~umask
    for path in (tmp_path / "model").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_tensors_that_share_or_permute_memory_are_written_as_they_look(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"transposed": base.t(), "row": base[1], "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    serialization.write_tensors(tmp_path / "block-00.safetensors", tensors)
    assert same_tensors(serialization.read_tensors(tmp_path / "block-00.safetensors"), tensors)


def test_bytes_count_shared_storage_once():
    a = torch.zeros(10)
    assert serialization.bytes_of([a, a, torch.zeros(3, dtype=torch.bfloat16)]) == 46
    assert serialization.bytes_of([torch.zeros(10, device="meta"), torch.zeros(0)]) == 40


def test_equal_tensors_need_equal_names_and_bits():
    a = {"x": torch.tensor([1.0, 2.0])}
    assert same_tensors(a, {"x": torch.tensor([1.0, 2.0])})
    assert not same_tensors(a, {"x": torch.tensor([1.0, 2.0 + 1e-6])})
    assert not same_tensors(a, {"y": a["x"]}) and not same_tensors(a, a | {"y": a["x"]})


@pytest.mark.parametrize("text", ["{", "[1]", '"a"', "\xff\xfe"])
def test_json_that_is_no_object_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"a\.json (is not valid JSON|does not hold a JSON object)"):
        serialization.read_json(tmp_path / "a.json")


# -- broken files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [None, [1], [0, 1]])
def test_a_missing_block_file_is_named_with_its_block(saved, blocks):
    (saved / "block-01.safetensors").unlink()
    with pytest.raises(ValueError, match=r"block-01\.safetensors \(block 1\) is missing from"):
        BlockedDiTModel.from_pretrained(saved, blocks=blocks)
    assert BlockedDiTModel.from_pretrained(saved, blocks=[0, 2]).resident_blocks == (0, 2)


@pytest.mark.parametrize("keep", [0, 7, 100, -1, -4096])
@pytest.mark.parametrize("blocks", [None, [1]])
def test_a_truncated_block_file_is_named_with_its_block(saved, blocks, keep):
    path = saved / "block-01.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"block-01\.safetensors \(block 1\) in .* is truncated or corrupted"):
        BlockedDiTModel.from_pretrained(saved, blocks=blocks)
    assert BlockedDiTModel.from_pretrained(saved, blocks=[0, 2]).resident_blocks == (0, 2)


@pytest.mark.parametrize("where", ["length", "header", "data", "last"])
def test_one_flipped_byte_is_found(saved, where):
    path = saved / "block-02.safetensors"
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    content[{"length": 0, "header": 12, "data": 8 + header + 1000, "last": -1}[where]] ^= 0x01
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"block-02\.safetensors \(block 2\) in .*corrupted"):
        BlockedDiTModel.from_pretrained(saved, blocks=[2])
    with pytest.raises(ValueError, match=r"block-02\.safetensors \(block 2\) in .*corrupted"):
        AutoModel.from_pretrained(saved)


def test_a_block_file_of_another_block_is_refused(saved):
    shutil.copy(saved / "block-00.safetensors", saved / "block-01.safetensors")
    with pytest.raises(ValueError, match=r"block-01\.safetensors \(block 1\) in .* lacks 'blocks\.1\."):
        BlockedDiTModel.from_pretrained(saved)


def test_a_block_file_of_another_training_run_is_refused(saved, tmp_path):
    tiny_dit(3, seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "block-01.safetensors", saved / "block-01.safetensors")
    with pytest.raises(ValueError, match=r"block-01\.safetensors \(block 1\) .*SHA-256"):
        BlockedDiTModel.from_pretrained(saved)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda i: i["weight_map"].update({"blocks.0.w": "../block-00.safetensors"}), "not a file of a blocked model"),
        (lambda i: i["weight_map"].update({"blocks.0.w": "/etc/passwd"}), "not a file of a blocked model"),
        (lambda i: i["weight_map"].update({"blocks.0.w": "block-00.safetensors/../x"}), "not a file of a blocked"),
        (lambda i: i["weight_map"].update({"blocks.0.w": "pytorch_model.bin"}), "not a file of a blocked model"),
        (lambda i: i["weight_map"].update({"blocks.0.w": 3}), "not a file of a blocked model"),
        (lambda i: i["weight_map"].update({"blocks.0.w": "block-00.safetensors"}), "lacks 'blocks.0.w'"),
        (lambda i: i.pop("weight_map"), "is not a safetensors index"),
        (lambda i: i.update(weight_map=[]), "is not a safetensors index"),
        (lambda i: i.update(metadata=3), "is not a safetensors index"),
        (lambda i: i.pop("metadata"), "is not a safetensors index"),
    ],
)
def test_an_index_that_cannot_be_trusted(saved, change, message):
    edit_index(saved, change)
    for blocks in (None, [0]):
        with pytest.raises(ValueError, match=message):
            BlockedDiTModel.from_pretrained(saved, blocks=blocks)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"weight_map": {"a": "b"', "\xff"])
def test_an_index_that_is_not_json(saved, text):
    (saved / INDEX_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{INDEX_NAME} is not a safetensors index"):
        BlockedDiTModel.from_pretrained(saved)


def test_an_index_without_checksums_loads_and_one_without_a_block_says_so(saved):
    edit_index(saved, lambda i: i["metadata"].clear())
    assert same_tensors(BlockedDiTModel.from_pretrained(saved).state_dict(), tiny_dit(3).state_dict())
    edit_index(
        saved, lambda i: i.update(weight_map={k: v for k, v in i["weight_map"].items() if v != "block-01.safetensors"})
    )
    with pytest.raises(ValueError, match="the index has no weights of block 1: it holds block-00"):
        BlockedDiTModel.from_pretrained(saved, blocks=[1])
    with pytest.raises(ValueError, match=r"block-01\.safetensors \(block 1\) lacks \d+ weights of the model"):
        BlockedDiTModel.from_pretrained(saved)


def test_a_directory_that_is_not_there_or_holds_no_model(tmp_path):
    with pytest.raises(ValueError, match="is not a directory"):
        BlockedDiTModel.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is not a directory"):
        BlockedDiTModel.from_pretrained("./nothing")
    with pytest.raises(ValueError, match=f"{INDEX_NAME} is missing from"):
        BlockedDiTModel.from_pretrained(tmp_path)


# -- saving over what is there -----------------------------------------------------------------------------------


def test_a_part_saved_into_a_whole_model_replaces_its_own_block_only(saved):
    before = contents(saved)
    part = tiny_dit(3, blocks=[1], seed=1)
    part.save_pretrained(saved)
    after = contents(saved)
    assert [name for name in FILES if after[name] != before[name]] == ["block-01.safetensors", INDEX_NAME]
    assert sorted(after) == FILES
    loaded = BlockedDiTModel.from_pretrained(saved)
    expected = tiny_dit(3).state_dict() | part.state_dict()
    assert same_tensors(loaded.state_dict(), expected)


def test_blocks_saved_one_by_one_make_the_whole_model(tmp_path, original):
    for block in (2, 0, 1):
        if block != 2:
            with pytest.raises(ValueError, match="lacks|no weights"):
                BlockedDiTModel.from_pretrained(tmp_path / "parts")
        tiny_dit(3, blocks=[block]).save_pretrained(tmp_path / "parts")
        assert BlockedDiTModel.from_pretrained(tmp_path / "parts", blocks=[block]).resident_blocks == (block,)
    assert contents(tmp_path / "parts") == contents(original)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"num_blocks": 2}, "num_blocks is 3, this one's 2"),
        ({"num_layers": 7}, "base_config['num_layers'] is 6, this one's 7"),
        ({"layers_per_block": [1, 4, 1]}, "layers_per_block is [2, 2, 2], this one's [1, 4, 1]"),
        ({"partition": "uniform"}, "edges is [80.0, 0.505"),
        ({"overlap": 0.1}, "overlap is 0.05, this one's 0.1"),
        ({"noise": {"p_mean": -1.0}}, "noise['p_mean'] is -1.2, this one's -1.0"),
        ({"sigma_data": 0.6}, "sigma_data is 0.5, this one's 0.6"),
        ({"noise_scale": 100.0}, "noise_scale is 1.0, this one's 100.0"),
        ({"base_config": {"attention_head_dim": 4}}, "base_config['attention_head_dim'] is 8, this one's 4"),
    ],
)
def test_a_part_of_another_model_is_refused_and_nothing_is_touched(saved, settings, named):
    before = contents(saved)
    part = tiny_dit(**({"num_blocks": 3} | settings), blocks=[1])
    with pytest.raises(ValueError, match=re.escape(f"{saved} holds another model: its {named}")):
        part.save_pretrained(saved)
    assert contents(saved) == before


def test_a_part_of_another_dtype_is_refused(saved):
    with pytest.raises(ValueError, match="its dtype is 'float32', this one's 'bfloat16'"):
        tiny_dit(3, blocks=[1]).bfloat16().save_pretrained(saved)
    assert same_tensors(BlockedDiTModel.from_pretrained(saved).state_dict(), tiny_dit(3).state_dict())


def test_a_whole_model_replaces_another_one(saved):
    (saved / "README.md").write_text("mine")
    model = tiny_dit(2, 4, seed=3)
    model.save_pretrained(saved)
    assert sorted(contents(saved)) == sorted({*FILES, "README.md"} - {"block-02.safetensors"})
    assert same_tensors(BlockedDiTModel.from_pretrained(saved).state_dict(), model.state_dict())


def test_a_save_to_a_file_is_refused(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file; give a directory"):
        tiny_dit(1, 1).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_only_the_main_process_writes(tmp_path):
    tiny_dit(1, 1).save_pretrained(tmp_path / "model", is_main_process=False)
    assert os.listdir(tmp_path) == []


def test_missing_parents_are_made(tmp_path):
    tiny_dit(1, 1).save_pretrained(tmp_path / "a" / "b")
    assert BlockedDiTModel.from_pretrained(tmp_path / "a" / "b").resident_blocks == (0,)


# -- saves that fail ---------------------------------------------------------------------------------------------


class Failing:
    """A function that raises at its n-th call and works otherwise."""

    def __init__(self, function: Callable, at: int, error: BaseException):
        self.function, self.at, self.error, self.calls = function, at, error, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.function(*args, **kwargs)


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("target", ["save_file", "fsync", "replace"])
@pytest.mark.parametrize("error", [full_disk(), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_a_save_that_fails_anywhere_changes_nothing(saved, monkeypatch, existing, target, error):
    directory = saved if existing else saved.parent / "new"
    before = contents(saved.parent)
    model = tiny_dit(3, seed=5)
    module, name = {
        "save_file": (serialization, "save_file"),
        "fsync": (serialization.os, "fsync"),
        "replace": (serialization.os, "replace"),
    }[target]
    at, failed = 1, 0
    while True:
        function = Failing(getattr(module, name), at, error)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, function)
            try:
                model.save_pretrained(directory)
            except type(error):
                failed += 1
        if function.calls < at:
            break
        assert contents(saved.parent) == before, f"call {at} of {name}"
        assert directory.exists() == existing
        at += 1
    assert failed >= 4  # one per weight file at least
    assert same_tensors(BlockedDiTModel.from_pretrained(directory).state_dict(), model.state_dict())
    assert sorted(os.listdir(directory)) == FILES


@pytest.mark.parametrize("existing", [False, True])
def test_a_file_that_the_system_cannot_write_is_an_os_error(saved, existing):
    # RLIMIT_FSIZE makes the system refuse bytes in the middle of a file, as a full disk does.
    directory = saved if existing else saved.parent / "new"
    before = contents(saved.parent)
    model = tiny_dit(3, 8, layers_per_block=[1, 6, 1], seed=5)
    sizes = [serialization.bytes_of(p for _, p in model.block_parameters(b)) for b in range(3)]
    limit = sizes[0] + 20_000
    assert limit < sizes[1] - 20_000
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                model.save_pretrained(directory)
            except OSError as caught:
                code = 0 if "block-01.safetensors" in str(caught) and "Free disk space" in str(caught) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert contents(saved.parent) == before and directory.exists() == existing


def test_max_shard_size_is_held_to(tmp_path):
    model = tiny_dit(2)
    size = sum(p.numel() * 4 for _, p in model.block_parameters(0))
    with pytest.raises(ValueError, match=r"max_shard_size=1000, and block-00.safetensors \(block 0\) takes .* bytes"):
        model.save_pretrained(tmp_path / "model", max_shard_size=1000)
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model", max_shard_size=2 * size)
    assert (tmp_path / "model" / "block-01.safetensors").is_file()


def test_the_first_cause_of_a_full_disk_is_said_once():
    from hf_diffusionblocks.serialization import first_cause

    try:
        try:
            raise OSError(28, "No space left on device", "/tmp/.x.tmp")
        except OSError as error:
            raise OSError(f"cannot write a: {error}.") from error
    except OSError as outer:
        assert first_cause(outer) == "No space left on device"
    assert first_cause(RuntimeError("I/O error: No space left on device (os error 28)")) == "No space left on device"
    assert first_cause(RuntimeError("something else.")) == "something else"
