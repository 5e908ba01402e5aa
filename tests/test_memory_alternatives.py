"""Plans of optimizers and gradient release against counts, and the table of what other methods hold."""

import importlib.util
import json
import math

import pytest
import torch
from torch import nn

from hf_diffusionblocks import BlockedDiTModel, BlockedForCausalLM, losses
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.memory import BLOCKED, CHECKPOINTING, END_TO_END, MemoryPlan, measure_memory, plan_memory
from hf_diffusionblocks.memory_alternatives import DEVICES, LORA_RANK, WHOLE, AlternativeRow, layers_of
from hf_diffusionblocks.memory_counting import SavedTensors, held_bytes
from hf_diffusionblocks.memory_fake_steps import FakeStep, few_chunks
from hf_diffusionblocks.objectives import default_objective
from hf_diffusionblocks.training.arguments import OPTIMIZERS
from test_memory import BATCH, assert_close, config_of, row_of

WITHOUT = "bitsandbytes is not installed (pip install bitsandbytes)"
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason=WITHOUT)
TOKENS, WIDTH, LAYERS, VOCAB = 16, 64, 6, 200
LLAMA = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
}
MATRICES = [(WIDTH, WIDTH)] * 4 + [(128, WIDTH)] * 3  # of a layer
LAYER = sum(math.prod(shape) for shape in MATRICES) + 2 * WIDTH
REST = 2 * VOCAB * WIDTH + WIDTH  # embeddings, head, norm


def llama(num_blocks: int = 3, base: dict | None = None, **settings):
    return BlockedForCausalLM.config_from(LLAMA | (base or {}), num_blocks=num_blocks, **settings)


def plan_of_llama(num_blocks: int = 3, dtype: torch.dtype = torch.float32, **settings) -> MemoryPlan:
    config = llama(num_blocks, auxiliary_layers=0, layers_per_block=None)
    return plan_memory(config, batch_size=2, tokens=TOKENS, device="cpu", dtype=dtype, use_ema=False, **settings)


def row(plan: MemoryPlan, method: str, job: str = WHOLE) -> AlternativeRow:
    return next(r for r in plan.alternatives.rows if (r.method, r.job) == (method, job))


# -- our own switches, against counts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize(
    "optim", [pytest.param(o, marks=needs_bitsandbytes if "8bit" in o else ()) for o in OPTIMIZERS]
)
def test_predictions_hold_for_each_optimizer(optim, release):
    settings = {"optim": optim, "gradient_release": release}
    plan = plan_memory(config_of(3), batch_size=BATCH, device="cpu", alternatives=False, **settings)
    model = BlockedDiTModel(config_of(3), blocks=[1])
    counted = measure_memory(model, 1, model.dummy_batch(BATCH), **settings)
    assert_close(row_of(plan, BLOCKED, 1), counted)
    parameters = held_bytes(model.parameters())
    assert (counted.gradients < 0.3 * parameters) == release
    # AdamW has two moments of a parameter's size; 8-bit Adam two of a quarter, where parameters are large enough.
    low, high = {"adafactor": (0, 0.1), "adamw_8bit": (0.5, 0.75)}.get(optim, (2, 2.001))
    assert low <= counted.moments / parameters <= high


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("block", [0, 2])
def test_predictions_of_released_gradients_hold_for_language_models(block, tied):
    """Block 0 trains the token embeddings; a tied table's gradient waits in it for the backward pass's end."""
    config = llama(3, {"tie_word_embeddings": tied}, auxiliary_layers=0)
    settings = {"optim": "adafactor", "gradient_release": True}
    plan = plan_memory(config, batch_size=2, tokens=TOKENS, device="cpu", alternatives=False, **settings)
    model = BlockedForCausalLM(config, blocks=[block])
    counted = measure_memory(model, block, model.dummy_batch(2, TOKENS), **settings)
    assert_close(row_of(plan, BLOCKED, block), counted)
    table = 4 * VOCAB * WIDTH
    if tied:
        assert counted.gradients >= (2 * table if block == 0 else 4 * 128 * WIDTH)
    else:
        assert table <= counted.gradients < 1.1 * table  # the head's, or the embeddings'


