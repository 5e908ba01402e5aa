"""The script of classifiers' rivals: documented tables are those of the kept results, arms have equal work."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    """benchmarks/classification_rivals.py, imported as its neighbours do."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("classification_rivals")
    for path in (ROOT / "benchmarks").glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("study", ["digits", "fashion-vit", "fashion", "cifar10"])
def test_the_documented_tables_are_those_of_the_kept_results(script, study):
    text = " ".join((ROOT / "docs" / "experiments-classifiers.md").read_text(encoding="utf-8").split())
    lines = [" ".join(line.split()) for line in script.table(study).splitlines() if line]
    assert len(lines) > 5
    assert [line for line in lines if line not in text] == []


def test_every_arm_on_noprops_network_runs_it_on_about_as_many_images(script):
    for study in [study for study in script.STUDIES.values() if study.cnn]:
        for name, arm in script.CNN_ARMS.items():
            epochs = script.epochs_of(study, name)
            assert abs(epochs * arm.passes / (study.epochs * script.BLOCKS) - 1) < 0.08, name


def test_without_its_files_cifar10_is_skipped_with_a_reason(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "CIFAR10", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="skipped.*nowhere is missing"):
        script.load("cifar10", "test")


def test_the_backpropagated_network_has_the_blocks_of_noprop(script):
    study = script.STUDIES["digits"]
    ours, theirs = (script.CNN_ARMS[f"CNN, {name}, T={script.BLOCKS}"] for name in ("backpropagation", "NoProp-DT"))
    shapes = [[tuple(p.shape) for p in arm.make(study).parameters()] for arm in (ours, theirs)]
    assert shapes[0] == shapes[1]
