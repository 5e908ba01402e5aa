"""Blocks that rest elsewhere: models made, loaded, run and saved with one block on the device at a time."""

import copy
import filecmp
import os

import pytest
import torch
from torch import nn

from hf_diffusionblocks import BlockedDiTModel, BlockedDiTPipeline
from hf_diffusionblocks.generation import denoising_generate
from hf_diffusionblocks.streaming import ALIGNMENT, FileHome, HostHome, Layout, Streamer, stream_blocks
from tiny import as_users_run, tiny_dit, tiny_dit_config
from tiny_text import blocked_lm, tokens

HOMES = ["host", "disk"]
CPU = torch.device("cpu")


def streamed_dit(home: str, tmp_path, **settings) -> BlockedDiTModel:
    model = tiny_dit(3, **settings).eval()
    model.enable_block_streaming(offload_to_disk_path=tmp_path if home == "disk" else None)
    return model


def fetches(streamer: Streamer) -> list[int]:
    streamer.held_bytes()  # waits for what is coming
    return [t.block for t in streamer.trace if t.what == "fetch"]


def sample(pipe: BlockedDiTPipeline, steps: int = 7, **settings) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe([1, 2], steps, generator=torch.Generator().manual_seed(0), output_type="pt", **settings).images


# -- homes -----------------------------------------------------------------------------------------------------------


def a_few_tensors() -> list[torch.Tensor]:
    return [
        torch.randn(3, 5),
        torch.randn(()),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.arange(7),
        torch.randn(0, 3),
        torch.randn(9).bfloat16(),
    ]


def test_a_layout_keeps_shapes_strides_dtypes_and_alignment():
    tensors = a_few_tensors()
    layout = Layout.of(tensors)
    views = layout.views(torch.zeros(layout.nbytes, dtype=torch.uint8))
    for view, tensor in zip(views, tensors, strict=True):
        assert (view.shape, view.dtype, view.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
        if tensor.numel():
            assert (view.data_ptr() - views[0].data_ptr()) % ALIGNMENT == 0


@pytest.mark.parametrize("kind", HOMES)
@pytest.mark.parametrize("writable", [False, True])
def test_a_home_gives_back_what_it_took(kind, writable, tmp_path):
    tensors = a_few_tensors()
    layout = Layout.of(tensors)
    home = HostHome(layout, CPU) if kind == "host" else FileHome(layout, tmp_path)
    home.store(None, [t.clone() for t in tensors])
    flat = home.fetch(CPU, writable)
    views = layout.views(flat)
    for view, tensor in zip(views, tensors, strict=True):
        assert torch.equal(view, tensor)
    views[0].add_(1)  # what a writable one holds is kept when it is stored, a private copy's is not
    if writable:
        home.store(flat, list(views))
    again = layout.views(home.fetch(CPU, False))
    assert torch.equal(again[0], tensors[0] + writable)
    assert torch.equal(again[2], tensors[2])


def test_scratch_files_have_no_name(tmp_path):
    home = FileHome(Layout.of([torch.zeros(1000)]), tmp_path)
    assert home.fetch(CPU, True).numel() == 4096
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"4,096 bytes of a block's state do not fit in .*Free disk space"):
        FileHome(Layout.of([torch.zeros(1000)]), tmp_path)


# -- one block at a time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", HOMES)
def test_absent_blocks_are_nan_and_keep_their_shapes(home, tmp_path):
    model, whole = streamed_dit(home, tmp_path), tiny_dit(3)
    model.block(1)
    for b in range(3):
        for (name, mine), (_, theirs) in zip(
            model.blocks[str(b)].named_parameters(), whole.block_parameters(b), strict=True
        ):
            assert mine.shape == theirs.shape and mine.requires_grad
            if b == 1:
                assert torch.equal(mine, theirs), name
            else:
                assert mine.isnan().all(), name
                assert mine.untyped_storage().nbytes() == 4
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("home", HOMES)
def test_two_blocks_of_weights_at_most_and_one_without_prefetch(home, tmp_path):
    for prefetch in (True, False):
        model = tiny_dit(3)
        path = tmp_path if home == "disk" else None
        model.enable_block_streaming(offload_to_disk_path=path, prefetch=prefetch)
        size = Layout.of(list(tiny_dit(3).block(0).parameters())).nbytes
        for block in (0, 1, 2, 0, 2, 2, 1):
            model.block(block)
            held = model.streamer.held_bytes()
            assert held["visitor"] == size and held["pinned"] == held["next pinned"] == 0
            assert held["next visitor"] == (size if prefetch else 0)