def test_end_to_end_of_two_streams_is_the_plain_model():
    settings = {"batch_size": 2, "tokens": TOKENS, "device": "cpu"}
    paper = plan_memory(llama(3, preset="paper"), **settings)
    clean = plan_memory(llama(3, auxiliary_layers=0), **settings)
    for suffix in ("", CHECKPOINTING):
        assert row_of(paper, END_TO_END + suffix) == row_of(clean, END_TO_END + suffix)
        assert row_of(paper, END_TO_END + suffix).parameters == LAYERS * LAYER + REST
    assert row(paper, "AdamW") == row(clean, "AdamW")
    assert row_of(paper, BLOCKED, 1).activations > row_of(clean, BLOCKED, 1).activations  # two streams
    one = BlockedForCausalLM(llama(1, auxiliary_layers=0))
    counted = measure_memory(one, 0, one.dummy_batch(2, TOKENS))
    assert_close(row_of(paper, END_TO_END), counted)


@pytest.mark.parametrize(
    ("settings", "mixed_precision"),
    [({"auxiliary_layers": 0}, "no"), ({"preset": "paper"}, "bf16")],
    ids=["clean", "two streams"],
)
def test_large_batches_are_counted_from_small_ones_exactly(settings, mixed_precision, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 20 * VOCAB)
    defaults = {"bias": None, "ignore_index": -100, "chunk_elements": 20 * VOCAB}
    monkeypatch.setattr(losses.linear_cross_entropy, "__kwdefaults__", defaults)
    config, batch = llama(2, **settings), 16
    step = FakeStep(
        BlockedForCausalLM,
        batch,
        torch.float32,
        mixed_precision,
        default_objective(config),
        torch.device("cpu"),
        {"tokens": TOKENS},
    )
    model = step.build(config, blocks=[0])
    assert few_chunks(model, batch, 3, step.batch_settings) == 4  # 3 chunks of 20 tokens in rows of 16
    small = step._run(model, 0)
    monkeypatch.setattr("hf_diffusionblocks.memory_fake_steps.few_chunks", lambda model, batch, *_: batch)
    whole = step._run(model, 0)
    assert small.activations == pytest.approx(whole.activations, rel=1e-4)
    assert small[1:] == whole[1:]


# -- what others hold --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_methods_hold_what_their_papers_say(dtype):
    plan, size = plan_of_llama(dtype=dtype), dtype.itemsize
    count = LAYERS * LAYER + REST
    weights = row(plan, "AdamW").weights

    def check(method: str, gradients: float, moments: float, extra: float = 0) -> None:
        found = row(plan, method)
        assert found.gradients == pytest.approx(gradients, rel=0.01), method
        assert found.moments == pytest.approx(moments, rel=0.01, abs=1), method
        assert found.weights == pytest.approx(weights + extra, rel=0.01), method

    assert weights == pytest.approx(size * count, rel=0.01)
    one = size * VOCAB * WIDTH  # the largest matrix
    check("AdamW", size * count, 2 * size * count)
    check("AdamW, gradient release", one, 2 * size * count)
    check("optimizer on the CPU", size * count, 0)
    check("optimizer and gradients on the CPU", one, 0)
    check("LOMO", one, 0)
    check("BAdam", 4 * LAYER, 8 * LAYER, 4 * LAYER)  # 2 + 16 / D bytes in bf16, as its authors' package holds
    check("LISA", size * (2 * LAYER + REST), 2 * size * (2 * LAYER + REST))
    adapters = size * LAYERS * sum(LORA_RANK * (m + n) for m, n in MATRICES)
    check("LoRA", adapters, 2 * adapters, adapters)
    linear = LAYERS * sum(m * n for m, n in MATRICES)
    check("QLoRA", adapters, 2 * adapters, adapters - (size - 4.127 / 8) * linear)
    rank = WIDTH // 4
    galore = LAYERS * sum(rank * min(shape) + 2 * rank * max(shape) for shape in MATRICES) + 2 * (count - linear)
    check("GaLore by layer", one, size * galore)
    per_device = size * count / DEVICES
    check("FSDP2 / ZeRO-3", per_device + size * LAYER, 2 * per_device, per_device + size * LAYER - weights)
    for found in plan.alternatives.rows:
        assert found.total == found.weights + found.gradients + found.moments + found.activations
        assert found.bytes_per_parameter == pytest.approx(found.total / count)
    if dtype == torch.bfloat16:
        found = row(plan, "AdamW")
        assert (found.total - found.activations) / count == pytest.approx(8, rel=0.01)


def test_a_block_holds_its_share_of_each_method_that_combines():
    plan = plan_of_llama()
    alone = {r.method for r in plan.alternatives.rows if r.job == WHOLE}
    combined = {r.method for r in plan.alternatives.rows if r.job == "one of 3 blocks"}
    assert alone - combined >= {"BAdam", "LISA"} and "QLoRA" in combined
    whole, block = row(plan, "AdamW"), row(plan, "AdamW", "one of 3 blocks")
    worst = plan.worst(BLOCKED)
    for name in ("weights", "gradients", "moments", "activations"):
        assert getattr(block, name) == getattr(worst, name)
        assert getattr(whole, name) == getattr(plan.rows[0], name)
    assert row(plan, "AdamW, checkpointing").activations == row_of(plan, END_TO_END + CHECKPOINTING).activations
    assert row(plan, "LOMO", "one of 3 blocks").total < 0.5 * row(plan, "LOMO").total


