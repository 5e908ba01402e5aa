"""Files from strangers: refused with one clear error before anything is allocated; nothing pickled, no code runs."""

import contextlib
import json
import os
import pickle
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_diffusionblocks import BlockedDiTModel, BlockedDiTPipeline
from hf_diffusionblocks.families.causal_lm import BlockedForCausalLM
from hf_diffusionblocks.families.loading import blocked_config_of
from hf_diffusionblocks.jobs import family_of
from hf_diffusionblocks.merging import merge_blocks
from hf_diffusionblocks.recipes import load_recipe
from hf_diffusionblocks.serialization import INDEX_NAME, SHARED_NAME, block_file, read_index, sha256
from hf_diffusionblocks.training import checkpoint as checkpoint_module
from runs import make_trainer, reset_accelerate
from tiny import as_users_run, tiny_dit
from tiny_text import blocked_lm

FUZZ = settings(
    derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40
)
MODELS = {"dit": BlockedDiTModel, "lm": BlockedForCausalLM}
# What an allocation of the model's own size needs is far below, what these files ask for far above.
ROOM = 256 * 2**20


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    """A saved model of each family, not to be changed."""
    root = tmp_path_factory.mktemp("originals")
    tiny_dit(3).save_pretrained(root / "dit")
    blocked_lm().save_pretrained(root / "lm")
    return {name: root / name for name in MODELS}


