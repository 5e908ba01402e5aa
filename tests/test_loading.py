"""Loading as transformers does it: device maps, offloading, overridden settings, subfolders, the Hub's cache."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from hf_diffusionblocks import serialization
from hf_diffusionblocks.families.dit import BlockedDiTModel
from hf_diffusionblocks.serialization import same_tensors
from tiny import NUM_CLASSES, tiny_dit


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


def denoised(model: BlockedDiTModel, block: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    low, high = model.partition.range(block)
    z = high * torch.randn(2, 1, 8, 8, generator=generator)
    with torch.no_grad():
        return model.denoise(z, (low * high) ** 0.5, class_labels=torch.tensor([3, NUM_CLASSES]))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, {"": "disk"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_device_map_changes_nothing(saved, tmp_path, device_map, dtype):
    plain = BlockedDiTModel.from_pretrained(saved, dtype=dtype)
    placed = BlockedDiTModel.from_pretrained(
        saved, dtype=dtype, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert placed.dtype == dtype
    for block in range(3):
        assert torch.equal(denoised(placed, block), denoised(plain, block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_disk", [[0], [1, 2], [0, 1, 2]])
def test_blocks_on_the_disk_are_read_when_they_are_needed(saved, tmp_path, on_disk, dtype):
    device_map = {f"blocks.{b}": "disk" if b in on_disk else "cpu" for b in range(3)}
    placed = BlockedDiTModel.from_pretrained(
        saved, device_map=device_map, offload_folder=tmp_path / "offload", dtype=dtype
    )
    plain = BlockedDiTModel.from_pretrained(saved, dtype=dtype)
    for block in range(3):
        assert all((p.device.type == "meta") == (block in on_disk) for _, p in placed.block_parameters(block))
        assert torch.equal(denoised(placed, block), denoised(plain, block))


def test_too_little_memory_sends_blocks_to_the_disk(saved, tmp_path):
    placed = BlockedDiTModel.from_pretrained(
        saved,
        device_map="auto",
        max_memory={"cpu": serialization.bytes_of(tiny_dit(3).parameters()) // 2},
        offload_folder=tmp_path / "offload",
    )
    assert {"cpu", "disk"} == {str(device) for device in placed.hf_device_map.values()}
    for block in range(3):
        assert torch.equal(denoised(placed, block), denoised(tiny_dit(3), block))


@pytest.mark.parametrize("device_map", [{"": "cpu"}, {"blocks.1": "disk"}, "auto"], ids=str)
def test_one_block_with_a_device_map(saved, tmp_path, device_map):
    for block in (0, 2):
        (saved / f"block-{block:02d}.safetensors").unlink()
    placed = BlockedDiTModel.from_pretrained(
        saved, blocks=[1], device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(denoised(placed, 1), denoised(tiny_dit(3), 1))
    assert placed.resident_blocks == (1,)


def test_an_offloaded_model_saves_what_it_holds(saved, original, tmp_path):
    for name, settings in {"all": {}, "part": {"blocks": [1]}}.items():
        placed = BlockedDiTModel.from_pretrained(
            saved,
            device_map={f"blocks.{b}": "disk" for b in settings.get("blocks", range(3))},
            offload_folder=tmp_path / f"offload-{name}",
            **settings,
        )
        placed.save_pretrained(tmp_path / name)
    assert contents(tmp_path / "all") == contents(original)
    assert (tmp_path / "part" / "block-01.safetensors").read_bytes() == (saved / "block-01.safetensors").read_bytes()


def test_settings_may_be_overridden_while_loading(saved):
    for blocks in (None, [1]):
        model = BlockedDiTModel.from_pretrained(saved, blocks=blocks, label_dropout=0.3, dtype=torch.bfloat16)
        assert model.config.label_dropout == 0.3 and model.dtype == torch.bfloat16
        with pytest.raises(ValueError, match="num_blocks=2"):
            BlockedDiTModel.from_pretrained(saved, blocks=blocks, num_blocks=2)


def test_loading_information_on_request(saved):
    for blocks in (None, [1]):
        model, info = BlockedDiTModel.from_pretrained(saved, blocks=blocks, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert model.name_or_path == str(saved)


def test_a_model_in_a_subfolder(saved, tmp_path):
    for blocks in (None, [1]):
        loaded = BlockedDiTModel.from_pretrained(tmp_path, subfolder="model", blocks=blocks)
        assert torch.equal(denoised(loaded, 1), denoised(tiny_dit(3), 1))
    (saved / "block-00.safetensors").unlink()
    with pytest.raises(ValueError, match=r"\(block 0\) is missing"):
        BlockedDiTModel.from_pretrained(tmp_path, subfolder="model")


@pytest.fixture
def hub_cache(saved, tmp_path) -> Path:
    """The Hub's cache as `huggingface_hub` lays it out, holding someone/tiny: links to files under other names."""
    repo = tmp_path / "cache" / "models--someone--tiny"
    snapshot = repo / "snapshots" / ("0" * 40)
    for path in (repo / "refs", repo / "blobs", snapshot):
        path.mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for number, path in enumerate(sorted(saved.iterdir())):
        shutil.copy(path, repo / "blobs" / f"blob{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
    return tmp_path / "cache"


def test_a_model_of_the_hub_loads_from_the_cache(hub_cache):
    loaded = AutoModel.from_pretrained("someone/tiny", cache_dir=hub_cache)
    assert same_tensors(loaded.state_dict(), tiny_dit(3).state_dict())


def test_one_block_of_the_hub_needs_its_own_files_only(hub_cache):
    snapshot = next((hub_cache / "models--someone--tiny" / "snapshots").iterdir())
    for block in (0, 2):
        (snapshot / f"block-{block:02d}.safetensors").unlink()
    for load in (BlockedDiTModel, AutoModel):
        loaded = load.from_pretrained("someone/tiny", cache_dir=hub_cache, blocks=[1], revision="main")
        assert torch.equal(denoised(loaded, 1), denoised(tiny_dit(3), 1))
        assert loaded.name_or_path == "someone/tiny"
    for blocks in ([0], None):
        with pytest.raises(OSError, match=r"cannot get block-00\.safetensors \(block 0\) of someone/tiny"):
            BlockedDiTModel.from_pretrained("someone/tiny", cache_dir=hub_cache, blocks=blocks)
    blob = (snapshot / "block-01.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"block-01\.safetensors \(block 1\) .*truncated"):
        BlockedDiTModel.from_pretrained("someone/tiny", cache_dir=hub_cache, blocks=[1])
