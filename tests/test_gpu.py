"""What only a GPU can show: the same numbers there as on the CPU, copies beside kernels, and memory as planned.

``make test-gpu`` runs this file and the tests of training, residency and resuming with their trainers on the GPU.
"""

import json

import pytest
import torch
from torch import Tensor

from battery import BATCH, Family
from battery import parametrize as pytest_generate_tests  # noqa: F401
from hf_diffusionblocks import (
    BlockedDiTConfig,
    BlockedDiTModel,
    BlockedDiTPipeline,
    DiffusionBlocksTrainer,
    DiffusionBlocksTrainingArguments,
    plan_memory,
)
from hf_diffusionblocks.memory import BLOCKED, CHECKPOINTING
from hf_diffusionblocks.memory_counting import measure_step
from hf_diffusionblocks.modeling import BlockedPreTrainedModel
from hf_diffusionblocks.serialization import same_tensors
from hf_diffusionblocks.training.residency import construction
from runs import reset_accelerate
from tiny import TinyImages, tiny_dit
from tiny_text import blocked_lm, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MIB = 2**20


@pytest.fixture(autouse=True)
def exact_products():
    """No tf32, and a fresh Accelerate, which remembers whether the CPU was asked for."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    reset_accelerate()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    reset_accelerate()


def to_device(values: dict, device: str) -> dict:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}


def train(model: BlockedPreTrainedModel, dataset, folder, **settings) -> DiffusionBlocksTrainer:
    given = {"max_steps": 3, "per_device_train_batch_size": BATCH, "learning_rate": 1e-3, "disable_tqdm": True}
    given |= {"block_order": "round_robin", "save_steps": 100, "logging_steps": 1} | settings
    reset_accelerate()
    trainer = DiffusionBlocksTrainer(model, DiffusionBlocksTrainingArguments(output_dir=str(folder), **given), dataset)
    trainer.train()
    return trainer


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "updates.jsonl").read_text().splitlines()]


def test_each_family_estimates_what_it_does_on_the_cpu(family: Family):
    model = family.build(family.num_blocks).eval()
    low, high = model.partition.range(family.last)
    level = (low + high) / 2
    with torch.no_grad():
        wanted = model.denoise(family.noisy(level), level, **family.conditioning())
        model.to("cuda")
        found = model.denoise(family.noisy(level).cuda(), level, **to_device(family.conditioning(), "cuda"))
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-4)


def test_each_family_trains_as_on_the_cpu(family: Family, tmp_path):
    train(family.build(family.num_blocks), family.dataset(), tmp_path / "cpu", cpu=True)
    trainer = train(family.build(family.num_blocks), family.dataset(), tmp_path / "gpu")
    assert trainer.accelerator.device.type == "cuda"
    wanted, found = losses(tmp_path / "cpu"), losses(tmp_path / "gpu")
    assert len(wanted) == 3 * family.num_blocks
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"torch_compile": True}], ids=str)
def test_half_precision_trains_every_family(family: Family, settings, tmp_path):
    if settings.get("torch_compile") and family.build is not tiny_dit:
        pytest.skip("compiled blocks are tested with one family: compiling takes long")
    train(family.build(family.num_blocks), family.dataset(), tmp_path / "full")
    train(family.build(family.num_blocks), family.dataset(), tmp_path / "half", mixed_precision="bf16", **settings)
    wanted, found = torch.tensor(losses(tmp_path / "full")), torch.tensor(losses(tmp_path / "half"))
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("home", ["host", "disk"])
def test_blocks_that_rest_elsewhere_give_the_same_numbers(family: Family, home, tmp_path):
    settings = {"steps_per_visit": 2, "max_steps": 5}
    resident = train(family.build(family.num_blocks), family.dataset(), tmp_path / "device", **settings)
    streamed = train(family.build(family.num_blocks), family.dataset(), tmp_path / home, residency=home, **settings)
    if streamed.model.streamer is not None:
        streamed.model.disable_block_streaming()
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / home)), torch.tensor(losses(tmp_path / "device")), rtol=1e-4, atol=1e-6
    )
    for name, value in resident.model.state_dict().items():
        torch.testing.assert_close(streamed.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def big_config(num_blocks: int, num_layers: int = 12) -> BlockedDiTConfig:
    base = {"num_layers": num_layers, "num_attention_heads": 8, "attention_head_dim": 64, "sample_size": 32}
    base |= {"in_channels": 4, "patch_size": 2, "num_embeds_ada_norm": 10, "attention_bias": True}
    return BlockedDiTConfig(base_config=base, num_blocks=num_blocks)


class Latents(TinyImages):
    def __init__(self):
        super().__init__(64, size=32, channels=4)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("residency", ["device", "host", "disk"])
def test_the_allocators_peak_is_what_was_planned(residency, checkpointing, mixed_precision, tmp_path):
    """One block's job, or all blocks in turn with one there: weights, gradients, moments and activations of one block
    (and the next one's weights and moments), and a few MiB of workspaces and of tensors that live inside a kernel."""
    torch.zeros(8, 8, device="cuda") @ torch.zeros(8, 8, device="cuda")  # the workspace of products, which stays
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    settings = {"output_dir": str(tmp_path), "per_device_train_batch_size": 16, "use_ema": False, "disable_tqdm": True}
    settings |= {"gradient_checkpointing": checkpointing, "mixed_precision": mixed_precision, "max_steps": 4}
    settings |= {"residency": residency, "steps_per_visit": 2, "block_order": "round_robin", "save_steps": 100}
    if residency == "device":
        settings["blocks"] = [1]
    args = DiffusionBlocksTrainingArguments(**settings)
    with construction(args):
        model = BlockedDiTModel(big_config(3), blocks=[1] if residency == "device" else None)
    trainer = DiffusionBlocksTrainer(model, args, Latents())
    trainer.train()
    peak = torch.cuda.max_memory_allocated() - before
    plan = plan_memory(
        big_config(3), batch_size=16, mixed_precision=mixed_precision, use_ema=False, alternatives=False, device="cuda"
    )
    row = plan.worst(BLOCKED + (CHECKPOINTING if checkpointing else ""))
    wanted = row.total + (0 if residency == "device" else row.weights + row.moments)
    print(f"{residency} {checkpointing} {mixed_precision}: peak {peak / MIB:.1f}, planned {wanted / MIB:.1f} MiB")
    assert 0.85 * wanted < peak < 1.1 * wanted + 32 * MIB


def test_counted_bytes_are_those_of_the_plan(tmp_path):
    args = DiffusionBlocksTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=16, use_ema=False, blocks=[1], mixed_precision="bf16"
    )
    trainer = DiffusionBlocksTrainer(BlockedDiTModel(big_config(3), blocks=[1]), args, Latents())
    counted = measure_step(trainer.trainers[1])
    plan = plan_memory(
        big_config(3), batch_size=16, mixed_precision="bf16", use_ema=False, alternatives=False, device="cuda"
    )
    row = next(r for r in plan.rows if r.method == BLOCKED and r.block == 1)
    assert (row.weights, row.gradients, row.moments) == (counted.weights, counted.gradients, counted.moments)
    assert abs(counted.activations - row.activations) <= 0.02 * row.activations