@contextlib.contextmanager
def copied(source: Path, tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "hostile"
    shutil.rmtree(target, ignore_errors=True)
    yield Path(shutil.copytree(source, target))


@contextlib.contextmanager
def little_room() -> Iterator[None]:
    """The process may not grow by more than a little: what tries to allocate fails with a MemoryError."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def refused(directory: Path, model: type = BlockedDiTModel, blocks: list[int] | None = None) -> str:
    """Load a model that must be refused; its error is one line that fits a screen."""
    with little_room(), as_users_run(), pytest.raises(ValueError) as caught:
        model.from_pretrained(directory, blocks=blocks)
    return str(caught.value)


def change_json(path: Path, *keys: str, value: Any) -> None:
    content = node = json.loads(path.read_text())
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path.write_text(json.dumps(content))


# -- configs -----------------------------------------------------------------------------------------------------

ABSURD = [
    ("dit", ("num_blocks",), 10**9, "edges=.*has 4 values"),
    ("dit", ("base_config", "num_layers"), 10**9, "1000000000.* must (be a whole number|lie between 1 and)"),
    ("dit", ("base_config", "num_layers"), 10**30, "absurdly large"),
    ("dit", ("base_config", "attention_head_dim"), 10**8, "shape|cannot be built|can be built"),
    ("dit", ("base_config", "sample_size"), 10**6, "positions"),
    ("dit", ("base_config", "num_embeds_ada_norm"), 10**12, "in shape .* but config.json describes"),
    ("dit", ("base_config", "patch_size"), 0, "patch_size=0 must be a whole number of at least 1"),
    ("dit", ("base_config", "norm_type"), "x", "does not describe a model that can be built"),
    ("dit", ("layers_per_block",), [2, 2, 10**9], "layers"),
    ("dit", ("layers_per_block",), [9, -3, 0], "at least one layer"),
    ("dit", ("edges",), [80.0, float("nan"), 0.1, 0.002], r"edges\[1\]=nan must be a finite number"),
    ("dit", ("edges",), [80.0, "0.5", 0.1, 0.002], r"edges\[1\]='0.5' must be a finite number"),
    ("dit", ("edges",), [80.0, -1.0, 0.1, 0.002], "descending"),
    ("dit", ("overlap",), -0.1, "overlap=-0.1 must lie in"),
    ("dit", ("sigma_data",), float("inf"), "sigma_data=inf must be a finite number"),
    ("dit", ("sigma_data",), -1, "sigma_data=-1 must be positive"),
    ("dit", ("noise", "p_std"), float("nan"), "p_std.*=nan must be a finite number"),
    ("dit", ("noise",), {"__class__": "os.system"}, "__class__"),
    ("dit", ("dtype",), "nothing", "dtype='nothing' must be a floating-point dtype"),
    ("dit", ("dtype",), "load", "dtype='load' must be a floating-point dtype"),
    ("dit", ("base_config",), [1], r"base_config=\[1\] must be a mapping"),
    ("dit", ("noise_schedule",), {"num_train_timesteps": 10**9}, "num_train_timesteps=1000000000 must be at most"),
    ("lm", ("base_config", "num_hidden_layers"), 10**9, "the number of layers, 1000000000"),
    ("lm", ("base_config", "vocab_size"), 10**12, "in shape .* but config.json describes"),
    ("lm", ("base_config", "hidden_size"), -1, "hidden_size=-1 must be a whole number of at least 1"),
    ("lm", ("base_config", "model_type"), "../../x", "model_type='../../x' is not known"),
    ("lm", ("trained_blocks",), "all", "trained_blocks='all' must be a list"),
    ("lm", ("auxiliary_layers",), 10**9, "auxiliary_layers|layers"),
]


@pytest.mark.parametrize("family, keys, value, message", ABSURD, ids=lambda v: str(v)[:30])
def test_absurd_configs_are_refused_before_anything_is_allocated(originals, tmp_path, family, keys, value, message):
    with copied(originals[family], tmp_path) as directory:
        change_json(directory / "config.json", *keys, value=value)
        with little_room(), as_users_run(), pytest.raises(ValueError, match=message):
            MODELS[family].from_pretrained(directory)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)


@pytest.mark.parametrize("family", MODELS)
@FUZZ
@given(data=st.data())
def test_any_value_in_a_config_loads_or_is_refused(originals, tmp_path_factory, family, data):
    with copied(originals[family], tmp_path_factory.getbasetemp()) as directory:
        config = json.loads((directory / "config.json").read_text())
        # transformers itself looks a model_type up before a class of ours is asked
        names = [(k,) for k in sorted(config) if k != "model_type"]
        names += [("base_config", k) for k in sorted(config["base_config"])]
        keys = data.draw(st.sampled_from(names))
        change_json(directory / "config.json", *keys, value=data.draw(JUNK))
        with little_room(), as_users_run():
            try:
                model = MODELS[family].from_pretrained(directory, blocks=[1])
            except (ValueError, StrictDataclassError) as error:  # the second: transformers' check of its own fields
                assert str(error)
            else:
                assert model.resident_blocks == (1,)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[1]", "{", '{"num_blocks": 3, "num_blocks": 4}'])
def test_json_that_is_nested_without_end_or_names_a_key_twice(originals, tmp_path, text):
    with copied(originals["dit"], tmp_path) as directory:
        (directory / INDEX_NAME).write_text(text)
        assert INDEX_NAME in refused(directory)
        with pytest.raises(ValueError):
            merge_blocks([directory], tmp_path / "merged")


# -- indexes -----------------------------------------------------------------------------------------------------


HOSTILE_TYPES = ["blocked_ditt", "BLOCKED_DIT", "", 3, 1.5, True, None, ["blocked_dit"], {"a": 1}, "llama", "x" * 500]


@pytest.mark.parametrize("value", HOSTILE_TYPES, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("family", MODELS)
def test_a_model_type_that_is_not_the_family_s_is_one_clear_error(originals, tmp_path, family, value):
    model, kind = MODELS[family], MODELS[family].config_class.model_type
    with copied(originals[family], tmp_path) as directory:
        change_json(directory / "config.json", "model_type", value=value)
        ways = [
            lambda: model.from_pretrained(directory),
            lambda: model.from_pretrained(directory, blocks=[1]),
            lambda: model.from_pretrained(directory, block_streaming="host"),
            lambda: model.config_class.from_pretrained(directory),
        ]
        if family == "dit":
            ways.append(lambda: BlockedDiTPipeline.from_pretrained(directory))
        for load in ways:
            with pytest.raises(ValueError, match=f"which must be {kind!r}") as error:
                load()
            said = str(error.value)
            assert "\n" not in said and len(said) < 300 and f"model_type={value!r}"[:60] in said, said
        with pytest.raises(ValueError, match="must be 'blocked_dit' or 'blocked_|no blocks to merge"):
            merge_blocks([directory], tmp_path / "merged")
        if value != "llama":
            for look in (blocked_config_of, family_of):
                with pytest.raises(ValueError, match="which must be a type that transformers knows, such as 'llama'"):
                    look(str(directory))


@pytest.mark.parametrize("family", MODELS)
def test_the_other_family_s_model_is_not_loaded(originals, family):
    other = MODELS["lm" if family == "dit" else "dit"]
    with pytest.raises(ValueError, match="has model_type='blocked_.*', which must be 'blocked_"):
        other.from_pretrained(originals[family])


@pytest.mark.parametrize("value", [3, ["llama"], {"llama": 1}, "lama"])
def test_a_base_s_model_type_may_be_a_stranger_s_too(originals, tmp_path, value):
    with copied(originals["lm"], tmp_path) as directory:
        change_json(directory / "config.json", "base_config", "model_type", value=value)
        base = json.loads((directory / "config.json").read_text())["base_config"]
        with pytest.raises(ValueError, match="base_config's model_type="):
            BlockedForCausalLM.from_pretrained(directory)
    with pytest.raises(ValueError, match="model_type"):
        BlockedForCausalLM.from_base(base)
    with pytest.raises(ValueError, match="the base's config has model_type="):
        blocked_config_of(base)
    with pytest.raises(ValueError, match="unknown model.model_type"):
        load_recipe("pydoc-llama", [f"model.model_type={json.dumps(value)}"])


@pytest.mark.parametrize("text", ["[]", "3", "null", '"blocked_dit"'])
def test_a_config_that_is_no_mapping(originals, tmp_path, text):
    with copied(originals["dit"], tmp_path) as directory:
        (directory / "config.json").write_text(text)
        for load in (BlockedDiTModel.from_pretrained, blocked_config_of, lambda d: merge_blocks([d], tmp_path / "m")):
            with pytest.raises(ValueError, match="config.json"):
                load(directory)


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "block-00.safetensors/../../x", INDEX_NAME, "block-0.safetensors", "", 7]
    + [
        None,
        ["block-00.safetensors"],
        "block-00.bin",
        "pytorch_model.bin",
        "BLOCK-00.safetensors",
        "block-00.safetensors\n",
    ],
)
def test_an_index_that_names_other_files_is_refused(originals, tmp_path, name):
    with copied(originals["dit"], tmp_path) as directory:
        shutil.copy(directory / block_file(0), tmp_path / "secret.safetensors")
        key = next(k for k in read_index(directory / INDEX_NAME)["weight_map"] if k.startswith("blocks.0."))
        change_json(directory / INDEX_NAME, "weight_map", key, value=name)
        assert "which is not a file of a blocked model" in refused(directory)


def test_a_weight_in_the_file_of_another_block_is_refused(originals, tmp_path):
    with copied(originals["dit"], tmp_path) as directory:
        key = next(k for k in read_index(directory / INDEX_NAME)["weight_map"] if k.startswith("blocks.0."))
        change_json(directory / INDEX_NAME, "weight_map", key, value=block_file(1))
        assert f"maps '{key}' to 'block-01.safetensors'; it belongs in 'block-00.safetensors'" in refused(directory)


@FUZZ
@given(part=st.sampled_from(["weight_map", "metadata", "sha256", "bytes", "whole"]), junk=JUNK)
def test_any_index_is_read_or_refused(originals, tmp_path_factory, part, junk):
    with copied(originals["dit"], tmp_path_factory.getbasetemp()) as directory:
        path = directory / INDEX_NAME
        if part == "whole":
            path.write_text(json.dumps(junk))
        else:
            change_json(path, *(("metadata", part) if part in ("sha256", "bytes") else (part,)), value=junk)
        with little_room(), contextlib.suppress(ValueError):
            model = BlockedDiTModel.from_pretrained(directory, blocks=[1])
            assert part in ("metadata", "sha256", "bytes") and model.resident_blocks == (1,)


def test_links_that_go_in_circles_or_nowhere(originals, tmp_path):
    with copied(originals["dit"], tmp_path) as directory:
        for target in (block_file(1), "nowhere"):
            (directory / block_file(1)).unlink()
            (directory / block_file(1)).symlink_to(target)
            assert "block-01.safetensors (block 1) is missing" in refused(directory)


# -- weight files ------------------------------------------------------------------------------------------------


def forge(directory: Path, change: Any) -> None:
    """Change the tensors of block 1's file; the index vouches for the result."""
    path = directory / block_file(1)
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    change_json(directory / INDEX_NAME, "metadata", "sha256", path.name, value=sha256(path))


@pytest.mark.parametrize("shape", [(1,), (3, 3), (0,), (10**4, 10**3)])
def test_wrong_shapes_are_named_before_anything_is_allocated(originals, tmp_path, shape):
    with copied(originals["dit"], tmp_path) as directory:
        forge(directory, lambda weights: weights | {"blocks.1.proj_out_1.weight": torch.zeros(shape)})
        message = refused(directory, blocks=[1])
        assert f"(block 1) in {directory} holds 'blocks.1.proj_out_1.weight' in shape {list(shape)}" in message


@pytest.mark.parametrize(
    "header",
    [
        {"blocks.1.w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
        {
            "blocks.1.w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        {"blocks.1.w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"blocks.1.w": {"dtype": "object", "shape": [2], "data_offsets": [0, 8]}},
        None,
    ],
)
def test_headers_that_lie_are_refused(originals, tmp_path, header):
    with copied(originals["dit"], tmp_path) as directory:
        text = json.dumps(header).encode()
        length = len(text) if header is not None else 2**62
        path = directory / block_file(1)
        path.write_bytes(length.to_bytes(8, "little") + text + bytes(16))
        change_json(directory / INDEX_NAME, "metadata", "sha256", path.name, value=sha256(path))
        assert "block-01.safetensors (block 1)" in refused(directory, blocks=[1])


@FUZZ
@given(data=st.data())
def test_any_bytes_in_a_weight_file_are_refused(originals, tmp_path_factory, data):
    with copied(originals["dit"], tmp_path_factory.getbasetemp()) as directory:
        path = directory / block_file(1)
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, 2000) | st.integers(0, len(content) - 1))
        at = min(at, len(content) - 1)
        content[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content[: data.draw(st.sampled_from([len(content), at]))])
        assert "block-01.safetensors (block 1)" in refused(directory, blocks=[1])


