"""Predictions against counts of real steps, and counts against what can be known by hand or from the allocator."""

import functools
import json

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel

from hf_diffusionblocks import (
    BlockedDiTConfig,
    BlockedDiTModel,
    DiffusionBlocksTrainer,
    DiffusionBlocksTrainingArguments,
)
from hf_diffusionblocks.memory import (
    ALL_BLOCKS,
    BLOCKED,
    CHECKPOINTING,
    END_TO_END,
    MemoryPlan,
    MemoryUse,
    measure_memory,
    measure_step,
    plan_memory,
)
from hf_diffusionblocks.memory_counting import KINDS, SavedTensors
from hf_diffusionblocks.memory_fake_steps import FakeStep
from hf_diffusionblocks.modeling import BlockedPreTrainedModel
from hf_diffusionblocks.objectives import DenoisingScoreMatching

BATCH = 8


@functools.cache
def config_of(num_blocks: int = 3, num_layers: int = 6, heads: int = 4, **settings) -> BlockedDiTConfig:
    base = {"num_layers": num_layers, "num_attention_heads": heads, "attention_head_dim": 16, "sample_size": 16}
    base |= {"in_channels": 3, "patch_size": 2, "num_embeds_ada_norm": 10}
    return BlockedDiTConfig(base_config=base, num_blocks=num_blocks, **settings)


@functools.cache
def plan_of(num_blocks: int, mixed_precision: str = "no", num_layers: int = 6, heads: int = 4) -> MemoryPlan:
    config = config_of(num_blocks, num_layers, heads)
    return plan_memory(config, batch_size=BATCH, mixed_precision=mixed_precision, device="cpu")


def measured(
    num_blocks: int, block: int, mixed_precision: str = "no", checkpointing: bool = False, **shape
) -> MemoryUse:
    model = BlockedDiTModel(config_of(num_blocks, **shape), blocks=[block])
    batch = model.dummy_batch(BATCH)
    kwargs = {"mixed_precision": mixed_precision, "gradient_checkpointing": checkpointing}
    return measure_memory(model, block, batch, **kwargs)


def row_of(plan: MemoryPlan, method: str, block: int | None = None):
    return next(row for row in plan.rows if row.method == method and row.block == block)


def assert_close(predicted: MemoryUse, counted: MemoryUse) -> None:
    for kind in KINDS:
        assert getattr(predicted, kind) == pytest.approx(getattr(counted, kind), rel=0.05), kind


# -- predicted against measured ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_predictions_hold_what_a_step_holds(num_blocks, mixed_precision, checkpointing):
    counted = measured(num_blocks, num_blocks - 1, mixed_precision, checkpointing)
    method = BLOCKED + (CHECKPOINTING if checkpointing else "")
    plan = plan_of(num_blocks, mixed_precision)
    assert_close(row_of(plan, method, num_blocks - 1), counted)
    if num_blocks == 1:
        assert_close(row_of(plan, method.replace(BLOCKED, END_TO_END)), counted)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_predictions_hold_at_another_width(checkpointing):
    counted = measured(3, 0, "no", checkpointing, heads=6)
    assert_close(row_of(plan_of(3, heads=6), BLOCKED + (CHECKPOINTING if checkpointing else ""), 0), counted)


def test_predictions_hold_for_low_precision_weights_without_average():
    model = BlockedDiTModel(config_of(2), blocks=[0]).to(torch.bfloat16)
    counted = measure_memory(model, 0, model.dummy_batch(BATCH), use_ema=False)
    plan = plan_memory(config_of(2), batch_size=BATCH, dtype=torch.bfloat16, use_ema=False, device="cpu")
    assert_close(row_of(plan, BLOCKED, 0), counted)
    assert counted.ema == 0


