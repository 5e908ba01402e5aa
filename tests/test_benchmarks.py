"""What the benchmarks' scripts share, and that the tables of the documentation are those of the kept results."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "benchmarks"


def documented(page: str) -> str:
    """A page's text, its lines joined as they were written."""
    return " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())


def missing(lines: list[str], text: str) -> list[str]:
    """The lines that a documented text lacks, however it is wrapped."""
    return [line for line in lines if " ".join(line.split()) not in text]


@pytest.fixture
def script(monkeypatch):
    """Imports a script of benchmarks/ as its neighbours do."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for path in SCRIPTS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("study", ["digits", "fashion"])
def test_the_documented_tables_are_those_of_the_kept_results(script, study):
    text = documented("experiments.md")
    lines = [line for line in script("quality").table(study).splitlines() if line]
    assert len(lines) > 5 and not missing(lines, text), missing(lines, text)


def test_the_table_of_masked_models_is_that_of_the_kept_results(script):
    text = documented("experiments-masked.md")
    lines = script("masked_quality").table("austen").splitlines()
    assert len(lines) > 5 and not missing(lines, text), missing(lines, text)


def test_every_study_has_its_results_where_it_looks_for_them(script):
    for name in ("quality", "text_quality"):
        module = script(name)
        for study in module.STUDIES:
            path = module.results_of(study)
            assert path.parent == SCRIPTS / "results"
            assert path.is_file() or study == "layers"  # not run yet


def test_only_missing_jobs_run_and_failed_ones_are_named(script, tmp_path, capfd):
    studies = script("_studies")
    rows = [{"arm": "a", "seed": 0}]
    todo = studies.missing_jobs(rows, ["a", "b"], (0, 1))
    assert todo == [("b", 0), ("a", 1), ("b", 1)]
    assert studies.missing_jobs(rows, ["a", "b"], (0, 1), only="a") == [("a", 1)]
    job = tmp_path / "job.py"
    job.write_text("import sys\nprint('ran', *sys.argv[1:])\nsys.exit(sys.argv[4] == 'a')\n")
    with pytest.raises(SystemExit, match=r"failed: \['a, seed 1'\]"):
        studies.run_jobs(str(job), "digits", todo, 2, "--text", "x")
    said = capfd.readouterr().out
    assert "ran job digits --arm b --seed 1 --text x" in said and "FAILED  a, seed 1" in said


def test_the_bare_loop_learns_from_the_rows_in_turn(script):
    timing = script("_timing")
    weight = torch.nn.Parameter(torch.zeros(3))
    target, seen = torch.tensor([1.0, -1.0, 2.0]), []

    def loss(batch):
        seen.append(batch.tolist())
        return (weight - target).square().sum()

    step = timing.bare_loop([weight], torch.arange(5), 2, loss)
    rounds = timing.timed_rounds({"step": step}, 3)
    assert seen == [[0, 1], [2, 3], [4, 0], [1, 2]] and len(rounds) == 3
    torch.testing.assert_close(weight.detach(), 4e-4 * target.sign(), rtol=1e-2, atol=0)  # AdamW: lr per step
    assert timing.median([{"a": 1.0}, {"a": 5.0}, {"a": 2.0}], lambda row: row["a"]) == 2.0


def test_the_documented_tables_of_a_gpu_are_those_of_the_kept_results(script):
    module = script("gpu")
    lines = module.table(module.read_rows(module.FILE)).splitlines()
    assert len(lines) > 15 and not missing(lines, documented("experiments-gpu.md"))


def test_the_documented_table_of_recurrent_depth_is_that_of_the_kept_results(script):
    text = documented("experiments-recurrent.md")
    lines = [line for line in script("recurrent").table().splitlines() if line]
    assert len(lines) > 5 and not missing(lines, text), missing(lines, text)


def test_the_readme_holds_the_table_of_all_families_as_the_results_make_it(script):
    module = script("results_table")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert module.written(text) == text, "run: python benchmarks/results_table.py --write"
    shown = module.table()
    assert all(f"({number}) `{group.command}`" in shown for number, group in enumerate(module.GROUPS, start=1))
    for group in module.GROUPS:
        known = {row["arm"] for row in group.rows()}
        assert next(iter(group.arms)) in known and set(group.ours) <= known & set(group.arms), group.title


def test_the_readmes_figures_of_capacity_are_those_of_the_kept_results(script):
    rows = script("_studies").read_rows(SCRIPTS / "results" / "quality-capacity.jsonl")
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    def losses(arm: str) -> list[float]:
        found = [r["held_out_loss"] for r in sorted(rows, key=lambda r: r["seed"]) if r["arm"] == arm]
        assert len(found) == 3
        return found

    for updates in (500, 2000, 5000):
        whole, blocked = (
            losses(f"end to end, L, {updates} updates"),
            losses(f"blocked, B=3, {updates} updates per block"),
        )
        small = losses(f"end to end, L/3, {3 * updates} updates")
        cells = " | ".join(f"{sum(x) / 3:.4f}" for x in (whole, blocked, small))
        mean = sum(b - s for b, s in zip(blocked, small, strict=True)) / 3
        assert f"| {updates} | {cells} | {mean:+.4f} ±" in text