def test_what_rests_in_host_memory_is_page_locked_and_comes_beside_the_computation(tmp_path):
    args = DiffusionBlocksTrainingArguments(
        output_dir=str(tmp_path), max_steps=16, steps_per_visit=8, per_device_train_batch_size=16, residency="host",
        block_order="round_robin", save_steps=1000, disable_tqdm=True,
    )  # fmt: skip
    with construction(args):
        model = BlockedDiTModel(big_config(3))
    trainer = DiffusionBlocksTrainer(model, args, Latents())
    trainer.train()
    homes = list(model.streamer._homes.values())
    assert homes and all(home.flat.is_pinned() for home in homes if home.layout.nbytes)
    trace = list(model.streamer.trace)
    waited = sum(t.end - t.start for t in trace if t.what == "wait")
    assert sum(t.nbytes for t in trace if t.what == "fetch") > 0 and waited < trainer.training_seconds


def test_images_are_the_same_with_one_block_on_the_gpu(tmp_path):
    BlockedDiTPipeline(tiny_dit(3)).save_pretrained(tmp_path)

    def sample(**settings) -> Tensor:
        pipe = BlockedDiTPipeline.from_pretrained(tmp_path, **settings)
        pipe.set_progress_bar_config(disable=True)
        if not settings:
            pipe.to("cuda")
        assert pipe.device.type == "cuda"
        return pipe([0, 1, 2], 6, generator=torch.Generator().manual_seed(0), output_type="pt").images.cpu()

    wanted = sample()
    for home in ("host", "disk"):
        streamed = sample(block_streaming=home, device_map="cuda")
        torch.testing.assert_close(streamed, wanted, rtol=1e-4, atol=1e-4)


def test_text_is_that_of_the_cpu():
    model = blocked_lm().eval()
    ids = tokens(2, 6)
    given = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **given)
    model.to("cuda")
    found = model.generate(ids.cuda(), attention_mask=torch.ones_like(ids).cuda(), **given)
    assert torch.equal(found.cpu(), wanted)


def test_a_run_that_was_stopped_on_the_gpu_goes_on_to_the_same_weights(tmp_path):
    def run(folder, steps: int) -> BlockedDiTModel:
        model = tiny_dit(3)
        settings = {"learning_rate": 1e-3, "disable_tqdm": True, "block_order": "round_robin", "save_steps": 6}
        args = DiffusionBlocksTrainingArguments(
            output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, residency="host", **settings
        )
        trainer = DiffusionBlocksTrainer(model, args, TinyImages())
        if steps < 12:

            class Stop:
                def __getattr__(self, name):
                    return lambda *a, **k: None

                def on_step_end(self, args, state, control, **kwargs):
                    control.should_training_stop = state.global_step >= steps

            trainer.callbacks.append(Stop())
        trainer.train(resume_from_checkpoint=True)
        trainer.model.disable_block_streaming()
        return trainer.model

    whole = run(tmp_path / "whole", 12)
    run(tmp_path / "part", 6)
    assert same_tensors(run(tmp_path / "part", 12).state_dict(), whole.state_dict())