# -- pickles and code --------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_pickled_weights_are_never_read(originals, tmp_path):
    trace = tmp_path / "it ran"
    with copied(originals["dit"], tmp_path) as directory:
        for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "block-01.bin"):
            (directory / name).write_bytes(pickle.dumps(Bomb(trace)))
        assert BlockedDiTModel.from_pretrained(directory).resident_blocks == (0, 1, 2)
        (directory / block_file(1)).write_bytes(pickle.dumps(Bomb(trace)))
        assert "block-01.safetensors (block 1)" in refused(directory)
        for name in (INDEX_NAME, *(block_file(b) for b in range(3)), SHARED_NAME):
            (directory / name).unlink()
        assert INDEX_NAME in refused(directory)
    assert not trace.exists()
    assert pickle.loads(pickle.dumps(Bomb(trace))) is None and trace.exists()  # the bomb works


def test_code_of_a_repository_is_never_run(originals, tmp_path):
    trace = tmp_path / "it ran"
    with copied(originals["dit"], tmp_path) as directory:
        (directory / "evil.py").write_text(
            f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass Model: pass\n"
        )
        values = {"AutoModel": "evil.Model", "AutoConfig": "evil.Model"}
        change_json(directory / "config.json", "auto_map", value=values)
        for load in (AutoModel, BlockedDiTModel):
            assert type(load.from_pretrained(directory)) is BlockedDiTModel
        merge_blocks([directory], tmp_path / "merged")
    assert not trace.exists()