def test_activations_of_partly_frozen_models_are_those_of_real_steps():
    """BAdam trains one layer at a time: at worst the first one, for which the gradient passes all others."""
    plan = plan_of_llama()
    model = BlockedForCausalLM(llama(1, auxiliary_layers=0)).train()
    layers = layers_of(model.block(0))
    assert len(layers) == LAYERS
    batch, objective = model.dummy_batch(2, TOKENS), default_objective(model.config)
    for method, active in (("BAdam", 1), ("LISA", 2)):
        for number, layer in enumerate(layers):
            layer.requires_grad_(number < active)
        with SavedTensors([model]) as saved:
            objective(model, 0, batch, torch.Generator())
        assert row(plan, method).activations == pytest.approx(saved.peak, rel=0.05)
    assert row(plan, "BAdam").activations < row(plan, "LISA").activations < 0.9 * row(plan, "AdamW").activations


def test_the_closing_line_names_what_needs_the_least_and_rows_that_beat_a_block_are_marked():
    plan = plan_of_llama()
    table, rows = plan.alternatives, plan.alternatives.rows
    single = [r for r in rows if r.devices == 1]
    assert table.least() == min(single, key=lambda r: r.total)
    assert table.least(ours=True) == min((r for r in single if r.ours), key=lambda r: r.total)
    assert table.least().name in table.summary and table.least(ours=True).name in table.summary
    assert table.least(ours=True).method == "Adafactor, gradient release, checkpointing"
    lines = str(plan).splitlines()
    assert lines[-1] == table.summary
    marked = {r.name: next(line for line in lines if line.startswith(r.name + "  ")) for r in rows}
    assert len(marked) == len(rows)
    assert [name for name, line in marked.items() if "  *  " in line] == [table.least().name]
    # In a cascade without auxiliary layers a third of the state: no method with all weights of the whole needs less.
    block = row(plan, "AdamW", "one of 3 blocks")
    less = {r.name for r in rows if not r.checkpointing and r.total < block.total}
    assert {name for name, line in marked.items() if "  <  " in line} >= less
    two = plan_of_llama(2, torch.bfloat16).alternatives  # a rival that wins must show
    winners = [r for r in two.rows if r.job == WHOLE and "<" in next(x for x in str(two).splitlines() if r.name in x)]
    assert any(r.method in ("LOMO", "BAdam", "QLoRA") or r.devices > 1 for r in winners)


def test_a_model_of_one_layer_has_a_table_too():
    plan = plan_memory(
        llama(1, {"num_hidden_layers": 1}, auxiliary_layers=0), batch_size=1, tokens=TOKENS, device="cpu"
    )
    assert row(plan, "BAdam").activations == row(plan, "AdamW").activations
    assert row(plan, "AdamW", "the only block").ratio == 1
    assert plan_memory(llama(), tokens=TOKENS, device="cpu", alternatives=False).alternatives is None


def test_layers_are_the_largest_list_of_a_network():
    model = BlockedDiTModel(config_of(1))
    assert [type(layer).__name__ for layer in layers_of(model.block(0))] == ["BasicTransformerBlock"] * 6
    assert layers_of(nn.Linear(2, 2)) == []


def test_the_command_prints_the_alternatives_and_their_json(capsys):
    recipe = ["plan", "digits-dit", "training.optim=adafactor", "training.gradient_release=true"]
    assert main([*recipe, "training.max_grad_norm=0"]) == 0
    text = capsys.readouterr().out
    for name in (
        "optim=adafactor",
        "gradient_release=True",
        "8-bit Adam",
        "LISA",
        "FSDP2",
        "Least of all on one device",
    ):
        assert name in text
    assert main([*recipe, "training.max_grad_norm=0", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["settings"]["optim"] == "adafactor" and values["settings"]["gradient_release"] is True
    rows = values["alternatives"]["rows"]
    assert {"method", "job", "weights", "total", "source", "bytes_per_parameter"} <= rows[0].keys()
    assert values["alternatives"]["summary"] in text


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="unknown optim 'adafactr'.*did you mean 'adafactor'"):
        plan_memory(config_of(2), optim="adafactr")