def test_the_next_block_of_the_expected_order_is_fetched_ahead(tmp_path):
    model = streamed_dit("host", tmp_path)
    with model.expect_blocks([0, 0, 2, 1]):  # and then from the start again
        for block in (0, 2, 1, 0, 2):
            model.block(block)
    assert fetches(model.streamer) == [0, 2, 1, 0, 2, 1]
    model.streamer.trace.clear()
    model.block(1)  # came already
    model.block(2)
    assert fetches(model.streamer) == [2, 0]  # by number, as nothing else is known


def test_a_wrong_guess_costs_a_fetch_and_no_memory(tmp_path):
    model = streamed_dit("host", tmp_path)
    reference = tiny_dit(3).eval()
    for block in (0, 2, 1, 2, 0, 1, 1, 0):
        for mine, theirs in zip(model.block(block).parameters(), reference.block(block).parameters(), strict=True):
            assert torch.equal(mine, theirs)
    assert model.streamer.held_bytes()["spare"] == 0 or len(model.streamer._spare) <= 1


@pytest.mark.parametrize("home", HOMES)
def test_what_is_written_into_a_visiting_block_stays(home, tmp_path):
    model = streamed_dit(home, tmp_path)
    other = tiny_dit(3, seed=1)
    model.block(1).load_state_dict(other.block(1).state_dict())
    model.block(2)
    for (name, mine), (_, theirs) in zip(model.block_parameters(1), other.block_parameters(1), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("home", HOMES)
def test_disabling_brings_everything_back(home, tmp_path):
    model = streamed_dit(home, tmp_path)
    parameters = list(model.parameters())
    model.block(2)
    model.disable_block_streaming()
    assert model.streamer is None and all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for mine, theirs in zip(model.parameters(), tiny_dit(3).parameters(), strict=True):
        assert torch.equal(mine, theirs)
    model.enable_block_streaming()  # and it can be streamed again
    assert torch.equal(next(model.block(0).parameters()), next(tiny_dit(3).block(0).parameters()))


# -- making, loading, saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", HOMES)
def test_a_model_made_block_by_block_has_the_same_weights(home, tmp_path, monkeypatch):
    torch.manual_seed(3)
    whole = BlockedDiTModel(tiny_dit_config(3))
    made: list[int] = []  # real (not absent) blocks in memory whenever one is made
    make = BlockedDiTModel.make_block

    def watched(self, block):
        made.append(sum(not next(m.parameters()).isnan().all() for m in self.blocks.values()))
        return make(self, block)

    monkeypatch.setattr(BlockedDiTModel, "make_block", watched)
    torch.manual_seed(3)
    with stream_blocks(home, folder=tmp_path):
        model = BlockedDiTModel(tiny_dit_config(3))
    assert made == [0, 0, 0]
    for b in range(3):
        mine, theirs = model.block(b).state_dict(), whole.block(b).state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
        assert all(torch.equal(x, y) for x, y in zip(model.block(b).buffers(), whole.block(b).buffers(), strict=True))


def test_models_made_outside_the_context_are_whole():
    with stream_blocks("host"):
        pass
    assert BlockedDiTModel(tiny_dit_config(3)).streamer is None


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_and_files_of_a_streamed_model_are_those_of_a_resident_one(home, dtype, tmp_path):
    saved = tmp_path / "saved"
    BlockedDiTPipeline(tiny_dit(3).eval()).save_pretrained(saved)
    resident = BlockedDiTPipeline.from_pretrained(saved, dtype=dtype)
    pipe = BlockedDiTPipeline.from_pretrained(saved, dtype=dtype, block_streaming=home)
    for settings in ({}, {"solver": "heun"}, {"grid": "equal_probability"}, {"steps": 2}, {"guidance_scale": 1.0}):
        assert torch.equal(sample(pipe, **settings), sample(resident, **settings)), settings
    pipe.model.streamer.trace.clear()
    sample(pipe, 12)
    assert len(fetches(pipe.model.streamer)) <= 4  # each block once, whatever the number of steps, and one ahead
    pipe.model.save_pretrained(tmp_path / "streamed")
    resident.model.save_pretrained(tmp_path / "resident")
    names = sorted(os.listdir(tmp_path / "resident"))
    assert filecmp.cmpfiles(tmp_path / "resident", tmp_path / "streamed", names, shallow=False) == (names, [], [])


def test_the_pipeline_streams_a_loaded_model(tmp_path):
    model = tiny_dit(3).eval()
    pipe = BlockedDiTPipeline(model)
    wanted = sample(pipe)
    pipe.enable_block_streaming(offload_to_disk_path=tmp_path)
    assert torch.equal(sample(pipe), wanted)
    with pytest.raises(ValueError, match=r"streamed already: call disable_block_streaming\(\)"):
        pipe.enable_block_streaming()


@pytest.mark.parametrize("home", HOMES)
def test_some_blocks_alone_can_be_streamed(home, tmp_path):
    tiny_dit(3).save_pretrained(tmp_path)
    model = BlockedDiTModel.from_pretrained(tmp_path, blocks=[0, 2], block_streaming=home)
    assert model.resident_blocks == (0, 2)
    assert torch.equal(next(model.block(2).parameters()), next(tiny_dit(3).block(2).parameters()))
    with pytest.raises(ValueError, match="block 1 is not loaded"):
        model.block(1)


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"readout": "exact", "context": "cascade"},
        {"readout": "exact", "context": "independent"},
        {"readout": "edm", "context": "independent"},
    ],
    ids=lambda s: "-".join(s.values()) or "clean-cascade",
)
def test_tokens_of_a_streamed_language_model_are_those_of_a_resident_one(home, settings, tmp_path):
    resident, model = blocked_lm(**settings), blocked_lm(**settings)
    model.enable_block_streaming(offload_to_disk_path=tmp_path if home == "disk" else None)
    ids = tokens(2, 8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, resident(ids).logits)
    common = {"max_new_tokens": 4, "eos_token_id": None}
    greedy = {"do_sample": False} | common
    walk = {"custom_generate": denoising_generate, "steps": 5, "seed": 1, "do_sample": True} | common
    assert torch.equal(model.generate(ids, **greedy), resident.generate(ids, **greedy))
    assert torch.equal(model.generate(ids, **walk), resident.generate(ids, **walk))
    assert model.streamer.held_bytes()["pinned"] == 0


