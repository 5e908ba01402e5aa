"""What the benchmarks' scripts share, and that the tables of the documentation are those of the kept results."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "benchmarks"


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
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    lines = [line for line in script("quality").table(study).splitlines() if line]
    assert len(lines) > 5 and all(line in text for line in lines), [line for line in lines if line not in text]


def test_the_table_of_masked_models_is_that_of_the_kept_results(script):
    text = (ROOT / "docs" / "experiments-masked.md").read_text(encoding="utf-8")
    lines = script("masked_quality").table("austen").splitlines()
    assert len(lines) > 5 and all(line in text for line in lines), [line for line in lines if line not in text]


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


def test_the_documented_table_of_recurrent_depth_is_that_of_the_kept_results(script):
    text = (ROOT / "docs" / "experiments-recurrent.md").read_text(encoding="utf-8")
    lines = [line for line in script("recurrent").table().splitlines() if line]
    assert len(lines) > 5 and all(line in text for line in lines), [line for line in lines if line not in text]
