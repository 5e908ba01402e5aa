"""The comparison of memory with other methods: what is counted, what a plan says, and what the documentation shows."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hf_diffusionblocks.memory import plan_memory
from hf_diffusionblocks.memory_counting import MemoryUse

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "benchmarks"
RESULTS = SCRIPTS / "results" / "rivals-memory.jsonl"


@pytest.fixture
def script(monkeypatch):
    """Imports a script of benchmarks/ as its neighbours do."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for path in SCRIPTS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def kept_rows() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def test_every_way_has_a_row_and_the_documented_tables_are_those_of_the_rows(script):
    ways, tables = script("_rivals_ways"), script("_rivals_tables")
    wanted = {(w.name, scope) for w in ways.WAYS.values() for scope in w.scopes}
    assert {(r["way"], r["scope"]) for r in kept_rows() if r["dtype"] == "bfloat16"} == wanted
    assert {(r["way"], r["scope"]) for r in kept_rows() if r["dtype"] == "float32"} <= wanted
    text = " ".join((ROOT / "docs" / "experiments.md").read_text(encoding="utf-8").split())  # however it is wrapped
    lines = [" ".join(line.split()) for line in tables.table(kept_rows()).splitlines() if line]
    assert [line for line in lines if line not in text] == []


def test_the_least_of_all_is_a_block_below_two_bytes_per_parameter(script):
    rows, occupied = kept_rows(), script("_rivals_tables").occupied
    least = min(rows, key=occupied)
    assert least["scope"] == "one block of 3" and least["dtype"] == "bfloat16"
    assert occupied(least) < 2 * least["parameters"] and least["total"] < 2 * least["parameters"]
    others = [r for r in rows if r["scope"] == "end to end"]
    assert min(map(occupied, others)) > occupied(least)


def test_a_plan_says_what_was_counted(script):
    pairs = list(script("_rivals_tables").planned([r for r in kept_rows() if r["dtype"] == "bfloat16"]))
    assert len(pairs) > 12
    off = {f"{r['way']}, {r['scope']}": round(plan.total / r["total"], 3) for r, plan in pairs}
    assert {name: ratio for name, ratio in off.items() if not 0.95 < ratio < 1.05} == {}


@pytest.mark.parametrize("name", ["Adafactor, release, checkpointing", "AdamW"])
def test_a_way_that_is_counted_is_what_it_says(script, tmp_path, name):
    ways = script("_rivals_ways")
    way = ways.WAYS[name]
    run = ways.Single(way, ways.JOB, (64, 3), 2, torch.bfloat16, str(tmp_path))
    before = [p.clone() for p in run.model.parameters()]
    run.updates(1)
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}
    assert any(not torch.equal(old, new) for old, new in zip(before, run.model.parameters(), strict=True))
    use, more = run.count()
    assert isinstance(use, MemoryUse) and more == {} and use.ema == 0
    plan = plan_memory(
        run.model.config,
        batch_size=2,
        dtype=torch.bfloat16,
        use_ema=False,
        optim=way.optim,
        gradient_release=way.release,
        alternatives=False,
    )
    expected = plan.worst("blocked" + ", checkpointing" * way.checkpointing)
    assert (use.gradients, use.moments, use.activations) == (expected.gradients, expected.moments, expected.activations)


def test_lora_trains_the_adapters_alone(script, tmp_path):
    pytest.importorskip("peft")
    ways = script("_rivals_ways")
    run = ways.Single(ways.WAYS["LoRA"], ways.WHOLE, (64, 2), 2, torch.bfloat16, str(tmp_path))
    trained = {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    layer = run.model.block(0).transformer_blocks[0]
    assert "lora_A" in dict(layer.attn1.to_q.named_children())
    use, _ = run.count()
    assert use.gradients == sum(p.nbytes for p in run.model.parameters() if p.requires_grad)


def test_the_chart_has_a_bar_of_each_kind_and_a_peak_for_each_row(script):
    pytest.importorskip("matplotlib")
    rows = kept_rows()
    figure = script("_rivals_tables").chart(rows)
    assert len(figure.axes) == 2
    bars = sum(len(axis.patches) for axis in figure.axes)
    assert bars == 6 * len(rows)
    peaks = sorted(float(line.get_xdata()[0]) for a in figure.axes for line in a.lines if line.get_marker() == "D")
    assert peaks == pytest.approx(sorted(r["peak"] / r["parameters"] for r in rows))