@pytest.mark.parametrize(
    "index",
    [{"vae": ["os", "system"]}, {"vae": "x"}, {"scheduler": ["diffusers", 3]}, {"vae": ["diffusers", "DiTPipeline"]}],
)
def test_a_pipeline_takes_diffusers_components_only(originals, tmp_path, index):
    with copied(originals["dit"], tmp_path) as directory:
        (directory / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=f"model_index.json names .* not a diffusers {next(iter(index))}"):
            BlockedDiTPipeline.from_pretrained(directory)


@pytest.fixture
def run_dir(tmp_path) -> Iterator[Path]:
    reset_accelerate()
    make_trainer(tmp_path / "run", max_steps=1).train()
    yield tmp_path / "run"
    reset_accelerate()


def sign(checkpoint: Path) -> None:
    """Make a forged checkpoint's hashes right."""
    path = checkpoint / checkpoint_module.STATE_NAME
    state = json.loads(path.read_text())
    del state["sha256"]
    if isinstance(state.get("files"), dict):
        state["files"] = {name: sha256(checkpoint / name) for name in state["files"]}
    path.write_text(json.dumps(state | {"sha256": checkpoint_module._digest(state)}))


def test_a_pickle_in_a_checkpoint_is_refused(run_dir, tmp_path):
    checkpoint = checkpoint_module.find_checkpoints(run_dir)[-1]
    torch.save({"state": Bomb(tmp_path / "it ran")}, checkpoint / "optimizer-01.pt")
    sign(checkpoint)
    with pytest.raises(ValueError, match=r"optimizer-01.pt \(block 1\) in .* cannot be read"):
        make_trainer(run_dir, max_steps=1).train(resume_from_checkpoint=True)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("name, value", [("files", [1]), ("files", {"../x": "0"}), ("blocks", 3), ("iteration", "x")])
def test_a_forged_trainer_state_is_refused(run_dir, name, value):
    checkpoint = checkpoint_module.find_checkpoints(run_dir)[-1]
    path = checkpoint / checkpoint_module.STATE_NAME
    state = json.loads(path.read_text()) | {name: value}
    del state["sha256"]
    path.write_text(json.dumps(state | {"sha256": checkpoint_module._digest(state)}))
    with pytest.raises(ValueError, match="is corrupted|is missing"):
        make_trainer(run_dir, max_steps=1).train(resume_from_checkpoint=True)
