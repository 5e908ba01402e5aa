"""Jobs that trained one block each, merged: the same bits as one process, or an error that says what does not agree."""

import json
import os
import re
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from hf_diffusionblocks import BlockedDiTModel
from hf_diffusionblocks.agreement import first_difference, hub_name, weights_digest
from hf_diffusionblocks.families.causal_lm import BlockedForCausalLM
from hf_diffusionblocks.merging import BlocksMissingError, merge_blocks
from hf_diffusionblocks.serialization import INDEX_NAME, SHARED_NAME, block_file, same_tensors, sha256
from hf_diffusionblocks.weight_headers import check_shapes, payload_bytes, read_shapes
from runs import make_trainer, reset_accelerate
from tiny import tiny_dit
from tiny_text import base_config, base_lm, tokens


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Folders `job-0` to `job-2`, each with one block of a tiny model; not to be changed."""
    root = tmp_path_factory.mktemp("jobs")
    for b in range(3):
        tiny_dit(3, blocks=[b]).save_pretrained(root / f"job-{b}")
    return root


@pytest.fixture
def jobs(original, tmp_path) -> list[Path]:
    return [Path(shutil.copytree(original / f"job-{b}", tmp_path / f"job-{b}")) for b in range(3)]


class Tokens:
    """Rows of tokens for the trainer."""

    def __init__(self, rows: int = 12):
        self.rows = tokens(rows, 10)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[indices]}


# -- the same bits -----------------------------------------------------------------------------------------------


def test_jobs_of_one_block_each_make_what_one_process_makes(tmp_path):
    settings = {"max_steps": 4, "warmup_steps": 1, "horizontal_flip": True}
    make_trainer(tmp_path / "run", tiny_dit(3), **settings).train()
    whole = make_trainer(tmp_path / "all", tiny_dit(3), **settings)
    whole.train()
    whole.save_model()
    for b in range(3):
        reset_accelerate()
        job = make_trainer(tmp_path / f"job-{b}", tiny_dit(3, blocks=[b]), **settings)
        job.train()
        job.save_model()
    merged = merge_blocks([tmp_path / f"job-{b}" for b in (2, 0, 1)], tmp_path / "merged")
    assert contents(merged) == contents(tmp_path / "all" / "model")
    assert not same_tensors(BlockedDiTModel.from_pretrained(merged).state_dict(), tiny_dit(3).state_dict())


def test_independent_language_model_jobs_with_frozen_embeddings(tmp_path):
    def model() -> BlockedForCausalLM:
        torch.manual_seed(4)
        return BlockedForCausalLM.from_base(base_config(), 3, context="independent", readout="clean")

    settings = {"dataset": Tokens(), "train_shared": "none", "max_steps": 2}
    whole = make_trainer(tmp_path / "all", model(), **settings)
    whole.train()
    whole.save_model()
    for b in range(3):
        reset_accelerate()
        config = model().config
        torch.manual_seed(4)
        one = BlockedForCausalLM(config, blocks=[b])
        job = make_trainer(tmp_path / f"job-{b}", one, **settings)
        job.train()
        job.save_model()
    merged = merge_blocks([tmp_path / f"job-{b}" for b in range(3)], tmp_path / "merged")
    assert contents(merged) == contents(tmp_path / "all" / "model")
    assert BlockedForCausalLM.from_pretrained(merged).config.trained_blocks == [0, 1, 2]


def test_jobs_of_a_cascade_each_on_the_blocks_below(tmp_path):
    def train(name: str, model: BlockedForCausalLM, blocks: list[int]) -> Path:
        reset_accelerate()
        run = make_trainer(
            tmp_path / name, model, dataset=Tokens(), max_steps=2, blocks=blocks, save_steps=0, learning_rate=1e-2
        )
        run.train()
        return run.save_model()

    def fresh() -> BlockedForCausalLM:
        torch.manual_seed(4)
        return BlockedForCausalLM.from_base(base_config(), 3)

    whole = train("all", fresh(), [0, 1, 2])
    lower = train("job-0", fresh(), [0])
    for b in (1, 2):
        lower = train(f"job-{b}", BlockedForCausalLM.from_pretrained(lower), [b])
    # each job saved every block: those that it did not train must not replace those that were trained
    for b in range(3):
        for other in set(range(3)) - set(range(b + 1)):
            drop(tmp_path / f"job-{b}" / "model", other)
    merged = merge_blocks([tmp_path / f"job-{b}" for b in range(3)], tmp_path / "merged")
    assert contents(merged) == contents(whole)


def drop(directory: Path, block: int) -> None:
    """Take a block out of a saved model."""
    name = block_file(block)
    (directory / name).unlink()
    edit_index(directory, lambda i: i.update(weight_map={k: f for k, f in i["weight_map"].items() if f != name}))


def edit_index(directory: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((directory / INDEX_NAME).read_text())
    change(index)
    (directory / INDEX_NAME).write_text(json.dumps(index))


def edit_config(directory: Path, **values: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


def test_a_merged_model_equals_the_model_saved_whole(jobs, tmp_path):
    lines: list[str] = []
    merged = merge_blocks(jobs, tmp_path / "merged", say=lines.append)
    tiny_dit(3).save_pretrained(tmp_path / "whole")
    assert contents(merged) == contents(tmp_path / "whole")
    assert [line.split(" (")[0] for line in lines] == [f"block {b}: {jobs[b]}" for b in range(3)]


def test_other_files_are_taken_over_and_cards_are_left(jobs, tmp_path):
    for number, job in enumerate(jobs):
        (job / "README.md").write_text(f"job {number}")
        (job / "model_index.json").write_text("{}")
        (job / ".hidden").write_text(str(number))
    (jobs[1] / "scheduler").mkdir()
    (jobs[1] / "scheduler" / "scheduler_config.json").write_text("{}")
    merged = merge_blocks(jobs, tmp_path / "merged")
    extra = set(contents(merged)) - {block_file(b) for b in range(3)} - {SHARED_NAME, INDEX_NAME, "config.json"}
    assert extra == {"model_index.json", "scheduler/scheduler_config.json"}
    (jobs[2] / "model_index.json").write_text("{ }")
    with pytest.raises(ValueError, match=r"job-0/model_index.json and .*job-2/model_index.json differ"):
        merge_blocks(jobs, tmp_path / "again")


def test_a_block_may_be_given_twice_if_it_is_the_same(jobs, original, tmp_path):
    copy = shutil.copytree(original / "job-1", tmp_path / "copy")
    merged = merge_blocks([*jobs, copy], tmp_path / "merged")
    assert sha256(merged / block_file(1)) == sha256(jobs[1] / block_file(1))
    tiny_dit(3, blocks=[1], seed=9).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"block 1 is given twice and differs: .*job-1/block-01.* and .*other/block"):
        merge_blocks([*jobs, tmp_path / "other"], tmp_path / "again")


# -- what does not agree -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [[0], [1, 2]])
def test_missing_blocks_are_named(jobs, tmp_path, missing):
    given = [job for b, job in enumerate(jobs) if b not in missing]
    with pytest.raises(BlocksMissingError, match=re.escape(f"blocks {missing} of 3 are missing. Given: {given[0]}: [")):
        merge_blocks(given, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_directory_without_a_model_is_named(jobs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no saved model .*its job has not finished"):
        merge_blocks([*jobs, tmp_path / "empty"], tmp_path / "merged")
    with pytest.raises(ValueError, match="no directory to merge"):
        merge_blocks([], tmp_path / "merged")


def test_it_waits_for_the_job_that_is_late_and_says_which_block_is_missing(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_diffusionblocks.merging._POLL_SECONDS", 0.02)
    late = tmp_path / "late"
    jobs[2].rename(late)
    lines: list[str] = []
    threading.Timer(0.3, lambda: late.rename(jobs[2])).start()
    merged = merge_blocks(jobs, tmp_path / "merged", wait=30, say=lines.append)
    assert BlockedDiTModel.from_pretrained(merged).resident_blocks == (0, 1, 2)
    assert [line for line in lines if line.startswith("waiting")] == [f"waiting: {lines[0].removeprefix('waiting: ')}"]
    assert str(jobs[2]) in lines[0]
    with pytest.raises(BlocksMissingError, match=r"blocks \[0\] of 3 are missing"):
        merge_blocks(jobs[1:], tmp_path / "never", wait=0.1)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"num_layers": 7}, "base_config['num_layers'] is 6 in the first and 7 in the second"),
        ({"partition": "uniform"}, "edges is [80.0, 0.505"),
        ({"overlap": 0.1}, "overlap is 0.05 in the first and 0.1 in the second"),
        ({"noise": {"p_mean": -1.0}}, "edges is"),
        ({"label_dropout": 0.3}, "label_dropout is 0.1 in the first and 0.3"),
    ],
)
def test_blocks_of_different_models_are_refused(jobs, tmp_path, settings, named):
    shutil.rmtree(jobs[1])
    tiny_dit(**({"num_blocks": 3} | settings), blocks=[1]).save_pretrained(jobs[1])
    with pytest.raises(
        ValueError, match=re.escape(f"{jobs[0]} and {jobs[1]} hold blocks of different models: {named}")
    ):
        merge_blocks(jobs, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["job-0", "job-1", "job-2"]


def test_blocks_of_different_bases_are_refused(tmp_path):
    settings = {
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "sample_size": 8,
        "in_channels": 1,
        "num_embeds_ada_norm": 10,
    }
    for b, seed in ((0, 0), (1, 1), (2, 0)):
        torch.manual_seed(seed)
        model = BlockedDiTModel.from_base(DiTTransformer2DModel(**settings), 3)
        for other in set(range(3)) - {b}:
            del model.blocks[str(other)]
        model.save_pretrained(tmp_path / f"job-{b}")
    with pytest.raises(ValueError, match=r"different models: base_revision is '[0-9a-f]{64}' in the first"):
        merge_blocks([tmp_path / f"job-{b}" for b in range(3)], tmp_path / "merged")


def test_shared_parts_that_differ_are_named(tmp_path):
    for b, seed in ((0, 0), (1, 0), (2, 5)):
        torch.manual_seed(seed)
        config = BlockedForCausalLM.config_from(base_config(), 3, context="independent")
        BlockedForCausalLM(config, blocks=[b]).save_pretrained(tmp_path / f"job-{b}")
    with pytest.raises(ValueError, match=r"job-0/shared.* and .*job-2/shared.* 'embed_tokens.weight' differs"):
        merge_blocks([tmp_path / f"job-{b}" for b in range(3)], tmp_path / "merged")


@pytest.mark.parametrize("name", [block_file(1), SHARED_NAME])
def test_a_broken_file_is_named_and_nothing_is_written(jobs, tmp_path, name):
    path = jobs[1] / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.* in {re.escape(str(jobs[1]))} is "):
        merge_blocks(jobs, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["job-0", "job-1", "job-2"]


def test_weights_of_other_shapes_or_too_few_are_refused(jobs, tmp_path):
    path = jobs[2] / block_file(2)
    weights = load_file(path)
    key = next(k for k in weights if k.endswith("proj_out_1.weight"))
    save_file(weights | {key: torch.zeros(3, 3)}, path, metadata={"format": "pt"})
    edit_index(jobs[2], lambda i: i["metadata"]["sha256"].update({path.name: sha256(path)}))
    with pytest.raises(ValueError, match=rf"block 2\) .*holds '{re.escape(key)}' in shape \[3, 3\]"):
        merge_blocks(jobs, tmp_path / "merged")
    del weights[key]
    save_file(weights, path, metadata={"format": "pt"})
    edit_index(jobs[2], lambda i: (i["metadata"]["sha256"].update({path.name: sha256(path)}), i["weight_map"].pop(key)))
    with pytest.raises(ValueError, match=rf"block 2\) .*lacks 1 weights of the model, '{re.escape(key)}' first"):
        merge_blocks(jobs, tmp_path / "merged")


def test_a_block_beyond_the_config_is_refused(jobs, tmp_path):
    edit_index(jobs[2], lambda i: i["weight_map"].update({"blocks.7.w": block_file(7)}))
    with pytest.raises(ValueError, match=r"has block-07.safetensors, but its config has blocks 0 to 2 only"):
        merge_blocks(jobs, tmp_path / "merged")


@pytest.mark.parametrize("values", [{"model_type": "llama"}, {"model_type": "no-such"}, {"sigma_data": -1}])
def test_a_config_that_is_no_blocked_model_is_refused(jobs, tmp_path, values):
    edit_config(jobs[0], **values)
    message = "job-0/config.json (is not a blocked model's|describes a model of type|has model_type='no-such')"
    with pytest.raises(ValueError, match=message):
        merge_blocks(jobs, tmp_path / "merged")


# -- writing -----------------------------------------------------------------------------------------------------


def test_a_directory_that_holds_something_is_left_alone(jobs, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="is not an empty directory"):
        merge_blocks(jobs, tmp_path / "merged")
    assert contents(tmp_path / "merged") == {"mine": b"mine"}
    (tmp_path / "merged" / "mine").unlink()
    assert len(contents(merge_blocks(jobs, tmp_path / "merged"))) == 6


def test_a_full_disk_leaves_nothing_half_written(jobs, tmp_path):
    before = contents(tmp_path)
    limit = (jobs[0] / block_file(0)).stat().st_size // 2  # the system then refuses bytes, as a full disk does
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            merge_blocks(jobs, tmp_path / "merged")
        except OSError as error:
            code = 0 if "The directories to merge are untouched" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert contents(tmp_path) == before and not (tmp_path / "merged").exists()
    stale = tmp_path / ".merged.merging"
    stale.mkdir()
    (stale / "half").write_text("half")
    assert "half" not in contents(merge_blocks(jobs, tmp_path / "merged")) and not stale.exists()


# -- agreement and headers ---------------------------------------------------------------------------------------


def test_the_first_difference_is_named_with_its_key():
    a = {"x": 1, "m": {"p": 1, "q": 2}, "transformers_version": "1"}
    assert first_difference(a, a | {"transformers_version": "2"}) is None
    assert first_difference(a, a | {"x": 2}) == ("x", 1, 2)
    assert first_difference(a, a | {"m": {"p": 1, "q": 3}}) == ("m['q']", 2, 3)
    assert first_difference(a, a | {"m": {"p": 1}}) == ("m['q']", 2, None)
    assert first_difference(a, a | {"x": 2, "m": None}, names=["m"]) == ("m", {"p": 1, "q": 2}, None)


def test_a_base_is_known_by_its_weights():
    base = base_lm()
    same, other = base_lm(), base_lm(seed=1)
    assert weights_digest(base.state_dict()) == weights_digest(same.state_dict()) != weights_digest(other.state_dict())
    assert weights_digest({"w": torch.zeros(2, device="meta")}) is None
    assert weights_digest({"w": torch.zeros(2)}) != weights_digest({"w": torch.zeros(1, 2)})
    model = BlockedForCausalLM.from_base(base, 3)
    assert model.config.base_revision == weights_digest(base.state_dict()) and model.config.base_model is None


def test_only_names_of_the_hub_are_kept(tmp_path):
    assert hub_name("someone/model") == "someone/model"
    for other in (str(tmp_path), tmp_path, base_lm(), "a/b/c", "../x", {"model_type": "llama"}):
        assert hub_name(other) is None


def test_headers_tell_names_shapes_and_bytes(tmp_path):
    path = tmp_path / block_file(3)
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}
    save_file(tensors, path)
    assert read_shapes(path) == {"a": (2, 3), "b": (5,)} and payload_bytes(path) == 34
    check_shapes(path, {"a": [2, 3]})
    with pytest.raises(ValueError, match=r"block-03.safetensors \(block 3\) .*lacks 1 weights of the model, 'c' first"):
        check_shapes(path, {"a": [2, 3], "c": [1]})