def test_predictions_hold_for_a_pretrained_network_s_preconditioning():
    """It looks noise levels up in a table of numpy's, and fake tensors have no values to look up."""
    schedule = {"num_train_timesteps": 100, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    base = config_of(2).base_config | {"out_channels": 6}
    config = BlockedDiTConfig(base_config=base, num_blocks=2, preconditioning="vp_epsilon", noise_schedule=schedule)
    model = BlockedDiTModel(config, blocks=[1])
    counted = measure_memory(model, 1, model.dummy_batch(BATCH))
    assert_close(row_of(plan_memory(config, batch_size=BATCH, device="cpu"), BLOCKED, 1), counted)


@pytest.fixture
def fresh_accelerator():
    # Accelerate keeps the first run's precision for the whole process.
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_predictions_hold_for_a_trainer_of_all_blocks(mixed_precision, fresh_accelerator, tmp_path):
    model = BlockedDiTModel(config_of(3))
    args = DiffusionBlocksTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=BATCH,
        mixed_precision=mixed_precision,
        gradient_checkpointing=True,
        cpu=True,
    )
    rows = model.dummy_batch(BATCH)

    class Data:
        def __len__(self):
            return BATCH

        def __getitem__(self, index):
            return {name: value[index] for name, value in rows.items()}

    trainer = DiffusionBlocksTrainer(model, args, Data())
    plan = plan_of(3, mixed_precision)
    together, alone = row_of(plan, ALL_BLOCKS + CHECKPOINTING), row_of(plan, BLOCKED + CHECKPOINTING, 1)
    one = measure_step(trainer.trainers[1])
    assert one.weights == pytest.approx(together.weights, rel=0.05), "the model that is resident holds every block"
    for kind in ("gradients", "moments", "ema", "activations"):
        assert getattr(one, kind) == pytest.approx(getattr(alone, kind), rel=0.05), kind
    assert_close(together, measure_step(trainer))
    assert [t.updates for t in trainer.trainers.values()] == [1, 2, 1]


# -- counts against what is known otherwise ----------------------------------------------------------------------------


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_counted_activations_are_what_the_allocator_holds_between_forward_and_backward(mixed_precision):
    model = BlockedDiTModel(config_of(2), blocks=[0]).train()
    batch, objective = model.dummy_batch(BATCH), DenoisingScoreMatching()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
            result = objective(model, 0, batch, torch.Generator())
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = sum(event.nbytes() for event in events)
    assert result.loss.requires_grad and len(events) > 100
    assert measured(2, 0, mixed_precision).activations == pytest.approx(held, rel=0.001)