# -- errors ----------------------------------------------------------------------------------------------------------


def test_what_needs_all_weights_is_refused(tmp_path):
    model = streamed_dit("host", tmp_path)
    with pytest.raises(ValueError, match=r"save_pretrained\(\)"):
        model.state_dict()
    with pytest.raises(ValueError, match=r"float32 to cpu, torch.bfloat16: call disable_block_streaming\(\)"):
        model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"cannot be copied: call disable_block_streaming\(\)"):
        copy.deepcopy(model)
    assert model.to("cpu") is model


def test_unknown_homes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'host' or 'disk', not in 'gpu'"), as_users_run(), stream_blocks("gpu"):
        pass
    with pytest.raises(ValueError, match="not in 'gpu'"):
        BlockedDiTModel.from_pretrained(tmp_path, block_streaming="gpu")


def test_a_weight_file_that_is_gone_is_told(tmp_path):
    tiny_dit(3).save_pretrained(tmp_path)
    model = BlockedDiTModel.from_pretrained(tmp_path, block_streaming="disk")
    (tmp_path / "block-01.safetensors").unlink()
    model.block(0)
    with pytest.raises(OSError, match=r"block-01.safetensors"):
        model.block(1)


def test_a_streamer_works_on_any_modules(tmp_path):
    blocks = nn.ModuleDict({str(b): nn.Linear(4, 4) for b in range(2)})
    wanted = [block.weight.detach().clone() for block in blocks.values()]
    streamer = Streamer(blocks, "cpu", to_disk=True, folder=tmp_path)
    for b in range(2):
        streamer.adopt(b)
    streamer.pin(0, following=1)
    with torch.no_grad():
        blocks["0"].weight += 1
    streamer.visit(1)  # beside it, and of what is at home
    assert torch.equal(blocks["1"].weight, wanted[1]) and torch.equal(blocks["0"].weight, wanted[0] + 1)
    streamer.pin(1)
    with torch.no_grad():
        blocks["1"].weight += 2
    streamer.pin(None)
    streamer.visit(0)
    assert torch.equal(blocks["0"].weight, wanted[0] + 1)
    streamer.release()
    streamer.visit(1)
    assert torch.equal(blocks["1"].weight, wanted[1] + 2)