class Layer(nn.Module):
    """Saves its input, the first product and what gelu made of it: three tensors of the input's size."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return self.second(torch.nn.functional.gelu(self.first(x)))


class Stack(nn.Module):
    def __init__(self, layers: int, checkpointing: bool):
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(layers)])
        self.gradient_checkpointing = checkpointing
        self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)

    def forward(self, x):
        for layer in self.layers:
            x = self._gradient_checkpointing_func(layer, x) if self.gradient_checkpointing else layer(x)
        return x


@pytest.mark.parametrize("layers", [1, 4])
def test_saved_tensors_count_what_can_be_counted_by_hand(layers):
    x, size = torch.randn(32, 16), 32 * 16 * 4
    plain, lean = Stack(layers, False), Stack(layers, True)
    with SavedTensors([plain]) as saved:
        loss = plain(x).sum()
        assert saved.live == saved.peak == 3 * layers * size
        loss.backward()
    assert saved.peak == 3 * layers * size
    assert saved.live == size, "only x is left, which this test holds"

    function = lean._gradient_checkpointing_func
    with SavedTensors([lean]) as saved:
        loss = lean(x).sum()
        assert saved.live == layers * size, "the layers' inputs"
        loss.backward()
    # At the last layer's recomputation every input is held, its own among them, and the two other tensors.
    assert saved.peak == (layers + 2) * size
    assert saved.live == size
    assert lean._gradient_checkpointing_func is function
    for parameter in lean.parameters():
        assert parameter.grad is not None


def test_views_of_a_storage_count_once_with_its_full_size():
    weight = torch.ones(3, requires_grad=True)
    data = torch.randn(100)
    with SavedTensors([]) as saved:
        product = weight * data[:3] + weight * data[3:6]
    assert product.requires_grad
    assert saved.live == saved.peak == 100 * 4
    del data, product
    assert (saved.live, saved.peak) == (0, 100 * 4)


def test_measuring_leaves_the_model_as_it_was():
    model = BlockedDiTModel(config_of(2)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure_memory(model, 1, model.dummy_batch(2), gradient_checkpointing=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not model.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


# -- the claims --------------------------------------------------------------------------------------------------------


def test_a_third_of_the_blocks_holds_a_third_of_the_memory():
    def trained(use: MemoryUse) -> int:
        return use.weights + use.gradients + use.moments + use.activations

    plan = plan_of(3, num_layers=12)
    whole = row_of(plan, END_TO_END)
    blocks = [row for row in plan.rows if row.method == BLOCKED]
    assert [row.block for row in blocks] == [0, 1, 2]
    for row in blocks:
        assert 1 / 3 <= trained(row) / trained(whole) <= 0.36
        assert 1 / 3 <= row.ratio <= 0.36
    ratio = trained(measured(3, 0, num_layers=12)) / trained(measured(1, 0, num_layers=12))
    assert 1 / 3 <= ratio <= 0.36


def test_stepping_all_blocks_in_one_process_saves_gradients_and_activations_only():
    plan = plan_of(3, num_layers=12)
    whole, together, block = row_of(plan, END_TO_END), row_of(plan, ALL_BLOCKS), plan.worst(BLOCKED)
    for kind in ("weights", "moments", "ema"):
        assert getattr(together, kind) >= getattr(whole, kind)
    for kind in ("gradients", "activations"):
        assert getattr(together, kind) == getattr(block, kind) <= 0.36 * getattr(whole, kind)


def test_memory_by_kind_is_deterministic():
    first, second = (plan_memory(config_of(3), batch_size=BATCH, device="cpu") for _ in range(2))
    assert first == second
    torch.manual_seed(1)
    assert measured(3, 0, "bf16", True) == measured(3, 0, "bf16", True)


def test_planning_allocates_no_model():
    """DiT-XL/2 has 2.7 GB of weights."""
    base = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 32}
    config = BlockedDiTConfig(base_config=base, num_blocks=4)
    before = psutil.Process().memory_info().rss
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        plan = plan_memory(config, batch_size=256, device="cpu")
    grown = psutil.Process().memory_info().rss - before
    sizes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert row_of(plan, END_TO_END).weights > 2.5e9
    assert max(sizes) < 1e6 and sum(size for size in sizes if size > 0) < 10e6
    assert grown < 500e6, "the profiler's own records included"


def test_extrapolation_over_layers_is_exact():
    config = config_of(2, num_layers=7, layers_per_block=None)
    step = FakeStep(
        AutoModel.from_config, BATCH, torch.float32, "bf16", DenoisingScoreMatching(), torch.device("cpu"), {}
    )
    model = step.build(config)
    assert len(model.partition.layers(0)) == 4
    assert step._extrapolate(model, 0) == step._run(model, 0)


class UnevenModel(BlockedDiTModel):
    """Blocks whose size is not proportional to their number of layers."""

    def make_block(self, block):
        module = super().make_block(block)
        module.extra = nn.Linear(len(self.partition.layers(block)) ** 2, 8)
        return module


def test_blocks_of_uneven_layers_are_not_extrapolated():
    steps = [
        FakeStep(make, BATCH, torch.float32, "no", DenoisingScoreMatching(), torch.device("cpu"), {})
        for make in (UnevenModel, BlockedDiTModel)
    ]
    uneven, even = (step.build(config_of(1, num_layers=4)) for step in steps)
    assert steps[0]._extrapolate(uneven, 0) is None
    assert steps[0].counts(uneven, 0) == steps[1].counts(even, 0), "the extra weights take no part"


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_rows_add_up():
    plan = plan_of(3)
    methods = [row.method for row in plan.rows if row.block in (None, 0)]
    assert methods == [m + c for m in (END_TO_END, BLOCKED, ALL_BLOCKS) for c in ("", CHECKPOINTING)]
    assert len(plan.rows) == 10
    for row in plan.rows:
        assert row.total == row.weights + row.gradients + row.moments + row.ema + row.activations
        assert row.ratio == row.total / plan.rows[0].total
    assert plan.worst(BLOCKED).total == max(row.total for row in plan.rows if row.method == BLOCKED)
    model = BlockedDiTModel(config_of(3))
    for b in range(3):
        count = sum(p.numel() for _, p in model.block_parameters(b))
        row = row_of(plan, BLOCKED, b)
        assert (row.parameters, row.layers, row.gradients, row.ema) == (count, 2, 4 * count, 4 * count)
    assert row_of(plan, ALL_BLOCKS).parameters == sum(p.numel() for p in model.parameters())


def test_uneven_blocks_have_their_own_rows():
    plan = plan_memory(config_of(2, layers_per_block=(5, 1)), batch_size=1, device="cpu")
    large, small = (row_of(plan, BLOCKED, b) for b in (0, 1))
    assert (large.layers, small.layers) == (5, 1)
    assert plan.worst(BLOCKED) == large
    assert small.total < large.total < row_of(plan, END_TO_END).total


def test_checkpointing_and_batch_size_act_on_activations_only():
    small, large = plan_of(3), plan_memory(config_of(3), batch_size=4 * BATCH, device="cpu")
    for a, b in zip(small.rows, large.rows, strict=True):
        assert [getattr(a, k) for k in KINDS[:4]] == [getattr(b, k) for k in KINDS[:4]]
        assert b.activations == pytest.approx(4 * a.activations, rel=0.01)
    plain, lean = row_of(small, END_TO_END), row_of(small, END_TO_END + CHECKPOINTING)
    assert [getattr(plain, k) for k in KINDS[:4]] == [getattr(lean, k) for k in KINDS[:4]]
    assert lean.activations < 0.3 * plain.activations


def test_the_table_shows_every_row_and_the_summary():
    plan = plan_of(3)
    lines = str(plan).splitlines()
    for row in plan.rows:
        block = "all" if row.block is None else str(row.block)
        figures = [block, str(row.layers), f"{row.parameters:,}"]
        mine = [line for line in lines if line.startswith(row.method + "  ")]
        matches = [line for line in mine if line[len(row.method) :].split()[:3] == figures]
        assert len(matches) == 1, (row.method, figures)
        assert matches[0].split()[-1] == f"{row.ratio:.3f}"
    assert "blocks=[b]" in str(plan)
    assert plan.summary in lines and plan.summary == plan.to_dict()["summary"]
    assert "one of 3 blocks" in plan.summary and f"{plan.worst(BLOCKED).ratio:.2f} of end to end's" in plan.summary
    assert "batch_size=8" in lines[0] and "mixed_precision=no" in lines[0]


def test_a_plan_is_json_ready():
    plan = plan_of(3)
    back = json.loads(json.dumps(plan.to_dict()))
    assert [row["total"] for row in back["rows"]] == [row.total for row in plan.rows]
    assert back["settings"]["num_blocks"] == 3 and back["rows"][0]["method"] == END_TO_END


def test_a_model_s_plan_is_its_config_s_plan():
    model = BlockedDiTModel(config_of(2), blocks=[0])
    assert plan_memory(model, batch_size=BATCH, device="cpu") == plan_of(2)


def test_the_number_of_blocks_can_be_another_than_the_config_s():
    assert plan_memory(config_of(2), 3, batch_size=BATCH, device="cpu") == plan_of(3)


def test_explicit_edges_are_planned_for():
    config = config_of(2, partition="explicit", edges=(80.0, 1.0, 0.002))
    assert plan_memory(config, batch_size=BATCH, device="cpu").rows == plan_of(2).rows


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"batch_size": True}, "batch_size=True"),
        ({"num_blocks": 7}, "num_blocks=7 is more than the 6 layers"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"mixed_precision": "bf"}, "did you mean 'bf16'"),
        ({"dtype": torch.int64}, "dtype=torch.int64"),
        ({"device": "gpu"}, "device='gpu' is not available"),
        ({"device": "meta"}, "device='meta' is not available"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        plan_memory(config_of(3), **kwargs)


def test_other_bad_input_is_named():
    with pytest.raises(ValueError, match="not a int"):
        plan_memory(7)
    with pytest.raises(ValueError, match="unknown method 'block'"):
        plan_of(3).worst("block")
    model = BlockedDiTModel(config_of(3), blocks=[0])
    with pytest.raises(ValueError, match="the batch is empty"):
        measure_memory(model, 0, {})
    with pytest.raises(ValueError, match="block 1 is not loaded"):
        measure_memory(model, 1, model.dummy_batch(2))
    with pytest.raises(ValueError, match="measure_memory"):
        plan_memory(config_of(3), objective=DenoisingScoreMatching(BlockedDiTModel(config_of(1)), 0.5), device="cpu")
    with pytest.raises(TypeError, match="BlockedPreTrainedModel must define dummy_batch"):
        BlockedPreTrainedModel.dummy_batch(BlockedPreTrainedModel.__new__(BlockedPreTrainedModel), 1)


def test_a_teacher_s_weights_count_in_a_measured_step():
    teacher = BlockedDiTModel(config_of(1))
    model = BlockedDiTModel(config_of(3), blocks=[0])
    plain = measure_memory(model, 0, model.dummy_batch(2))
    taught = measure_memory(model, 0, model.dummy_batch(2), objective=DenoisingScoreMatching(teacher, 0.5))
    held = sum(t.numel() * t.element_size() for t in [*teacher.parameters(), *teacher.buffers()])
    assert taught.weights - plain.weights == held
    assert (taught.gradients, taught.moments, taught.ema) == (plain.gradients, plain.moments, plain.ema)


# -- what a plan is made from ------------------------------------------------------------------------------------


def test_a_plan_takes_a_directory_or_a_bases_config_as_from_base_does(tmp_path):
    from diffusers import DiTTransformer2DModel

    from hf_diffusionblocks import plan_memory
    from hf_diffusionblocks.families.dit import BlockedDiTConfig

    base = {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "in_channels": 1}
    expected = plan_memory(BlockedDiTConfig(base_config=base, num_blocks=2)).to_dict()
    assert plan_memory(base, 2).to_dict() == expected
    DiTTransformer2DModel(**base).save_pretrained(tmp_path / "dit")
    assert plan_memory(tmp_path / "dit", 2).to_dict() == expected
    with pytest.raises(ValueError, match="plan_memory takes a blocked model, its config, a directory"):
        plan_memory(3)
